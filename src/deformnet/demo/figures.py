"""Figures that only the demo draws: predictions, and an overview."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.patches import Patch
from torch import Tensor

from deformnet.visualization import SampledUnit, draw_sampling_grid, save_figure
from deformnet.visualization.canvas import TEXT, aspect, blank, grid, legend, pixels
from deformnet.visualization.drawing import palette


@dataclass(frozen=True)
class Example:
    """An image uint8 [3, H, W] with its label map [H, W] and the predictions by network."""

    image: Tensor
    ground_truth: Tensor
    predictions: Mapping[str, Tensor]


def draw_predictions(path: Path, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Save a figure with a row per image: the image, the ground truth and the predictions."""
    columns = 2 + len(examples[0].predictions)
    panel = 10 / columns * aspect(example.image for example in examples)
    figure = blank(width=10, height=panel * len(examples) + 0.8)
    _draw_examples(grid(figure, len(examples), columns), examples, classes)
    legend(figure, _class_handles(examples, classes))
    save_figure(figure, path)


def draw_overview(
    path: Path,
    examples: Sequence[Example],
    sampled: Mapping[str, Sequence[SampledUnit]],
    classes: Sequence[str],
) -> None:
    """Save a wide figure with the predictions of two images and the samples of three units."""
    figure = blank(width=16, height=4.6)
    columns = 2 + len(examples[0].predictions)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(columns, 3))[0]
    _draw_examples(grid(left, 2, columns), examples[:2], classes)
    draw_sampling_grid(right, {name: units[:3] for name, units in sampled.items()})
    legend(left, _class_handles(examples[:2], classes))
    save_figure(figure, path)


def _draw_examples(grid: np.ndarray, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Fill axes [images, 2 + networks]."""
    titles = ("image", "ground truth", *examples[0].predictions)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=TEXT)
    for row, example in zip(grid, examples, strict=False):
        row[0].imshow(pixels(example.image))
        maps = (example.ground_truth, *example.predictions.values())
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


def _class_handles(examples: Sequence[Example], classes: Sequence[str]) -> list[Artist]:
    """The legend of the classes that are drawn, without the background."""
    maps = [m for it in examples for m in (it.ground_truth, *it.predictions.values())]
    drawn = {label for labels in maps for label in labels.unique().tolist()}
    named = enumerate(zip(classes, palette(classes) / 255, strict=True))
    return [
        Patch(facecolor=tuple(color), label=name)
        for label, (name, color) in named
        if label > 0 and label in drawn
    ]
