"""What two layers see on two objects (Dai et al. 2017, Figure 5), and effective fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from deformnet.analysis import EffectiveField, SamplingLocations
from deformnet.visualization.canvas import (
    BLACK,
    SKY,
    TEXT,
    VERMILLION,
    WHITE,
    YELLOW,
    blank,
    grid,
    legend,
    pixels,
    require_image,
    tallness,
)
from deformnet.visualization.sampling import UNIT, SampledUnit, draw_image, leave_room, scatter

_SAMPLE, _BELOW = 5.0, 3.5  # diameters in points
_HIGHLIGHT = VERMILLION
_PERCENTILE = 99.5  # of the gradients, from which on the colour is the strongest


def two_layer_figure(networks: Mapping[str, Sequence[SampledUnit]]) -> Figure:
    """Figure 5: what two layers of filters sample on two objects of different scale and shape.

    A column for each network. Top: two units. Middle: what they sample in the map before; one of
    these places is highlighted for each. Bottom: what all these places sample in the map before
    that, and highlighted, what the highlighted ones do.

        >>> two_layer_figure({"plain": at_rest, "deformable": looks}).savefig("figure5.png")

    Args:
        networks: by name, plain first as in the paper: two looks at the same image, with two levels
            or more. What a network would sample without offsets is
            `SamplingStack.locations(unit, at_rest=True)`.
    Raises:
        ValueError: if there are not two looks, of one image, or they have one level.
    """
    if not networks:
        raise ValueError("networks: wanted at least one, got none")
    for name, looks in networks.items():
        if len(looks) != 2:
            raise ValueError(f"networks: wanted two looks of {name}, got {len(looks)}")
        if min(len(look.levels) for look in looks) < 2:
            raise ValueError(f"networks: wanted two levels of {name}'s looks, got one")
    panel = 4 * tallness(looks[0].image for looks in networks.values())
    figure = blank(width=4 * len(networks) + 0.3, height=3 * panel + 0.8)
    axes = grid(figure, 3, len(networks))
    for row, label in zip(
        axes, ("two units", "their samples", "two levels of samples"), strict=True
    ):
        row[0].set_ylabel(label, fontsize=TEXT)
    for letter, column, (name, looks) in zip("abcdefgh", axes.T, networks.items(), strict=False):
        column[0].set_title(f"({letter}) {name}", fontsize=TEXT)
        for one in column:
            draw_image(one, looks[0].image)
        for look, first in zip(looks, (True, False), strict=True):
            _draw_two_levels(column, look, first=first)
    legend(figure, _field_handles())
    return figure


def _draw_two_levels(column: Sequence[Axes], look: SampledUnit, *, first: bool) -> None:
    """A unit in three maps; highlighted is the first of its samples in the map, or the last."""
    top, middle, bottom = column
    samples, below = look.levels[:2]
    count = len(samples.points)
    each = len(below.points) // count
    within = samples.inside.nonzero().flatten().tolist() or range(count)
    chosen = within[0] if first else within[-1]
    own = slice(chosen * each, (chosen + 1) * each)  # taps of the top layer vary slowest
    y, x = look.centre
    top.plot(x, y, **UNIT)
    scatter(middle, samples, WHITE, _SAMPLE)
    highlighted = SamplingLocations(*(part[chosen : chosen + 1] for part in samples))
    scatter(middle, highlighted, _HIGHLIGHT, _SAMPLE + 1)
    scatter(bottom, below, YELLOW, _BELOW)
    scatter(bottom, SamplingLocations(*(part[own] for part in below)), _HIGHLIGHT, _BELOW + 0.5)
    _join(top, (y, x), middle, samples.points, SKY)
    _join(middle, highlighted.points[0].tolist(), bottom, below.points[own], _HIGHLIGHT)


def _join(above: Axes, unit: Sequence[float], below: Axes, points: Tensor, colour: str) -> None:
    """Lines from a unit of one map to its samples in the next."""
    figure = above.get_figure()
    assert figure is not None
    for y, x in points.tolist():
        figure.add_artist(
            ConnectionPatch(
                (unit[1], unit[0]),
                (x, y),
                *("data", "data"),
                axesA=above,
                axesB=below,
                color=colour,
                linewidth=0.7,
                alpha=0.6,
                in_layout=False,
            )
        )


def _field_handles() -> list[Line2D]:
    def dot(label: str, colour: str, size: float) -> Line2D:
        style = {"marker": "o", "markeredgecolor": BLACK, "markeredgewidth": 0.5}
        return Line2D([], [], linestyle="none", label=label, color=colour, markersize=size, **style)

    return [
        Line2D([], [], linestyle="none", label="unit", **UNIT),
        dot("samples", WHITE, _SAMPLE),
        dot("samples of these", YELLOW, _BELOW),
        dot("one of them, and its samples", _HIGHLIGHT, _SAMPLE),
    ]


@dataclass(frozen=True)
class ReceptiveFieldMap:
    """A unit over an image, with its effective receptive field.

    Attributes:
        image: uint8 [3, H, W], of the size of the field's gradient.
        what: what is there.
        centre: (y, x) of the unit in the image; whole numbers are centres of pixels.
        field: what it looks at.
    Raises:
        ValueError: if the image is none, or of another size.
    """

    image: Tensor
    what: str
    centre: tuple[float, float]
    field: EffectiveField

    def __post_init__(self) -> None:
        require_image(self.image)
        if self.image.shape[1:] != self.field.gradient.shape:
            raise ValueError(
                f"image: wanted the gradient's size {list(self.field.gradient.shape)}, "
                f"got {list(self.image.shape[1:])}"
            )


def receptive_field_figure(networks: Mapping[str, Sequence[ReceptiveFieldMap]]) -> Figure:
    """Where the gradients of units lie in the image; a row for each network.

    The brighter, the larger; the square around a unit holds 95 % of its gradient.

    Args:
        networks: by name, for each the same units.
    Raises:
        ValueError: if there are no units, or the networks have different numbers of them.
    """
    counts = {name: len(heats) for name, heats in networks.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"networks: wanted the same units of each, got {counts}")
    count = next(iter(counts.values()))
    panel = 2.7 * tallness(heat.image for heats in networks.values() for heat in heats)
    figure = blank(width=2.7 * count, height=panel * len(networks) + 0.7)
    axes = grid(figure, len(networks), count)
    for row, (name, heats) in zip(axes, networks.items(), strict=True):
        row[0].set_ylabel(name, fontsize=TEXT)
        for one, heat in zip(row, heats, strict=True):
            _draw_heat(one, heat)
    for one, heat in zip(axes[0], next(iter(networks.values())), strict=True):
        one.set_title(heat.what, fontsize=TEXT)
    square = Line2D([], [], color=SKY, label="95 % of the gradient")
    legend(figure, [Line2D([], [], linestyle="none", label="unit", **UNIT), square])
    return figure


def _draw_heat(axes: Axes, heat: ReceptiveFieldMap) -> None:
    gradient = heat.field.gradient.float().cpu().numpy()
    most = np.percentile(gradient[gradient > 0], _PERCENTILE)
    # Of a peak this narrow the root shows where the rest lies.
    strength = np.sqrt(np.clip(gradient / most, 0, 1))[..., None]
    grey = 0.35 * pixels(heat.image).mean(-1, keepdims=True)
    axes.imshow((1 - strength) * grey + strength * np.array([0.94, 0.89, 0.26]))
    y, x = heat.centre
    side = heat.field.side
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, facecolor="none", edgecolor=SKY)
    )
    axes.plot(x, y, **UNIT)
    leave_room(axes, heat.image)
