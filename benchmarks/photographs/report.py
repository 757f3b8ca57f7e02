"""Results of all finished runs as tables: over seeds, beside the paper's numbers."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid import cell, over_seeds, spread
from benchmarks.photographs.numbers import (
    METRICS,
    PLACES,
    SIZES,
    TITLES,
    Results,
    by_network,
    gains,
    scores,
)
from benchmarks.photographs.plan import (
    DILATIONS,
    NETWORKS,
    PLAIN,
    TABLE1,
    TABLE3,
    TRIED,
    Network,
    Variant,
    finished,
    require_same_proposals,
)
from benchmarks.photographs.statements import statements
from benchmarks.tables import conditions
from deformnet._files import write_file, write_json
from deformnet.paper.rows import find_rows

PAPER_DILATION = {
    "res5c": ("5.3 +- 3.3", "5.8 +- 3.5", "8.4 +- 4.5", "6.2 +- 3.0"),
    "res5b": ("2.5 +- 1.3", "3.1 +- 1.5", "5.1 +- 2.5", "3.2 +- 1.2"),
    "res5a": ("2.2 +- 1.2", "2.9 +- 1.3", "4.2 +- 1.6", "3.1 +- 1.1"),
}
"""Table 2 of the paper, the last layer first."""


def report(out: Path) -> str:
    """Writes photographs.json and photographs.md from the finished runs; returns the latter.

    Raises:
        UserError: see `require_same_proposals`.
    """
    results = finished(out)
    found = by_network(results)
    parts = [part for network in found for part in _of_network(network, found[network])]
    parts.append("\n".join(map(str, statements(found))))
    text = "\n\n".join(parts).replace("+-", "±")
    write_json(out / "photographs.json", {**conditions(), "runs": results})
    write_file(out / "photographs.md", f"{text}\n".encode())
    return text


def tuning_table(out: Path) -> str:
    """Scores on the held-out quarter of the training images, by settings, the best ones first.

    Raises:
        UserError: see `require_same_proposals`.
    """
    results = finished(out, "tuning")
    require_same_proposals(results)
    of: dict[Network, list[Mapping[str, Any]]] = {
        name: [one for one in results if one["run"]["network"] == name] for name in NETWORKS
    }
    return "\n\n".join(_tuning_table(network, own) for network, own in of.items() if own)


def _tuning_table(network: Network, results: Sequence[Mapping[str, Any]]) -> str:
    """Settings, ordered by the mean over plain and deformable networks, for the seeds all have.

    The order does not depend on the gain of the deformable networks.
    """
    fields = list(dict.fromkeys(name for changes in TRIED[network] for name in changes))
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in results:
        recipe = one["job"]["recipe"]
        groups.setdefault(tuple(recipe[name] for name in fields), []).append(one)
    found = {settings: by_network(own)[network] for settings, own in groups.items()}
    variants = sorted({variant for of in found.values() for variant in of})
    metrics = METRICS[network]
    main = [[scores(of, variant, metrics[0]) for variant in variants] for of in found.values()]
    seeds = set[int].intersection(*(set(one) for of in main for one in of))
    means = [
        statistics.mean(one[seed] for one in of for seed in seeds) if seeds else None for of in main
    ]
    columns = [(variant, metric) for variant in variants for metric in metrics]
    heads = [f"{variant.name}, {metric}" for variant, metric in columns]
    heads = [*fields, f"mean of {metrics[0]}", *heads]
    lines = [
        f"**{TITLES[network]}**: settings, ordered by the mean over plain and deformable networks",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    ranked = sorted(zip(means, found.items(), strict=True), key=lambda row: -(row[0] or 0))
    for average, (settings, of) in ranked:
        cells = [*map(str, settings), "-" if average is None else f"{average:.1f}"]
        cells += [cell(_over_seeds(scores(of, *column))) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(scores: Mapping[str, float | None]) -> str:
    """The scores of the paper's tables."""
    main = {name: value for name, value in scores.items() if "," not in name}
    return ", ".join(
        f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in main.items()
    )


