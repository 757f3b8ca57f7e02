"""The paper's claim where it can be controlled: deformable against plain as shapes vary more.

    python -m benchmarks.claim OUT [--strengths 0 0.33 0.67 1] [--seeds 0 1 2] [--share 1]

A strength from 0 to 1 sets how far made objects (deformnet.data.synthetic.shapes) are warped and how much
they differ in size; everything else is equal. At each one a plain network and one with three
deformable layers learn for the same budget: the same images in the same order, the same initial
weights, steps and learning rates. DeepLab is trained at all strengths, R-FCN (whose pooling is
then deformable, too) at the two ends.

The networks are the library's DeepLab and R-FCN, but on a residual network of nine 3x3
convolutions at stride 8 and with a plain loop, so that a run takes five minutes on one core: a
ResNet-18 learns next to nothing in that time, and what has not learned cannot differ. Table 2
comes from the same runs: effective dilation, layer by layer, by size of object.

Runs that are in OUT already are not repeated; a call that was stopped begins again the run that
it was in.
"""
