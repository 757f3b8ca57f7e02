"""Samples of two layers on two objects (Dai et al. 2017, Figure 5), and effective fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from deformnet.analysis import EffectiveField, SamplingLocations
from deformnet.visualization import canvas, sampling
from deformnet.visualization.colors import SKY, VERMILLION, WHITE, YELLOW

_SAMPLE, _BELOW = 5.0, 3.5  # diameters in points
_HIGHLIGHT = VERMILLION
_PERCENTILE = 99.5  # of the gradients, at which the color saturates


def two_layer_figure(networks: Mapping[str, Sequence[sampling.SampledUnit]]) -> Figure:
    """Figure 5: samples of two layers of filters on two objects of different scale and shape.

    A column for each network. Top: two units. Middle: their samples in the map below, one of them
    highlighted for each unit. Bottom: the samples of all these places in the map below that, with
    those of the highlighted places highlighted.

        >>> figure = two_layer_figure({"baseline": regular, "deformable": units})
        >>> save_figure(figure, "figure5.png")

    Args:
        networks: by name, the baseline first as in the paper: two units of one image, with two
            levels or more. The samples of a network without offsets are
            `SamplingStack.locations(unit, zero_offsets=True)`.
    Raises:
        ValueError: if there are not two units, or they have one level.
    """
    canvas.require_some("networks", networks)
    for name, units in networks.items():
        if len(units) != 2:
            raise ValueError(f"expected two units of network {name}, but got {len(units)}")
        if min(len(unit.levels) for unit in units) < 2:
            raise ValueError(f"expected two levels of samples of network {name}, but got one")
    panel = 4 * canvas.aspect(units[0].image for units in networks.values())
    figure = canvas.blank(width=4 * len(networks) + 0.3, height=3 * panel + 0.8)
    axes = canvas.grid(figure, 3, len(networks))
    labels = ("two units", "their samples", "two levels of samples")
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label, fontsize=canvas.TEXT)
    for letter, column, (name, units) in zip("abcdefgh", axes.T, networks.items(), strict=False):
        column[0].set_title(f"({letter}) {name}", fontsize=canvas.TEXT)
        for one in column:
            sampling.draw_image(one, units[0].image)
        for unit, first in zip(units, (True, False), strict=True):
            _draw_two_levels(column, unit, first=first)
    handles = (
        ("samples", WHITE, _SAMPLE),
        ("samples of these", YELLOW, _BELOW),
        ("one of them, and its samples", _HIGHLIGHT, _SAMPLE),
    )
    canvas.legend(
        figure, [sampling.unit_handle(), *(sampling.dot_handle(*handle) for handle in handles)]
    )
    return figure


def _draw_two_levels(column: Sequence[Axes], unit: sampling.SampledUnit, *, first: bool) -> None:
    """A unit in three maps; its first or last sample inside the map is highlighted."""
    top, middle, bottom = column
    samples, below = unit.levels[:2]
    count = len(samples.points)
    each = len(below.points) // count
    inside = samples.inside.nonzero().flatten().tolist() or range(count)
    chosen = inside[0] if first else inside[-1]
    of_chosen = slice(chosen * each, (chosen + 1) * each)  # taps of the top layer vary slowest
    sampling.draw_center(top, unit.center)
    sampling.scatter(middle, samples, WHITE, _SAMPLE)
    highlighted = SamplingLocations(*(part[chosen : chosen + 1] for part in samples))
    sampling.scatter(middle, highlighted, _HIGHLIGHT, _SAMPLE + 1)
    sampling.scatter(bottom, below, YELLOW, _BELOW)
    samples_of_chosen = SamplingLocations(*(part[of_chosen] for part in below))
    sampling.scatter(bottom, samples_of_chosen, _HIGHLIGHT, _BELOW + 0.5)
    _connect(top, unit.center, middle, samples.points, SKY)
    _connect(middle, highlighted.points[0].tolist(), bottom, samples_of_chosen.points, _HIGHLIGHT)


def _connect(above: Axes, unit: Sequence[float], below: Axes, points: Tensor, color: str) -> None:
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
                color=color,
                linewidth=0.7,
                alpha=0.6,
                in_layout=False,
            )
        )


@dataclass(frozen=True)
class ReceptiveFieldMap:
    """A unit over its image, with its effective receptive field.

    Attributes:
        image: uint8 [3, H, W], of the size of the field's gradient.
        title: name of what is there, such as "background".
        center: (y, x) of the unit in the image; integers are pixel centers.
        field: effective receptive field of the unit.
    Raises:
        ValueError: if the image has another type, shape or size.
    """

    image: Tensor
    title: str
    center: tuple[float, float]
    field: EffectiveField

    def __post_init__(self) -> None:
        canvas.require_image(self.image)
        if self.image.shape[1:] != self.field.gradient.shape:
            raise ValueError(
                "expected image to have the size of the gradient, "
                f"{list(self.field.gradient.shape)}, but got {list(self.image.shape[1:])}"
            )


def receptive_field_figure(networks: Mapping[str, Sequence[ReceptiveFieldMap]]) -> Figure:
    """Gradients of units with respect to the image; a row for each network.

    Brighter pixels have larger gradients; the square around a unit holds 95 % of its gradient.

    Args:
        networks: by name, the same units of each.
    Raises:
        ValueError: if there are no units, or the networks have different numbers of them.
    """
    count = canvas.same_number(networks)
    panel = 2.7 * canvas.aspect(one.image for fields in networks.values() for one in fields)
    figure = canvas.blank(width=2.7 * count, height=panel * len(networks) + 0.7)
    axes = canvas.grid(figure, len(networks), count)
    for row, (name, fields) in zip(axes, networks.items(), strict=True):
        row[0].set_ylabel(name, fontsize=canvas.TEXT)
        for one, field in zip(row, fields, strict=True):
            _draw_field(one, field)
    for one, field in zip(axes[0], next(iter(networks.values())), strict=True):
        one.set_title(field.title, fontsize=canvas.TEXT)
    canvas.legend(
        figure, [sampling.unit_handle(), Line2D([], [], color=SKY, label="95 % of the gradient")]
    )
    return figure


def _draw_field(axes: Axes, unit: ReceptiveFieldMap) -> None:
    gradient = unit.field.gradient.float().cpu().numpy()
    most = np.percentile(gradient[gradient > 0], _PERCENTILE)
    # The root makes the surroundings of a narrow peak visible.
    strength = np.sqrt(np.clip(gradient / most, 0, 1))[..., None]
    gray = 0.35 * canvas.pixels(unit.image).mean(-1, keepdims=True)
    axes.imshow((1 - strength) * gray + strength * np.array([0.94, 0.89, 0.26]))
    y, x = unit.center
    side = unit.field.side
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, facecolor="none", edgecolor=SKY)
    )
    sampling.draw_center(axes, unit.center)
    sampling.add_margin(axes, unit.image)
