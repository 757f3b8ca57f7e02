"""The pictures of the demo that are its own: predictions, and an overview."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.patches import Patch
from torch import Tensor

from deformnet.inference import palette
from deformnet.visualization import SampledUnit, draw_sampling_grid, save_figure
from deformnet.visualization.canvas import TEXT, blank, grid, legend, pixels


@dataclass(frozen=True)
class Shown:
    """An image uint8 [3, H, W] with its label map [H, W] and both predictions of it."""

    image: Tensor
    truth: Tensor
    plain: Tensor
    deformable: Tensor


def draw_predictions(path: Path, shown: Sequence[Shown], classes: Sequence[str]) -> None:
    """One row for each image: the image, the truth and both predictions."""
    figure = blank(width=8, height=2 * len(shown) + 0.6)
    _place_predictions(grid(figure, len(shown), 4), shown, classes)
    legend(figure, _class_handles(classes))
    save_figure(figure, path)


def draw_overview(
    path: Path,
    shown: Sequence[Shown],
    looks: Mapping[str, Sequence[SampledUnit]],
    classes: Sequence[str],
) -> None:
    """One wide picture of both: two images with their predictions, three units."""
    figure = blank(width=14, height=4.6)
    figures = figure.subfigures(1, 2, squeeze=False, width_ratios=(4, 3))
    left, right = figures[0]
    _place_predictions(grid(left, 2, 4), shown[:2], classes)
    draw_sampling_grid(right, {name: some[:3] for name, some in looks.items()})
    legend(left, _class_handles(classes))
    save_figure(figure, path)


def _place_predictions(grid: np.ndarray, shown: Sequence[Shown], classes: Sequence[str]) -> None:
    """Fills axes [images, 4]."""
    titles = ("image", "truth", "plain", "deformable")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=TEXT)
    for row, item in zip(grid, shown, strict=False):
        maps = (item.truth, item.plain, item.deformable)
        row[0].imshow(pixels(item.image))
        for axes, labels in zip(row[1:], maps, strict=True):
            axes.imshow(_tint(item.image, labels, classes), interpolation="nearest")


def _tint(image: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """A label map over its faded image, [H, W, 3], 0 to 1."""
    grey = pixels(image).mean(-1, keepdims=True)
    colours = palette(classes) / 255
    index = labels.numpy()
    known = (index > 0) & (index < len(classes))
    faded = np.broadcast_to(0.25 + 0.3 * grey, (*index.shape, 3)).copy()
    faded[known] = (0.85 * colours[index[known]]) + 0.15 * grey[known]
    return faded


def _class_handles(classes: Sequence[str]) -> list[Artist]:
    colours = palette(classes) / 255
    named = zip(classes[1:], colours[1:], strict=True)
    return [Patch(facecolor=tuple(colour), label=name) for name, colour in named]
