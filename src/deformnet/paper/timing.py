"""Side-by-side timing: calls take turns in one process, on the same tensors."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

WARM_UP_SECONDS = 0.3


class Summary(TypedDict):
    """Median, 20 % and 80 % quantiles, and minimum."""

    median: float
    p20: float
    p80: float
    min: float


@dataclass(frozen=True)
class Timing:
    """Seconds per call, or ratios of such; one value per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        return min(self.rounds)

    def quantile(self, fraction: float) -> float:
        """Return the value below which a fraction of the rounds lie."""
        return sorted(self.rounds)[round(fraction * (len(self.rounds) - 1))]

    def summary(self) -> Summary:
        return {
            "median": self.median,
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
            "min": self.fastest,
        }

    def relative_to(self, base: "Timing") -> "Timing":
        """Return the ratios to `base`, round by round: a passing load affects both."""
        return Timing(tuple(a / b for a, b in zip(self.rounds, base.rounds, strict=True)))


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
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