def _of_network(network: Network, found: Results) -> Iterator[str]:
    every = [one for of_seed in found.values() for one in of_seed.values()]
    steps = every[0]["job"]["recipe"]["iterations"]
    batch = every[0]["job"]["recipe"]["batch"]
    minutes = (
        sum(it["core seconds of training"] + it["core seconds of scoring"] for it in every) / 60
    )
    yield (
        f"**{TITLES[network]}**: {steps} iterations of {batch} images; {len(every)} runs, "
        f"{minutes:.0f} minutes of one core. Each seed, mean +- standard deviation in parentheses; "
        "gain over the plain network (dilation 2) seed by seed."
    )
    layers = [(str(variant.layers), variant) for variant in TABLE1]
    yield _score_table("deformable layers (Table 1)", network, found, layers)
    rows = [(label(variant), variant) for variant in TABLE3]
    yield _score_table("convolutions and pooling (Table 3)", network, found, rows)
    yield _size_table(network, found)
    if network == "rfcn":
        yield _dilation_table(found)


def label(variant: Variant) -> str:
    """A row of Table 3 in words."""
    if variant.layers:
        convolutions = f"{variant.layers} deformable, from dilation {variant.dilation}"
    else:
        convolutions = f"dilation {variant.dilation}"
    return f"{convolutions}; deformable pooling" if variant.pool else convolutions


def paper(network: Network, variant: Variant) -> Mapping[str, float]:
    """The paper's scores by metric (DeepLab's on VOC); empty if it has no such row."""
    name = "deeplab-voc" if network == "deeplab" else network
    if variant in TABLE1:
        row = f"table1/{name}-{variant.layers}"
    elif variant in DILATIONS and variant.dilation > 1:
        row = f"table3/{name}-atrous-{variant.dilation}"
    elif variant.pool:
        row = f"table3/{name}-{'conv-' if variant.layers else ''}pool"
    else:
        return {}
    return find_rows([row])[0].paper


def _score_table(
    title: str, network: Network, found: Results, rows: Sequence[tuple[str, Variant]]
) -> str:
    """Scores of each seed, gains, and the paper's scores with theirs."""
    metrics = METRICS[network]
    head = " | ".join(f"{metric} | gain | paper (gain)" for metric in metrics)
    lines = [f"| {title} | {head} |", "|---" * (1 + 3 * len(metrics)) + "|"]
    plain = paper(network, PLAIN)
    for text, variant in rows:
        if variant not in found:
            continue
        cells = [text]
        theirs = paper(network, variant) or dict.fromkeys(metrics)
        for metric in metrics:
            cells.append(cell(_over_seeds(scores(found, variant, metric))))
            gain = {} if variant == PLAIN else gains(found, variant, metric)
            cells.append(spread(_over_seeds(gain)))
            cells.append(_published(theirs[metric], None if variant == PLAIN else plain[metric]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _published(score: float | None, plain: float | None) -> str:
    """A score of the paper, with its gain over the plain network's."""
    if score is None:
        return "-"
    return f"{score:.1f}" if plain is None else f"{score:.1f} ({score - plain:+.1f})"


def _size_table(network: Network, found: Results) -> str:
    """Scores of small, medium and large objects, with gains."""
    names = [f"{metric}, {size}" for metric in METRICS[network] for size in SIZES]
    lines = [f"| by object size | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant in dict.fromkeys((*TABLE1, *TABLE3)):
        if variant not in found:
            continue
        cells = []
        for name in names:
            text = spread(_over_seeds(scores(found, variant, name)))
            gain = {} if variant == PLAIN else gains(found, variant, name)
            cells.append(f"{text} ({statistics.mean(gain.values()):+.1f})" if gain else text)
        lines.append(f"| {label(variant)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _dilation_table(found: Results) -> str:
    """Table 2: mean and standard deviation over filters, both averaged over seeds."""
    lines = [
        f"| effective dilation (Table 2) | layer | {' | '.join(PLACES)} |",
        "|---" * (2 + len(PLACES)) + "|",
    ]
    for variant, of_seed in found.items():
        if not variant.layers:
            continue
        by_seed = [one["dilation"] for one in of_seed.values()]
        for layers in reversed(list(zip(*by_seed, strict=True))):
            cells = [_filters([layer[place] for layer in layers]) for place in PLACES]
            name = layers[0]["layer"]
            lines.append(f"| {label(variant)} | {name} | {' | '.join(cells)} |")
    for name, cells in PAPER_DILATION.items():
        lines.append(f"| paper | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(values: Mapping[int, float]) -> dict[str, Any] | None:
    return over_seeds(values) if values else None


def _filters(seeds: Sequence[Mapping[str, Any]]) -> str:
    if any(one["mean"] is None for one in seeds):
        return "-"
    average, deviation = (statistics.mean(one[key] for one in seeds) for key in ("mean", "std"))
    return f"{average:.2f} +- {deviation:.2f}"
