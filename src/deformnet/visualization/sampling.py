"""Sampling locations of units over their image (Dai et al. 2017, Figure 6)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from torch import Tensor

from deformnet.analysis import SamplingLocations
from deformnet.visualization.canvas import (
    BLACK,
    GREEN,
    OUTSIDE,
    SKY,
    TEXT,
    VERMILLION,
    WHITE,
    YELLOW,
    blank,
    dulled,
    grid,
    legend,
    require_image,
    tallness,
)

_MARGIN = 0.15  # shown around an image, as a share of its side
_FAINT = 0.3  # opacity of what lies where there is nothing to read
_CLOUD = 200  # from so many points on they are a picture, also in an SVG
# Colour and diameter in points of the samples in the first map below the unit, the next, ...
_LEVELS = ((WHITE, 5.5), (YELLOW, 3.2), (VERMILLION, 1.6), (GREEN, 1.0))
UNIT: dict[str, Any] = {
    "marker": "P",
    "color": SKY,
    "markersize": 10,
    "markeredgecolor": BLACK,
}
# In a contact sheet they differ in shape, too.
_IN_TURN: tuple[dict[str, Any], ...] = (
    {"color": YELLOW, "marker": "P", "markersize": 8},
    {"color": SKY, "marker": "o", "markersize": 6},
    {"color": VERMILLION, "marker": "s", "markersize": 6},
    {"color": GREEN, "marker": "^", "markersize": 7},
)


@dataclass(frozen=True)
class SampledUnit:
    """A unit over an image, with what it samples.

    Attributes:
        image: uint8 [3, H, W].
        what: what is there.
        centre: (y, x) of the unit in the image; whole numbers are centres of pixels.
        levels: what it samples one layer down, two, ... (at most four), in pixels of the image:
            the points [P, 2] and whether they are inside [P].
    Raises:
        ValueError: if one of them has another shape, or there are no levels or too many.
    """

    image: Tensor
    what: str
    centre: tuple[float, float]
    levels: Sequence[SamplingLocations]

    def __post_init__(self) -> None:
        require_image(self.image)
        if not 1 <= len(self.levels) <= len(_LEVELS):
            raise ValueError(f"levels: wanted 1 to {len(_LEVELS)}, got {len(self.levels)}")
        for points, inside in self.levels:
            if points.ndim != 2 or points.shape[1] != 2 or inside.shape != points.shape[:1]:
                raise ValueError(
                    "levels: wanted points [P, 2] and inside [P] (of one image), got "
                    f"{list(points.shape)} and {list(inside.shape)}"
                )


def sampling_figure(looks: Mapping[str, Sequence[SampledUnit]]) -> Figure:
    """Figure 6: where units look, three to a row; a row for each network.

    Args:
        looks: for each network by name the same units, as a rule of an image on the background,
            a small and a large object, then of the next image.
    Raises:
        ValueError: if there are no looks, or the networks have different numbers of them.
    """
    count = _same_number(looks)
    rows, columns = len(looks) * -(-count // 3), min(count, 3)
    panel = 8 / columns * tallness(look.image for some in looks.values() for look in some)
    figure = blank(width=8, height=panel * rows + 0.8)
    draw_sampling_grid(figure, looks)
    return figure


def draw_sampling_grid(figure: FigureBase, looks: Mapping[str, Sequence[SampledUnit]]) -> None:
    """Fills a figure or a part of one, as `sampling_figure` does."""
    count = _same_number(looks)
    groups = -(-count // 3)
    axes = grid(figure, len(looks) * groups, min(count, 3))
    for place, (name, some) in enumerate(looks.items()):
        for number, look in enumerate(some):
            group, column = divmod(number, 3)
            one = axes[group * len(looks) + place, column]
            draw_sampled_unit(one, look)
            if place == 0:
                one.set_title(look.what, fontsize=TEXT)
            if column == 0 and len(looks) > 1:
                one.set_ylabel(name, fontsize=TEXT)
    for unused in axes[:, count - 3 * (groups - 1) :][-len(looks) :].flat:
        unused.set_visible(False)
    legend(figure, _level_handles([look for some in looks.values() for look in some]))


def draw_sampled_unit(axes: Axes, look: SampledUnit) -> None:
    """The samples of one unit over its dulled image; faint where there is nothing to read."""
    draw_image(axes, look.image)
    # The lowest map first: of the points that coincide, as all of a plain grid do, the few show.
    for level, (colour, size) in reversed(list(zip(look.levels, _LEVELS, strict=False))):
        scatter(axes, level, colour, size)
    y, x = look.centre
    axes.plot(x, y, **UNIT)


def draw_image(axes: Axes, image: Tensor) -> None:
    """A dulled image with room around it."""
    axes.imshow(dulled(image))
    leave_room(axes, image)


def leave_room(axes: Axes, image: Tensor) -> None:
    """Shows what is around an image, as far as its margin goes."""
    height, width = image.shape[1:]
    axes.set_facecolor(OUTSIDE)
    axes.set_xlim(-_MARGIN * width, (1 + _MARGIN) * width)
    axes.set_ylim((1 + _MARGIN) * height, -_MARGIN * height)


def scatter(axes: Axes, found: SamplingLocations, colour: str, size: float) -> None:
    """Points as discs of a diameter in points."""
    y, x = found.points.cpu().numpy().T
    inside = found.inside.cpu().numpy()
    colours = np.where(inside[:, None], to_rgba(colour), to_rgba(colour, _FAINT))
    edges = np.where(inside[:, None], to_rgba(BLACK), to_rgba(BLACK, _FAINT))
    axes.scatter(
        x,
        y,
        size**2,
        colours,
        edgecolors=edges,  # pyright: ignore[reportArgumentType] (colours [P, 4] are taken)
        linewidths=0.1 * size,
        rasterized=len(x) > _CLOUD,
    )


def contact_sheet_figure(
    images: Mapping[str, Sequence[SampledUnit]], *, columns: int = 4
) -> Figure:
    """Many images, each with what a few of its units sample in the lowest map.

    Args:
        images: for each image by name its units; there is a colour for each thing that they look
            at, by its name in `what`.
        columns: images in a row.
    Raises:
        ValueError: if there are no images, or one has no unit.
    """
    if not images or not all(images.values()):
        raise ValueError("images: wanted at least one image, and a unit in each")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    panel = 2.8 * tallness(looks[0].image for looks in images.values()) + 0.3
    figure = blank(width=2.8 * columns, height=panel * rows + 0.4)
    axes = grid(figure, rows, columns)
    for one in axes.flat[len(images) :]:
        one.set_visible(False)
    kinds = dict.fromkeys(look.what for looks in images.values() for look in looks)
    styles = dict(zip(kinds, itertools.cycle(_IN_TURN), strict=False))
    for one, (name, looks) in zip(axes.flat, images.items(), strict=False):
        draw_image(one, looks[0].image)
        one.set_title(name, fontsize=TEXT - 3)
        for look in looks:
            scatter(one, look.levels[-1], styles[look.what]["color"], 1.4)
        for look in looks:
            y, x = look.centre
            one.plot(x, y, **UNIT | styles[look.what])
    marks = {**UNIT, "linestyle": "none"}
    legend(figure, [Line2D([], [], label=what, **marks | styles[what]) for what in kinds])
    return figure


def _same_number(looks: Mapping[str, Sequence[SampledUnit]]) -> int:
    counts = {name: len(some) for name, some in looks.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"looks: wanted the same units of each network, got {counts}")
    return next(iter(counts.values()))


def _level_handles(looks: Sequence[SampledUnit]) -> list[Artist]:
    unit = Line2D([], [], linestyle="none", label="unit", **UNIT)
    depth = max(len(look.levels) for look in looks)
    dots = []
    for level, below in enumerate(("samples", "one layer below", "two below", "three below")):
        if level == depth:
            break
        counts = {len(look.levels[level].points) for look in looks if level < len(look.levels)}
        number = f"{counts.pop()} " if len(counts) == 1 else ""
        colour, size = _LEVELS[level]
        dots.append(
            Line2D(
                *([], []),
                linestyle="none",
                label=f"{number}{below}",
                marker="o",
                color=colour,
                markersize=max(size, 2),
                markeredgecolor=BLACK,
                markeredgewidth=0.5,
            )
        )
    return [unit, *dots]
