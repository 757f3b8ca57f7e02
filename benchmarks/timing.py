"""Side-by-side timing: what is compared runs in turns, in one process, on the same tensors."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from deformnet.runs import machine

WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds a call: all rounds, sorted."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return self.seconds[0]

    def quantile(self, share: float) -> float:
        return self.seconds[round(share * (len(self.seconds) - 1))]


def compare(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """Time every call `rounds` times, in an order that rotates from round to round."""
    names = list(calls)
    for name in names:
        end = time.perf_counter() + WARM_UP_SECONDS
        calls[name]()
        while time.perf_counter() < end:
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(sorted(times))) for name, times in seconds.items()}


def median_ratio(timings: Mapping[str, Timing], name: str, base: str) -> float:
    """How many times as long as `base` a call takes, by the medians."""
    return timings[name].median / timings[base].median


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def setting() -> str:
    """One line on what this ran on; under a load of others the figures mean little."""
    load = os.getloadavg()[0]
    return f"{machine()}, load {load:.1f} at the start, torch {torch.__version__}"
