"""Sampling locations of units over their image (Dai et al. 2017, Figure 6)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from torch import Tensor

from deformnet.analysis import SamplingLocations
from deformnet.visualization import canvas
from deformnet.visualization.colors import BLACK, GREEN, SKY, VERMILLION, WHITE, YELLOW

_MARGIN = 0.15  # shown around an image, as a fraction of its side
_FAINT = 0.3  # opacity of samples outside the map
_CLOUD = 200  # number of points from which on they are a picture in an SVG
# Color and diameter in points of the samples in the first map below the unit, the next, ... Each is
# lighter or darker than the others, too, so that they differ in grayscale.
_LEVELS = ((WHITE, 5.5), (YELLOW, 3.2), (VERMILLION, 1.6), (GREEN, 1.0))


class Marker(TypedDict):
    """Style of a unit's marker."""

    color: str
    marker: str
    markersize: float
    markeredgecolor: str


UNIT = Marker(color=SKY, marker="P", markersize=10, markeredgecolor=BLACK)
# In a contact sheet they differ in shape, too.
_KINDS = (
    Marker(color=YELLOW, marker="P", markersize=8, markeredgecolor=BLACK),
    Marker(color=SKY, marker="o", markersize=6, markeredgecolor=BLACK),
    Marker(color=VERMILLION, marker="s", markersize=6, markeredgecolor=BLACK),
    Marker(color=GREEN, marker="^", markersize=7, markeredgecolor=BLACK),
)


@dataclass(frozen=True)
class SampledUnit:
    """A unit of a feature map over its image, with its sampling locations.

    Attributes:
        image: uint8 [3, H, W].
        title: name of what is there, such as "background".
        center: (y, x) of the unit in the image; integers are pixel centers.
        levels: its sampling locations one layer below, two, ... (at most four), in pixels of the
            image: points [P, 2] and inside [P].
    Raises:
        ValueError: if one of them has another shape, or the number of levels is not 1 to 4.
    """

    image: Tensor
    title: str
    center: tuple[float, float]
    levels: Sequence[SamplingLocations]

    def __post_init__(self) -> None:
        canvas.require_image(self.image)
        if not 1 <= len(self.levels) <= len(_LEVELS):
            raise ValueError(
                f"expected 1 to {len(_LEVELS)} levels of samples, but got {len(self.levels)}"
            )
        for points, inside in self.levels:
            if points.ndim != 2 or points.shape[1] != 2 or inside.shape != points.shape[:1]:
                raise ValueError(
                    "expected levels to be points [P, 2] and inside [P] of one image, but got "
                    f"{list(points.shape)} and {list(inside.shape)}"
                )


