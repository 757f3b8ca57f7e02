"""Numbers of finished runs: scores by seed, and gains seed by seed."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.grid import difference
from benchmarks.photographs.plan import (
    NETWORKS,
    PLAIN,
    Network,
    Run,
    Variant,
    require_same_proposals,
)

TITLES: Mapping[Network, str] = {
    "deeplab": "DeepLab",
    "class-aware-rpn": "Class-aware RPN",
    "faster-rcnn": "Faster R-CNN",
    "rfcn": "R-FCN",
}
METRICS: Mapping[Network, tuple[str, ...]] = {
    network: ("mean IoU",) if network == "deeplab" else ("mAP@0.5", "mAP@0.7")
    for network in NETWORKS
}
"""Scores of the paper's tables, by the names that they have there."""

SIZES = ("small", "medium", "large")
PLACES = (*SIZES, "background")
"""What filters are centered on (Table 2)."""

Results = Mapping[Variant, Mapping[int, Mapping[str, Any]]]
"""The results of a network, by variant and seed."""


def by_network(results: Iterable[Mapping[str, Any]]) -> dict[Network, Results]:
    """Results of finished runs; networks without any are left out.

    Raises:
        UserError: see `require_same_proposals`.
    """
    results = list(results)
    require_same_proposals(results)
    found: dict[Network, dict[Variant, dict[int, Mapping[str, Any]]]] = {}
    for result in results:
        run = Run.of(result["run"])
        found.setdefault(run.network, {}).setdefault(run.variant, {})[run.seed] = result
    return {network: found[network] for network in NETWORKS if network in found}


def scores(found: Results, variant: Variant, metric: str) -> dict[int, float]:
    """The score of each seed, in percent; empty without finished runs, or if none has one."""
    by_seed = {seed: one["scores"][metric] for seed, one in found.get(variant, {}).items()}
    return {seed: score for seed, score in sorted(by_seed.items()) if score is not None}


def gains(found: Results, variant: Variant, metric: str, over: Variant = PLAIN) -> dict[int, float]:
    """Difference to another variant, for the seeds that both have."""
    return difference(scores(found, variant, metric), scores(found, over, metric))


def shared(
    found: Results, variants: Sequence[Variant], metric: str
) -> dict[Variant, dict[int, float]]:
    """The scores of variants, for the seeds that all of them have; empty if there are none."""
    every = {variant: scores(found, variant, metric) for variant in variants}
    seeds = sorted(set[int].intersection(*map(set, every.values())))
    return {v: {seed: of[seed] for seed in seeds} for v, of in every.items()} if seeds else {}


def mean(values: Mapping[int, float]) -> float:
    return statistics.mean(values.values())
