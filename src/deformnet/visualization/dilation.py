"""Effective dilation by object size (Dai et al. 2017, Table 2)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from deformnet._text import Table
from deformnet.analysis import LayerDilation, MeanStd
from deformnet.visualization.canvas import TEXT, blank, require_some
from deformnet.visualization.colors import BLACK, BLUE, GREEN, SKY, VERMILLION, YELLOW

_COLUMNS = ("small", "medium", "large", "background")
# One per layer; they differ in shape, too.
_STYLES = (
    *((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (SKY, "D"), (BLACK, "v"), (YELLOW, "P")),
)


def dilation_table(layers: Sequence[LayerDilation]) -> str:
    """Table 2 as text: mean, standard deviation and number of filters.

    Raises:
        ValueError: if there are no layers.
    """
    require_some("layers", layers)
    rows = [(layer.layer, *map(dilation_cell, layer.by_size)) for layer in layers]
    return str(Table("", ("layer", *_COLUMNS), rows))


def dilation_cell(value: MeanStd) -> str:
    """A cell of the table: "5.27 ± 3.31 (1,204)"; "-" without filters."""
    if value.mean is None or value.std is None:
        return "-"
    return f"{value.mean:.2f} ± {value.std:.2f} ({value.count:,})"


def dilation_figure(layers: Sequence[LayerDilation]) -> Figure:
    """Table 2 as a plot: mean and standard deviation by layer and object size.

    Raises:
        ValueError: if there are no layers.
    """
    require_some("layers", layers)
    figure = blank(width=8, height=4)
    axes = figure.subplots()
    positions = np.arange(len(_COLUMNS))
    distance = 0.5 / len(layers)
    for number, layer in enumerate(layers):
        color, marker = _STYLES[number % len(_STYLES)]
        # float() makes NaN of None.
        means, deviations = np.array([(s.mean, s.std) for s in layer.by_size], dtype=float).T
        x = positions + distance * (number - (len(layers) - 1) / 2)
        axes.errorbar(
            x,
            means,
            deviations,
            color=color,
            marker=marker,
            markersize=7,
            markeredgecolor=BLACK,
            linestyle="none",
            capsize=3,
            label=layer.layer,
        )
        # Sizes have an order, to which the background does not belong.
        axes.plot(x[:3], means[:3], color=color, linewidth=1)
    axes.set_xticks(positions, _COLUMNS, fontsize=TEXT)
    axes.axvline(2.5, color="#808080", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.5, len(_COLUMNS) - 0.5)
    axes.set_ylabel("effective dilation (cells)", fontsize=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(layers)), frameon=False)
    return figure
