"""Results of the demo: gains and tables, for the terminal and the page."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deformnet._text import Table
from deformnet.analysis import LayerDilation
from deformnet.visualization import dilation_cell

TEMPLATE = Path(__file__).parent / "templates" / "demo.html"
PLAIN, DEFORMABLE = "plain", "deformable"

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Scores in percent of each seed, by metric ("DeepLab, mean IoU") and network ("plain")."""


class Gain(NamedTuple):
    """Score of the deformable network minus that of another, in points, for each seed."""

    metric: str
    over: str
    points: Sequence[float]

    @property
    def ahead(self) -> int:
        """Number of seeds for which the deformable network is ahead."""
        return sum(it > 0 for it in self.points)

    @property
    def in_every_seed(self) -> bool:
        return self.ahead == len(self.points)

    def __str__(self) -> str:
        seeds = len(self.points)
        return (
            f"{self.metric}: {_spread(self.points, '+')} points over the {self.over} network, "
            f"ahead in {self.ahead} of {seeds} seed{'s' if seeds > 1 else ''}"
        )


def gains(scores: Scores) -> list[Gain]:
    """The gains of deformable networks over all others."""
    return [
        Gain(metric, name, _differences(of_network[DEFORMABLE], own))
        for metric, of_network in scores.items()
        for name, own in of_network.items()
        if name != DEFORMABLE
    ]


def headline(found: Sequence[Gain]) -> str:
    """The result in one line."""
    clear = sum(gain.in_every_seed for gain in found)
    if clear == len(found):
        return "Deformable networks lead for every seed in every comparison"
    if clear:
        return f"Deformable networks lead for every seed in {clear} of {len(found)} comparisons"
    return "No clear gain: in no comparison does the deformable network lead for every seed"


def score_table(scores: Scores, first_seed: int) -> Table:
    """Scores of each seed, mean and standard deviation, and the gain over the plain network."""
    seeds = max(len(own) for of_network in scores.values() for own in of_network.values())
    rows = []
    for metric, of_network in scores.items():
        for name, own in of_network.items():
            gain = "" if name == PLAIN else _spread(_differences(own, of_network[PLAIN]), "+")
            each = [f"{one:.1f}" for one in own]
            rows.append([f"{metric}: {name}", *each, _spread(own), gain])
    header = ["percent", *(f"seed {first_seed + place}" for place in range(seeds)), "mean", "gain"]
    return Table("", header, rows)


def size_table(layers: Sequence[LayerDilation]) -> Table:
    """Table 2, the top layer first."""
    rows = [
        (it.layer.removeprefix("backbone."), *map(dilation_cell, it.by_size))
        for it in reversed(layers)
    ]
    return Table("", ("layer", "small", "medium", "large", "background"), rows)


def _differences(own: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(own, others, strict=True)]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation; only the mean for a single value."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"