def sampling_figure(networks: Mapping[str, Sequence[SampledUnit]]) -> Figure:
    """Figure 6: sampling locations of units, three to a row; a row for each network.

    Args:
        networks: by name, the same units of each: in the paper one on the background, on a small
            and on a large object of an image, then of the next image.
    Raises:
        ValueError: if there are no units, or the networks have different numbers of them.
    """
    count = canvas.same_number(networks)
    rows, columns = len(networks) * -(-count // 3), min(count, 3)
    panel = 8 / columns * canvas.aspect(unit.image for units in networks.values() for unit in units)
    figure = canvas.blank(width=8, height=panel * rows + 0.8)
    draw_sampling_grid(figure, networks)
    return figure


def draw_sampling_grid(figure: FigureBase, networks: Mapping[str, Sequence[SampledUnit]]) -> None:
    """Fills a figure, or a part of one, as `sampling_figure` does."""
    count = canvas.same_number(networks)
    groups = -(-count // 3)
    axes = canvas.grid(figure, len(networks) * groups, min(count, 3))
    for place, (name, units) in enumerate(networks.items()):
        for number, unit in enumerate(units):
            group, column = divmod(number, 3)
            one = axes[group * len(networks) + place, column]
            draw_sampled_unit(one, unit)
            if place == 0:
                one.set_title(unit.title, fontsize=canvas.TEXT)
            if column == 0 and len(networks) > 1:
                one.set_ylabel(name, fontsize=canvas.TEXT)
    for unused in axes[:, count - 3 * (groups - 1) :][-len(networks) :].flat:
        unused.set_visible(False)
    canvas.legend(figure, _level_handles([unit for units in networks.values() for unit in units]))


def draw_sampled_unit(axes: Axes, unit: SampledUnit) -> None:
    """The samples of one unit over its dimmed image; faint outside the map."""
    draw_image(axes, unit.image)
    # The lowest map first: where points coincide, as in a regular grid, the fewer stay visible.
    for level, (color, size) in reversed(list(zip(unit.levels, _LEVELS, strict=False))):
        scatter(axes, level, color, size)
    draw_center(axes, unit.center)


def draw_center(axes: Axes, center: tuple[float, float], style: Marker = UNIT) -> None:
    """The marker of a unit."""
    axes.plot(*reversed(center), **style)


def draw_image(axes: Axes, image: Tensor) -> None:
    """A dimmed image with a margin around it."""
    axes.imshow(canvas.dimmed(image))
    add_margin(axes, image)


def add_margin(axes: Axes, image: Tensor) -> None:
    """Extends the axes around an image."""
    height, width = image.shape[1:]
    axes.set_facecolor(canvas.OUTSIDE)
    axes.set_xlim(-_MARGIN * width, (1 + _MARGIN) * width)
    axes.set_ylim((1 + _MARGIN) * height, -_MARGIN * height)


def scatter(axes: Axes, samples: SamplingLocations, color: str, size: float) -> None:
    """Points as discs of a diameter in points."""
    y, x = samples.points.cpu().numpy().T
    inside = samples.inside.cpu().numpy()
    colors = np.where(inside[:, None], to_rgba(color), to_rgba(color, _FAINT))
    edges = np.where(inside[:, None], to_rgba(BLACK), to_rgba(BLACK, _FAINT))
    axes.scatter(
        x,
        y,
        size**2,
        colors,
        edgecolors=edges,  # pyright: ignore[reportArgumentType] (colors [P, 4] are accepted)
        linewidths=0.1 * size,
        rasterized=len(x) > _CLOUD,
    )


def contact_sheet_figure(
    images: Mapping[str, Sequence[SampledUnit]], *, columns: int = 4
) -> Figure:
    """Many images, each with the samples of a few units in the lowest map.

    Args:
        images: units of each image by the image's name; each `title` among them has a color.
        columns: number of images in a row.
    Raises:
        ValueError: if there are no images, or one has no unit.
    """
    if not images or not all(images.values()):
        raise ValueError("expected images to hold at least one image, and a unit in each")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    panel = 2.8 * canvas.aspect(units[0].image for units in images.values()) + 0.3
    figure = canvas.blank(width=2.8 * columns, height=panel * rows + 0.4)
    axes = canvas.grid(figure, rows, columns, used=len(images))
    titles = dict.fromkeys(unit.title for units in images.values() for unit in units)
    styles = dict(zip(titles, itertools.cycle(_KINDS), strict=False))
    for one, (name, units) in zip(axes.flat, images.items(), strict=False):
        draw_image(one, units[0].image)
        one.set_title(name, fontsize=canvas.TEXT - 3)
        for unit in units:
            scatter(one, unit.levels[-1], styles[unit.title]["color"], 1.4)
        for unit in units:
            draw_center(one, unit.center, styles[unit.title])
    canvas.legend(
        figure,
        [Line2D([], [], label=title, linestyle="none", **styles[title]) for title in titles],
    )
    return figure


def unit_handle() -> Line2D:
    """The legend's entry of a unit."""
    return Line2D([], [], linestyle="none", label="unit", **UNIT)


def dot_handle(label: str, color: str, size: float) -> Line2D:
    """The legend's entry of samples."""
    return Line2D(
        *([], []),
        linestyle="none",
        label=label,
        marker="o",
        color=color,
        markersize=size,
        markeredgecolor=BLACK,
        markeredgewidth=0.5,
    )


def _level_handles(units: Sequence[SampledUnit]) -> list[Artist]:
    depth = max(len(unit.levels) for unit in units)
    names = ("samples", "one layer below", "two below", "three below")[:depth]
    handles: list[Artist] = [unit_handle()]
    for level, (name, (color, size)) in enumerate(zip(names, _LEVELS, strict=False)):
        counts = {len(unit.levels[level].points) for unit in units if level < len(unit.levels)}
        number = f"{counts.pop()} " if len(counts) == 1 else ""
        handles.append(dot_handle(f"{number}{name}", color, max(size, 2)))
    return handles
