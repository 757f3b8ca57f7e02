"""Whether nothing is broken from file to score: each detector learns eight images by heart.

    python -m benchmarks.overfit DIR OUT [--network rfcn] [--iterations 500]

DIR is a data set in the VOC layout; the first eight images of its list `train` are trained on,
without flips, and scored. Both the convolutions and the pooling are deformable.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from deformnet.data.voc import find_voc
from deformnet.recipes import ClassAwareRPNRecipe, DetectorRecipe, FasterRCNNRecipe, RFCNRecipe
from deformnet.engine import train

IMAGES = 8
NETWORKS = {r.network: r for r in (ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe)}


def first_images(data: Path, out: Path) -> None:
    """Makes a data set of links to the first images of another."""
    source = find_voc(data).resolve()
    folder = out / "VOCdevkit/VOC2012"
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "Annotations"):
        if not (folder / name).exists():
            (folder / name).symlink_to(source / name)
    names = (source / "ImageSets/Main/train.txt").read_text().split()[:IMAGES]
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in names))


def recipe(network: type[DetectorRecipe], iterations: int, side: int) -> DetectorRecipe:
    made = network(
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
    # As many bins as these small images have cells to fill.
    if isinstance(made, RFCNRecipe | FasterRCNNRecipe):
        made = replace(made, bins=3)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="rfcn")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--side", type=int, default=128, help="shorter side of the images, pixels")
    options = parser.parse_args()

    first_images(options.data, options.out / "data")
    metrics = train(
        recipe(NETWORKS[options.network], options.iterations, options.side),
        options.out / "data",
        options.out / options.network,
        val_split="train",
    )
    ((_, scores),) = metrics["voc"].items()
    found = {name: ap for name, ap in scores["ap"]["0.5"].items() if ap is not None}
    print(
        f"{options.network}: mean AP at IoU 0.5 on its {IMAGES} training images "
        f"{scores['mean_ap']['0.5']:.3f} ({', '.join(f'{n} {ap:.2f}' for n, ap in found.items())})"
    )


if __name__ == "__main__":
    main()
