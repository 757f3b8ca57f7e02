"""Results: as tables to read, as a JSON file that says what they were measured on, as pictures."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deformnet.ops import cpu
from deformnet.runs import machine, replacing, versions, write_json
from deformnet.timing import Timing

# Told apart by colour-blind readers (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


@dataclass(frozen=True)
class Table:
    """How many times as long as `base` others take; a row for each case, by name."""

    title: str
    base: str
    rows: dict[str, dict[str, Timing]]

    @property
    def others(self) -> list[str]:
        """All names but that of the base, also of those that some rows lack."""
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
            f"\n{self.title}: milliseconds of {self.base}, and how many times as long others take",
            "(medians, in brackets the 20 % and 80 % quantiles)\n",
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
        rounds = len(next(iter(next(iter(self.rows.values())).values())).rounds)
        return {"base": self.base, "rounds": rounds, "rows": rows, "geometric means": means}

    def draw(self) -> Figure:
        """Bars of the ratios with their quantiles, and the base as a line at 1."""
        figure = Figure(
            (8, 0.8 + 0.2 * len(self.rows) * (1 + len(self.others))), layout="constrained"
        )
        axes: Axes = figure.subplots()
        height = 0.8 / len(self.others)
        for i, name in enumerate(self.others):
            places, ratios = [], []
            for j, row in enumerate(self.rows):
                if name in self.rows[row]:
                    places.append(j + i * height - 0.4 + height / 2)
                    ratios.append(self.ratio(row, name))
            medians = [ratio.median for ratio in ratios]
            low = [ratio.median - ratio.quantile(0.2) for ratio in ratios]
            high = [ratio.quantile(0.8) - ratio.median for ratio in ratios]
            lengths = [median - 1 for median in medians]
            colour = COLOURS[i % len(COLOURS)]
            axes.barh(places, lengths, height, left=1, xerr=(low, high), label=name, color=colour)
            for place, ratio in zip(places, ratios, strict=True):
                end = 1.03 * max(1, ratio.quantile(0.8))
                axes.text(end, place, f"{ratio.median:.2f}", va="center", size=7)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(
            lambda x, _: f"{x:g}" if f"{x:g}".strip("0.") in "25" else ""
        )
        axes.set_yticks(range(len(self.rows)), list(self.rows))
        axes.invert_yaxis()
        axes.set_xlabel(f"times as long as {self.base}")
        axes.set_title(self.title)
        figure.legend(loc="outside lower center", ncols=len(self.others), fontsize=8)
        return figure


def conditions(packages: Sequence[str] = ()) -> dict[str, object]:
    """What figures were measured on, and with; under a load of others they mean little."""
    return {
        "machine": machine(),
        "instruction set": cpu.instruction_set(),
        "load average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | {name: metadata.version(name) for name in packages},
    }


def describe(found: dict[str, object]) -> str:
    """The conditions in one line."""
    listed = " ".join(f"{k} {v}" for k, v in found["versions"].items())  # pyright: ignore
    load = f"load {found['load average']:.1f} at the start"
    return f"{found['machine']}, {found['instruction set']} kernels, {load}; {listed}"


def save(
    out: Path,
    name: str,
    found: dict[str, object],
    tables: Sequence[Table],
    more: Mapping[str, object] | None = None,
) -> None:
    """OUT/NAME.json, and a picture for each table beside it."""
    content = found | {table.title: table.to_dict() for table in tables} | dict(more or {})
    write_json(out / f"{name}.json", content)
    for table in tables:
        picture = f"{name} {table.title}.png".replace(",", "").replace(" ", "-")
        save_figure(out / picture, table.draw)


def save_figure(path: Path, draw: Callable[[], Figure]) -> None:
    with replacing(path) as file:
        draw().savefig(file, format="png", dpi=110)


def _spread(timing: Timing, scale: float = 1.0) -> str:
    def short(value: float) -> str:
        return f"{scale * value:.3g}" if scale * value < 1 else f"{scale * value:.2f}"

    return f"{short(timing.median)} ({short(timing.quantile(0.2))}-{short(timing.quantile(0.8))})"


def summary(timing: Timing, scale: float = 1.0) -> dict[str, float]:
    """The median, the 20 % and 80 % quantiles and the least, times `scale`."""
    values = {
        "median": timing.median,
        "p20": timing.quantile(0.2),
        "p80": timing.quantile(0.8),
        "min": timing.fastest,
    }
    return {name: float(f"{scale * value:.4g}") for name, value in values.items()}
