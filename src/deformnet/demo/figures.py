"""The pictures of the demo."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from deformnet.analysis import SamplingLocations
from deformnet.demo.parts import Parts
from deformnet.inference import palette
from deformnet.runs import replacing

_DOTS_PER_INCH = 130
_TEXT = 11  # points
_OUTSIDE, _EDGE = "#e4e4e4", "#000000"
_MARGIN = 0.15  # shown around an image, as a share of its side
# Colour and diameter in points of the samples in the first map below the unit, the next, the last.
_LEVELS = (("#ffffff", 5.5), ("#f0e442", 3.2), ("#ff7f0e", 1.6))
_UNIT: dict[str, Any] = {
    "marker": "P",
    "color": "#56b4e9",
    "markersize": 10,
    "markeredgecolor": _EDGE,
}
# A detection's box, its regular bins and its moved ones, as in the paper.
_BOX: dict[str, Any] = {"edgecolor": "#f0e442", "linewidth": 2.2}
_PLAIN_BIN: dict[str, Any] = {"edgecolor": "#ffffff", "linewidth": 0.8, "linestyle": ":"}
_MOVED_BIN: dict[str, Any] = {"edgecolor": "#ff3b30", "linewidth": 1.6}


@dataclass(frozen=True)
class Shown:
    """An image uint8 [3, H, W] with its label map [H, W] and both predictions of it."""

    image: Tensor
    truth: Tensor
    plain: Tensor
    deformable: Tensor


@dataclass(frozen=True)
class Look:
    """A unit of both networks over an image uint8 [3, H, W].

    Attributes:
        what: what is there.
        centre: (y, x) of the unit in the image.
        plain, deformable: what it samples one layer down, two, three.
    """

    image: Tensor
    what: str
    centre: tuple[int, int]
    plain: Sequence[SamplingLocations]
    deformable: Sequence[SamplingLocations]


def draw_predictions(path: Path, shown: Sequence[Shown], classes: Sequence[str]) -> None:
    """One row for each image: the image, the truth and both predictions."""
    figure = _figure(width=8, height=2 * len(shown) + 0.6)
    _place_predictions(_grid(figure, len(shown), 4), shown, classes)
    _legend(figure, _class_handles(classes))
    _save(figure, path)


def draw_sampling(path: Path, looks: Sequence[Look]) -> None:
    """Three units a row: what they sample in the plain network, and below in the deformable one."""
    groups = [looks[start : start + 3] for start in range(0, len(looks), 3)]
    figure = _figure(width=8, height=5.4 * len(groups) + 0.4)
    grid = _grid(figure, 2 * len(groups), 3)
    for number, group in enumerate(groups):
        _place_looks(grid[2 * number : 2 * number + 2], group)
    _legend(figure, _level_handles())
    _save(figure, path)


def draw_parts(path: Path, found: Sequence[Parts]) -> None:
    """Detections, three a row: the box, its regular bins and where they have moved."""
    rows = max(1, -(-len(found) // 3))
    figure = _figure(width=8, height=2.8 * rows + 0.4)
    for axes, parts in zip(_grid(figure, rows, 3).flat, found, strict=False):
        height, width = parts.image.shape[1:]
        axes.imshow(0.15 + 0.65 * _pixels(parts.image), extent=(0, width, height, 0))
        axes.set_title(parts.what, fontsize=_TEXT)
        for bins, style in ((parts.plain, _PLAIN_BIN), (parts.moved, _MOVED_BIN)):
            for box in bins.reshape(-1, 4):
                axes.add_patch(_rectangle(box, style))
        axes.add_patch(_rectangle(parts.box, _BOX))
    kinds = (("detection", _BOX), ("its bins", _PLAIN_BIN), ("moved by their offsets", _MOVED_BIN))
    # White would not show on the page.
    lines = [
        Line2D(
            *([], []),
            label=name,
            color="#808080" if style is _PLAIN_BIN else style["edgecolor"],
            linestyle=style.get("linestyle", "-"),
            linewidth=style["linewidth"],
        )
        for name, style in kinds
    ]
    _legend(figure, lines)
    _save(figure, path)


def _rectangle(box: Tensor, style: Mapping[str, Any]) -> Rectangle:
    x1, y1, x2, y2 = box.tolist()
    return Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor="none", **style)


def draw_overview(
    path: Path, shown: Sequence[Shown], looks: Sequence[Look], classes: Sequence[str]
) -> None:
    """One wide picture of both: two images with their predictions, three units."""
    figure = _figure(width=14, height=4.6)
    figures = figure.subfigures(1, 2, squeeze=False, width_ratios=(4, 3))
    left, right = figures[0]
    _place_predictions(_grid(left, 2, 4), shown[:2], classes)
    _place_looks(_grid(right, 2, 3), looks[:3])
    _legend(left, _class_handles(classes))
    _legend(right, _level_handles())
    _save(figure, path)


def _place_predictions(grid: np.ndarray, shown: Sequence[Shown], classes: Sequence[str]) -> None:
    """Fills axes [images, 4]."""
    titles = ("image", "truth", "plain", "deformable")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=_TEXT)
    for row, item in zip(grid, shown, strict=False):
        maps = (item.truth, item.plain, item.deformable)
        row[0].imshow(_pixels(item.image))
        for axes, labels in zip(row[1:], maps, strict=True):
            axes.imshow(_tint(item.image, labels, classes), interpolation="nearest")


def _place_looks(grid: np.ndarray, looks: Sequence[Look]) -> None:
    """Fills axes [2, units]: plain above, deformable below."""
    for column, look in zip(grid.T, looks, strict=False):
        column[0].set_title(look.what, fontsize=_TEXT)
        for axes, levels in zip(column, (look.plain, look.deformable), strict=True):
            _draw_look(axes, look, levels)
    for axes, name in zip(grid[:, 0], ("plain", "deformable"), strict=True):
        axes.set_ylabel(name, fontsize=_TEXT)


def _tint(image: Tensor, labels: Tensor, classes: Sequence[str]) -> np.ndarray:
    """A label map over its faded image, [H, W, 3], 0 to 1."""
    grey = _pixels(image).mean(-1, keepdims=True)
    colours = palette(classes) / 255
    index = labels.numpy()
    known = (index > 0) & (index < len(classes))
    faded = np.broadcast_to(0.25 + 0.3 * grey, (*index.shape, 3)).copy()
    faded[known] = (0.85 * colours[index[known]]) + 0.15 * grey[known]
    return faded


def _draw_look(axes: Axes, look: Look, levels: Sequence[SamplingLocations]) -> None:
    """The samples of one unit over its dulled image; faint where there is nothing to read."""
    height, width = look.image.shape[1:]
    axes.imshow(0.15 + 0.65 * _pixels(look.image))
    axes.set_facecolor(_OUTSIDE)
    # The lowest map first: of the points that coincide, as all of a plain grid do, the few show.
    for (points, inside), (colour, size) in zip(reversed(levels), reversed(_LEVELS), strict=True):
        y, x = points.T
        colours = np.where(inside[:, None], to_rgba(colour), to_rgba(colour, 0.3))
        axes.scatter(x, y, size**2, colours, edgecolors=_EDGE, linewidths=0.1 * size)
    y, x = look.centre
    axes.plot(x, y, **_UNIT)
    axes.set_xlim(-_MARGIN * width, (1 + _MARGIN) * width)
    axes.set_ylim((1 + _MARGIN) * height, -_MARGIN * height)


def _class_handles(classes: Sequence[str]) -> list[Artist]:
    colours = palette(classes) / 255
    named = zip(classes[1:], colours[1:], strict=True)
    return [Patch(facecolor=tuple(colour), label=name) for name, colour in named]


def _level_handles() -> list[Artist]:
    labels = ("9 samples", "81 a layer below", "729 two below")
    dots = [
        Line2D(
            *([], []),
            linestyle="none",
            label=label,
            marker="o",
            color=colour,
            markersize=size,
            markeredgecolor=_EDGE,
        )
        for label, (colour, size) in zip(labels, _LEVELS, strict=True)
    ]
    return [Line2D([], [], linestyle="none", label="unit", **_UNIT), *dots]


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] uint8 as [H, W, 3], 0 to 1."""
    return image.permute(1, 2, 0).numpy() / 255


def _figure(*, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def _grid(figure: FigureBase, rows: int, columns: int) -> np.ndarray:
    """Axes [rows, columns] without ticks and frames."""
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return grid


def _legend(figure: FigureBase, handles: Sequence[Artist]) -> None:
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=len(handles), frameon=False
    )


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", facecolor="white")
