"""Effective dilation by size of object (Dai et al. 2017, Table 2)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from deformnet.analysis import LayerDilation, Spread
from deformnet.visualization.canvas import BLACK, BLUE, GREEN, SKY, TEXT, VERMILLION, YELLOW, blank

_COLUMNS = ("small", "medium", "large", "background")
# One for each layer: they differ in shape, too.
_STYLES = (
    *((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (SKY, "D"), (BLACK, "v"), (YELLOW, "P")),
)


def dilation_table(rows: Sequence[LayerDilation]) -> str:
    """Table 2 as text: mean and deviation, and of how many filters.

    Raises:
        ValueError: if there are no rows.
    """
    _require_rows(rows)
    lines = [("layer", *_COLUMNS)]
    lines += [(row.layer, *(dilation_cell(spread) for spread in _spreads(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def dilation_cell(spread: Spread) -> str:
    """A cell of the table: "5.27 ± 3.31 (1,204)"; "-" if there are no filters."""
    if spread.mean is None or spread.std is None:
        return "-"
    return f"{spread.mean:.2f} ± {spread.std:.2f} ({spread.count:,})"


def dilation_figure(rows: Sequence[LayerDilation]) -> Figure:
    """Table 2 as a plot: mean and deviation for each layer and size of object.

    Raises:
        ValueError: if there are no rows.
    """
    _require_rows(rows)
    figure = blank(width=8, height=4)
    axes = figure.subplots()
    places = np.arange(len(_COLUMNS))
    apart = 0.5 / len(rows)
    for number, row in enumerate(rows):
        colour, marker = _STYLES[number % len(_STYLES)]
        spreads = _spreads(row)
        means = np.array([np.nan if s.mean is None else s.mean for s in spreads])
        deviations = np.array([np.nan if s.std is None else s.std for s in spreads])
        x = places + apart * (number - (len(rows) - 1) / 2)
        axes.errorbar(
            x,
            means,
            deviations,
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor=BLACK,
            linestyle="none",
            capsize=3,
            label=row.layer,
        )
        # Sizes have an order; the background is none of them.
        axes.plot(x[:3], means[:3], color=colour, linewidth=1)
    axes.set_xticks(places, _COLUMNS, fontsize=TEXT)
    axes.axvline(2.5, color="#808080", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.5, len(_COLUMNS) - 0.5)
    axes.set_ylabel("effective dilation (cells)", fontsize=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
    return figure


def _spreads(row: LayerDilation) -> tuple[Spread, ...]:
    return row.small, row.medium, row.large, row.background


def _require_rows(rows: Sequence[LayerDilation]) -> None:
    if not rows:
        raise ValueError("rows: wanted at least one layer, got none")
