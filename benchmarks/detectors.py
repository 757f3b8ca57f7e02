"""One image through each detector, plain against deformable, on the CPU (Table 4 of the paper).

    python -m benchmarks.detectors [--threads 2] [--rounds 7] [--depth 101] [--size 600 1000]

Forward alone, from the image to the candidates before their suppression; 20 classes, 300
proposals. Random weights; those of the offsets are such that samples leave their grid.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import compare, median_ratio, setting
from deformnet.nn.offsets import OffsetLayer
from deformnet.recipes import ClassAwareRPNRecipe, DetectorRecipe, FasterRCNNRecipe, RFCNRecipe

PAPER = {"class-aware-rpn": 1.07, "faster-rcnn": 1.31, "rfcn": 1.18}
"""Forward seconds of the deformable network over those of the plain one, Table 4."""


def networks(depth: int) -> dict[str, tuple[DetectorRecipe, DetectorRecipe]]:
    """The plain and the deformable recipe of each detector."""
    pairs = (
        (
            ClassAwareRPNRecipe(depth=depth, deform_layers=0),  # pyright: ignore[reportArgumentType]
            ClassAwareRPNRecipe(depth=depth),  # pyright: ignore[reportArgumentType]
        ),
        (
            FasterRCNNRecipe(depth=depth, deform_layers=0, pool="max"),  # pyright: ignore[reportArgumentType]
            FasterRCNNRecipe(depth=depth),  # pyright: ignore[reportArgumentType]
        ),
        (
            RFCNRecipe(depth=depth, deform_layers=0, pool="average"),  # pyright: ignore[reportArgumentType]
            RFCNRecipe(depth=depth),  # pyright: ignore[reportArgumentType]
        ),
    )
    return {plain.network: (plain, deformable) for plain, deformable in pairs}


def forward(recipe: DetectorRecipe, images: Tensor) -> Callable[[], object]:
    torch.manual_seed(0)
    model = recipe.build_model(20).eval().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, OffsetLayer):
            torch.nn.init.normal_(module.get_parameter("weight"), std=0.01)
    size = (images.shape[2], images.shape[3])
    return lambda: model(images, [size])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101), default=101)
    parser.add_argument("--size", type=int, nargs=2, default=(600, 1000), metavar=("H", "W"))
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(setting())
    images = torch.randn(1, 3, *options.size).contiguous(memory_format=torch.channels_last)
    print("| network | plain, s | deformable / plain | in the paper |\n|---|---|---|---|")
    for name, (plain, deformable) in networks(options.depth).items():
        calls = {"plain": forward(plain, images), "deformable": forward(deformable, images)}
        with torch.inference_mode():
            times = compare(calls, rounds=options.rounds)
        plain_times, base = times["plain"], times["plain"].median
        low, high = (times["deformable"].quantile(share) / base for share in (0.2, 0.8))
        print(
            f"| {name} | {base:.3f} ({plain_times.quantile(0.2):.3f}-"
            f"{plain_times.quantile(0.8):.3f}) | {median_ratio(times, 'deformable', 'plain'):.2f} "
            f"({low:.2f}-{high:.2f}) | {PAPER[name]:.2f} |"
        )


if __name__ == "__main__":
    main()
