"""Numbers of finished runs: scores by seed, and gains seed by seed."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.photographs.plan import NETWORKS, PLAIN, Network, Run, Variant

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
    """Results of finished runs; networks without any are left out."""
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
    own, other = scores(found, variant, metric), scores(found, over, metric)
    return {seed: own[seed] - other[seed] for seed in own if seed in other}


def mean(values: Mapping[int, float]) -> float:
    return statistics.mean(values.values())
