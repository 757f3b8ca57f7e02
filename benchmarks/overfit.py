"""Sanity check from files to scores: each detector overfits eight images.

    python -m benchmarks.overfit DIR OUT [--network rfcn] [--iterations 500]

DIR is a data set in VOC layout; the first eight images of its `train` list are used for training,
without flips, and for evaluation. Both convolutions and pooling are deformable.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from deformnet.data.voc_files import find_years
from deformnet.engine import train
from deformnet.recipes import ClassAwareRPNRecipe, DetectorRecipe, FasterRCNNRecipe, RFCNRecipe

IMAGES = 8
NETWORKS = {r.network: r for r in (ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe)}


def first_images(data: Path, out: Path) -> None:
    """Creates a data set of links to the first images of another one."""
    source = find_years(data)[-1].resolve()
    folder = out / "VOCdevkit/VOC2012"
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "Annotations"):
        if not (folder / name).exists():
            (folder / name).symlink_to(source / name)
    names = (source / "ImageSets/Main/train.txt").read_text().split()[:IMAGES]
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names))


def recipe(network: type[DetectorRecipe], iterations: int, side: int) -> DetectorRecipe:
    small = network(
        backbone="resnet18",
        short_side=side,
        max_side=2 * side,
        flip=False,
        anchor_sizes=(16, 32, 64, 128),
        batch=4,
        iterations=iterations,
        lr=0.05,
        offset_lr_scale=0.1,
        warmup=50,
        clip=10.0,
    )
    # These small images have few pixels per box.
    if isinstance(small, RFCNRecipe | FasterRCNNRecipe):
        small = replace(small, bins=3)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="rfcn")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--side", type=int, default=128, help="shorter side of the images, pixels")
    options = parser.parse_args()

    first_images(options.data, options.out / "data")
    result = train(
        recipe(NETWORKS[options.network], options.iterations, options.side),
        options.out / "data",
        options.out / options.network,
        val_split="train",
    )
    print(f"{options.network}, evaluated on its {IMAGES} training images\n{result}")


if __name__ == "__main__":
    main()
