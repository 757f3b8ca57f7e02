"""Results as text tables, as JSON files with their conditions, and as figures."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from deformnet._files import replacing, write_json
from deformnet.engine.runs import machine, versions
from deformnet.ops import cpu
from deformnet.paper.timing import Timing
from deformnet.visualization.colors import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)


@dataclass(frozen=True)
class Table:
    """Times relative to `base`, with one row per case."""

    title: str
    base: str
    rows: dict[str, dict[str, Timing]]

    @property
    def others(self) -> list[str]:
        """All names except the base, including those missing in some rows."""
        names = dict.fromkeys(name for times in self.rows.values() for name in times)
        return [name for name in names if name != self.base]

    def ratio(self, row: str, name: str) -> Timing:
        return self.rows[row][name].relative_to(self.rows[row][self.base])

    def mean(self, name: str) -> float | None:
        """The geometric mean of the median ratios; None where a row is missing."""
        if any(name not in times for times in self.rows.values()):
            return None
        product = 1.0
        for row in self.rows:
            product *= self.ratio(row, name).median
        return product ** (1 / len(self.rows))

    def markdown(self) -> str:
        lines = [
            f"\n{self.title}: milliseconds of {self.base}, and time of the others relative to it",
            "(medians, with 20% and 80% quantiles in parentheses)\n",
            f"| | {self.base}, ms | " + " | ".join(self.others) + " |",
            "|---" * (2 + len(self.others)) + "|",
        ]
        for row, times in self.rows.items():
            cells = [_spread(times[self.base], 1e3)]
            for name in self.others:
                cells.append(_spread(self.ratio(row, name)) if name in times else "-")
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        means = ((self.mean(name), name) for name in self.others)
        cells = ["-" if mean is None else f"{mean:.3g}" for mean, _ in means]
        lines.append("| geometric mean | | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        rows = {}
        for row, times in self.rows.items():
            rows[row] = {
                name: {"ms": summary(timing, 1e3), "ratio": summary(self.ratio(row, name))}
                for name, timing in times.items()
            }
        means = {name: self.mean(name) for name in self.others}
        rounds = min(len(times[self.base].rounds) for times in self.rows.values())
        return {"base": self.base, "rounds": rounds, "rows": rows, "geometric means": means}


def draw(title: str, table: Mapping[str, Any]) -> Figure:
    """Bars of a table's ratios with their quantiles, from a line at 1 for the base.

    Args:
        table: as returned by `Table.to_dict` and stored in the file.
    """
    rows, base = table["rows"], table["base"]
    names = [name for name in table["geometric means"] if name != base]
    figure = Figure((8, 0.9 + 0.2 * len(rows) * (1 + len(names))), layout="constrained")
    axes: Axes = figure.subplots()
    ratios = [times[name]["ratio"] for times in rows.values() for name in names if name in times]
    # A wide range needs a logarithmic scale, on which bars start at the base.
    largest = max(1.0, *(ratio["p80"] for ratio in ratios))
    far = largest > 4
    begin, height = float(far), 0.8 / len(names)
    for i, name in enumerate(names):
        color = COLORS[i % len(COLORS)]
        axes.barh(0, 0, left=1, color=color, label=name)
        for j, times in enumerate(rows.values()):
            if name not in times:
                continue
            ratio = times[name]["ratio"]
            middle, low, high = ratio["median"], ratio["p20"], ratio["p80"]
            place = j + i * height - 0.4 + height / 2
            error = ([middle - low], [high - middle])
            axes.barh(place, middle - begin, height, left=begin, xerr=error, color=color)
            axes.annotate(
                f"{middle:.3g}" if middle < 1 else f"{middle:.2f}",
                (max(high, begin), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=7,
            )
    axes.axvline(1, color="black", linewidth=1)
    if far:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(begin, (2.0 if far else 1.15) * largest)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"time relative to {base}; shorter is better; lines: 20% to 80%")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return figure


def conditions(packages: Sequence[str] = ()) -> dict[str, object]:
    """Machine, versions and load; results under high load are unreliable."""
    return {
        "machine": machine(),
        "instruction set": cpu.instruction_set(),
        "PyTorch CPU capability": torch.backends.cpu.get_cpu_capability(),
        "oneDNN max CPU ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "load average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | {name: metadata.version(name) for name in packages},
    }


def describe(found: dict[str, object]) -> str:
    """The conditions in one line."""
    listed = " ".join(f"{k} {v}" for k, v in found["versions"].items())  # pyright: ignore
    load = f"load {found['load average']:.1f} at the start"
    sets = f"{found['instruction set']} kernels"
    sets += f", PyTorch CPU capability {found['PyTorch CPU capability']}"
    if found["oneDNN max CPU ISA"]:
        sets += f", oneDNN limited to {found['oneDNN max CPU ISA']}"
    return f"{found['machine']}, {sets}, {load}; {listed}"


def save(
    out: Path,
    name: str,
    found: dict[str, object],
    tables: Sequence[Table],
    more: Mapping[str, object] | None = None,
) -> None:
    """Writes OUT/NAME.json, and a figure for each table."""
    content = found | {table.title: table.to_dict() for table in tables} | dict(more or {})
    write_json(out / f"{name}.json", content)
    for table in tables:
        picture = f"{name} {table.title}.png".replace(",", "").replace(" ", "-")
        heading = f"{name.replace('_', ' ')}: {table.title}"
        save_figure(out / picture, lambda: draw(heading, table.to_dict()))  # noqa: B023 (called at once)


def save_figure(path: Path, draw: Callable[[], Figure]) -> None:
    with replacing(path) as file:
        draw().savefig(file, format="png", dpi=110)


def _spread(timing: Timing, scale: float = 1.0) -> str:
    def short(value: float) -> str:
        return f"{scale * value:.3g}" if scale * value < 1 else f"{scale * value:.2f}"

    return f"{short(timing.median)} ({short(timing.quantile(0.2))}-{short(timing.quantile(0.8))})"


def summary(timing: Timing, scale: float = 1.0) -> dict[str, float]:
    """The summary of a timing times `scale`, in significant digits."""
    return {name: float(f"{scale * value:.4g}") for name, value in timing.summary().items()}
