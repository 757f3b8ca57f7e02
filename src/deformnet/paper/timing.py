"""Side-by-side timing: what is compared runs in turns, in one process, on the same tensors."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WARM_UP_SECONDS = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds a call, or a ratio of such: one value for each round, in their order."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        return min(self.rounds)

    def quantile(self, share: float) -> float:
        """The value that `share` of the rounds stay below."""
        return sorted(self.rounds)[round(share * (len(self.rounds) - 1))]

    def summary(self) -> dict[str, float]:
        """The median, the 20 % and 80 % quantiles, and the least."""
        return {
            "median": self.median,
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
            "min": self.fastest,
        }

    def relative_to(self, base: "Timing") -> "Timing":
        """How many times as long as `base`, round by round: a load that passes hits both."""
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
