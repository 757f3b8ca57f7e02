"""Figures of the demo alone: predictions, and an overview."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.patches import Patch
from torch import Tensor

from deformnet.visualization import SampledUnit, draw_sampling_grid, save_figure
from deformnet.visualization.canvas import TEXT, blank, grid, legend, pixels
from deformnet.visualization.drawing import palette


@dataclass(frozen=True)
class Example:
    """An image uint8 [3, H, W] with its label map [H, W] and the predictions of both networks."""

    image: Tensor
    ground_truth: Tensor
    baseline: Tensor
    deformable: Tensor


def draw_predictions(path: Path, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Save a figure with a row per image: the image, the ground truth and both predictions."""
    figure = blank(width=8, height=2 * len(examples) + 0.6)
    _draw_examples(grid(figure, len(examples), 4), examples, classes)
    legend(figure, _class_handles(classes))
    save_figure(figure, path)


def draw_overview(
    path: Path,
    examples: Sequence[Example],
    sampled: Mapping[str, Sequence[SampledUnit]],
    classes: Sequence[str],
) -> None:
    """Save a wide figure with the predictions of two images and the samples of three units."""
    figure = blank(width=14, height=4.6)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(4, 3))[0]
    _draw_examples(grid(left, 2, 4), examples[:2], classes)
    draw_sampling_grid(right, {name: units[:3] for name, units in sampled.items()})
    legend(left, _class_handles(classes))
    save_figure(figure, path)


def _draw_examples(grid: np.ndarray, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Fill axes [images, 4]."""
    titles = ("image", "ground truth", "baseline", "deformable")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=TEXT)
    for row, example in zip(grid, examples, strict=False):
        row[0].imshow(pixels(example.image))
        maps = (example.ground_truth, example.baseline, example.deformable)
        for axes, labels in zip(row[1:], maps, strict=True):
            axes.imshow(_tint(example.image, labels, classes), interpolation="nearest")


def _tint(image: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """Return a label map over its faded image, [H, W, 3], 0 to 1."""
    gray = pixels(image).mean(-1, keepdims=True)
    colors = palette(classes) / 255
    index = labels.numpy()
    known = (index > 0) & (index < len(classes))
    faded = np.broadcast_to(0.25 + 0.3 * gray, (*index.shape, 3)).copy()
    faded[known] = 0.85 * colors[index[known]] + 0.15 * gray[known]
    return faded


def _class_handles(classes: Sequence[str]) -> list[Artist]:
    named = zip(classes[1:], palette(classes)[1:] / 255, strict=True)
    return [Patch(facecolor=tuple(color), label=name) for name, color in named]
