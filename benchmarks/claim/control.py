"""Results of the control: warp alone, size alone, and both, with plain and dilated networks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claim.plan import CONTROL, CONTROL_VARIANTS, NETWORKS, Network, Run, Variant, Varied
from benchmarks.claim.report import SCORES, TITLES
from benchmarks.grid import (
    Statement,
    cell,
    difference,
    every,
    gain_in_words,
    outcome,
    over_seeds,
)
from deformnet._files import write_json

Scores = Mapping[tuple[Varied, Variant], Mapping[int, float]]
"""Scores of a network by data set, variant and seed."""
PAIRS: tuple[tuple[Variant, Variant], ...] = (
    ("dilation2", "plain"),
    ("deformable", "plain"),
    ("deformable", "dilation2"),
)
"""Variants that are compared seed by seed."""
_WORDS: Mapping[Varied, str] = {"warp": "warp alone", "size": "size alone", "both": "both"}


def scores(results: Sequence[Mapping[str, Any]], network: Network) -> Scores:
    found: dict[tuple[Varied, Variant], dict[int, float]] = {}
    for one in results:
        run = Run(**one["run"])
        if run.network == network:
            found.setdefault((run.varied, run.variant), {})[run.seed] = one["score"]
    return found


def gaps(found: Scores, varied: Varied, better: Variant, worse: Variant) -> dict[int, float]:
    """Score of `better` minus that of `worse`, for the seeds that both have."""
    return difference(found.get((varied, better), {}), found.get((varied, worse), {}))


def statements(found: Scores) -> Iterator[Statement]:
    """The statements that the control checks."""
    for varied in ("warp", "size"):
        over = {worse: gaps(found, varied, "deformable", worse) for worse in ("plain", "dilation2")}
        if all(over.values()):
            yield Statement(
                f"{_WORDS[varied]}: the deformable network is ahead of both others",
                every(map(outcome, over.values())),
                ", ".join(f"{gain_in_words(gain)} over {worse}" for worse, gain in over.items()),
            )
    if of_seed := gaps(found, "size", "dilation2", "plain"):
        yield Statement(
            "size alone: the dilated network is ahead of the plain one",
            outcome(of_seed),
            gain_in_words(of_seed),
        )


def summarize(found: Scores) -> list[dict[str, Any]]:
    """Scores and gaps of each data set over seeds; None where there are no runs."""
    rows: list[dict[str, Any]] = []
    for varied in CONTROL:
        columns = {v: found.get((varied, v), {}) for v in CONTROL_VARIANTS}
        columns |= {f"{a} - {b}": gaps(found, varied, a, b) for a, b in PAIRS}
        if any(columns.values()):
            over = {
                name: over_seeds(values) if values else None for name, values in columns.items()
            }
            rows.append({"varied": varied, **over})
    return rows


def table(network: Network, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])[1:]
    score = f"{SCORES[network]} in percent, by seed (mean +- standard deviation)"
    lines = [
        f"\n{TITLES[network]}: {score}\n",
        f"| what varies | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row in rows:
        cells = " | ".join(cell(row[column]) for column in columns)
        lines.append(f"| {_WORDS[row['varied']]} | {cells} |")
    return "\n".join(lines)


def report(results: Sequence[Mapping[str, Any]], found: Mapping[str, Any], out: Path) -> str:
    """Writes control.json from the finished runs; returns the tables and statements."""
    by_network = {network: of for network in NETWORKS if (of := scores(results, network))}
    summary = {network: summarize(of) for network, of in by_network.items()}
    checked = {network: list(statements(of)) for network, of in by_network.items()}
    lines = [f"CPU minutes: {sum(one['core seconds'] for one in results) / 60:.1f}"]
    for network, rows in summary.items():
        lines += [table(network, rows), "", *map(str, checked[network])]
    stored = {network: [one._asdict() for one in of] for network, of in checked.items()}
    everything = {"summary": summary, "statements": stored, "runs": list(results)}
    write_json(out / "control.json", {**found, **everything})
    return "\n".join(lines)


def tuning_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Scores by setting, on the tuning images."""
    lines = ["| learning rate | network | score | CPU seconds |", "|---" * 4 + "|"]
    for one in results:
        run, budget = Run(**one["run"]), one["budget"]
        lines.append(
            f"| {budget['lr']:g} | {run.network}, {run.variant} | {one['score']:.1f} | "
            f"{one['core seconds']:.0f} |"
        )
    return "\n".join(lines)
