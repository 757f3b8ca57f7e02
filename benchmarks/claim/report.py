"""Results of all runs: means and standard deviations over seeds, as tables and a figure."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claim.plan import LAYERS, NETWORKS, VARIANTS, Network, Run, Variant
from benchmarks.grid import cell, over_seeds, spread
from benchmarks.tables import COLORS, save_figure
from deformnet._files import write_json

SCORES: dict[Network, str] = {
    "deeplab": "mean IoU",
    "rfcn": "mean AP at IoU 0.5",
    "deeplab-lite0": "mean IoU",
}
TITLES: dict[Network, str] = {
    "deeplab": "DeepLab",
    "rfcn": "R-FCN",
    "deeplab-lite0": "DeepLab on EfficientNet-Lite0",
}
SIZES = ("small", "medium", "large", "background")


def summarize(results: Sequence[Mapping[str, Any]], network: Network) -> list[dict[str, Any]]:
    """Scores, gain and Table 2 by strength, over the seeds for which both networks are finished."""
    by_run = {Run(**one["run"]): one for one in results if one["run"]["network"] == network}
    rows: list[dict[str, Any]] = []
    for strength in sorted({run.strength for run in by_run}):
        of_variant: dict[Variant, dict[int, Mapping[str, Any]]] = {
            variant: {r.seed: by_run[r] for r in by_run if r[1:3] == (variant, strength)}
            for variant in VARIANTS
        }
        plain, deformable = of_variant["plain"], of_variant["deformable"]
        seeds = sorted(plain.keys() & deformable.keys())
        if not seeds:
            continue
        row: dict[str, Any] = {"strength": strength}
        for variant, found in of_variant.items():
            row[variant] = over_seeds({seed: found[seed]["score"] for seed in seeds})
            times = [found[seed]["seconds per step"] for seed in seeds]
            row[f"{variant} seconds per step"] = statistics.median(times)
        row["gap"] = over_seeds({s: deformable[s]["score"] - plain[s]["score"] for s in seeds})
        row["dilation"] = {
            layers[0]["layer"]: {
                size: _size_over_seeds(dict(zip(seeds, [one[size] for one in layers], strict=True)))
                for size in SIZES
            }
            for layers in zip(*(deformable[seed]["dilation"] for seed in seeds), strict=True)
        }
        rows.append(row)
    return rows


def _size_over_seeds(spreads: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean dilation of filters of one kind for each seed; None without such filters."""
    counts = {spread["count"] for spread in spreads.values()}
    if counts == {0}:
        return None
    (count,) = counts  # all seeds are scored on the same images
    return over_seeds({seed: s["mean"] for seed, s in spreads.items()}) | {"filters": count}


def score_table(network: Network, rows: Sequence[Mapping[str, Any]]) -> str:
    times = [statistics.median(row[f"{v} seconds per step"] for row in rows) for v in VARIANTS]
    lines = [
        f"\n{network}: {SCORES[network]} in percent, by seed (mean +- standard deviation); "
        f"seconds per step: plain {times[0]:.3f}, deformable {times[1]:.3f}\n",
        "| strength | plain | deformable | gain |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = " | ".join(cell(row[name]) for name in (*VARIANTS, "gap"))
        lines.append(f"| {row['strength']:.2g} | {cells} |")
    return "\n".join(lines)


def dilation_table(network: Network, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"\n{network}: effective dilation by the object at the center of the filter, "
        "mean +- standard deviation over seeds\n",
        "| strength | layer | " + " | ".join(SIZES) + " |",
        "|---" * (2 + len(SIZES)) + "|",
    ]
    for row in rows:
        for layer, sizes in row["dilation"].items():
            cells = " | ".join(spread(sizes[size], 2) for size in SIZES)
            lines.append(f"| {row['strength']:.2g} | {layer} | {cells} |")
    return "\n".join(lines)


def draw(summary: Mapping[Network, Sequence[Mapping[str, Any]]]) -> Figure:
    """A row of panels for each network: scores, gain, and Table 2 at the greatest strength.

    Points are seeds, lines are means, and bands and bars are one standard deviation.
    """
    figure = Figure((12, 3.6 * len(summary)), layout="constrained")
    panels = figure.subplots(len(summary), 3, squeeze=False)
    for (network, rows), (scores, gap, dilation) in zip(summary.items(), panels, strict=True):
        for variant, color in zip(VARIANTS, (COLORS[1], COLORS[0]), strict=True):
            _plot(scores, rows, variant, color)
        scores.set_title(f"{TITLES[network]}: {SCORES[network]}, %")
        scores.legend()
        _plot(gap, rows, "gap", COLORS[2])
        gap.axhline(0, color="black", linewidth=1)
        gap.set_title("deformable - plain, points")
        for axes in (scores, gap):
            axes.set_xlabel("strength of warp and scale range")
            axes.set_xticks([row["strength"] for row in rows])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        _plot_dilation(dilation, rows[-1])
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    at = [row["strength"] for row in rows]
    means = [row[name]["mean"] for row in rows]
    axes.plot(at, means, "-", color=color, label=name)
    spreads = [row[name]["std"] or 0.0 for row in rows]
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
    for x, row in zip(at, rows, strict=True):
        values = row[name]["seeds"].values()
        axes.plot([x] * len(values), list(values), ".", color=color)


def _plot_dilation(axes: Axes, row: Mapping[str, Any]) -> None:
    layers = row["dilation"].items()
    axes.set_title(f"effective dilation at strength {row['strength']:.2g}")
    for color, marker, (layer, sizes) in zip(COLORS[:LAYERS], "osD", layers, strict=True):
        known = [size for size in SIZES if sizes[size]]
        at = [SIZES.index(size) for size in known]
        means = [sizes[size]["mean"] for size in known]
        spreads = [sizes[size]["std"] or 0.0 for size in known]
        axes.errorbar(at, means, spreads, fmt=marker, color=color, capsize=3, label=layer)
        objects = [place for place, size in enumerate(known) if size != "background"]
        axes.plot([at[i] for i in objects], [means[i] for i in objects], color=color)
    axes.set_xticks(range(len(SIZES)), SIZES)
    axes.set_xlim(-0.5, len(SIZES) - 0.5)
    axes.set_xlabel("filters centered on")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(loc="upper left")


def report(results: Sequence[Mapping[str, Any]], found: Mapping[str, Any], out: Path) -> str:
    """Writes claim.json and claim.png from the finished runs; returns the tables."""
    summary: dict[Network, list[dict[str, Any]]] = {
        network: rows for network in NETWORKS if (rows := summarize(results, network))
    }
    if not summary:
        return ""
    write_json(out / "claim.json", {**found, "summary": summary, "runs": list(results)})
    save_figure(out / "claim.png", lambda: draw(summary))
    tables = (table(*of) for table in (score_table, dilation_table) for of in summary.items())
    return "\n".join(tables)
