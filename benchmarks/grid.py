"""Shared by experiments of many runs: stored results, numbers over seeds, and statements."""

import fcntl
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deformnet._errors import UserError


def stored(
    path: Path,
    settings: str,
    expected: Mapping[str, Any],
    updated: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any] | None:
    """The stored result of a run; None if it is not finished.

    Args:
        path: file of the result.
        settings: key of the run's settings in it.
        expected: settings that it should have.
        updated: adds settings that did not exist when the result was stored.
    Raises:
        UserError: if it has other settings.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    # Lists for tuples.
    own, expected = (json.loads(json.dumps(it)) for it in (updated(found[settings]), expected))
    if own != expected:
        raise UserError(f"{path}: expected a run of {expected}, but got {found[settings]}")
    return found


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on what a lock file stands for, until it leaves or dies.

    Args:
        wait: wait until it does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True


def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (None for a single seed)."""
    several = list(values.values())
    return {
        "seeds": {str(seed): value for seed, value in sorted(values.items())},
        "mean": statistics.mean(several),
        "std": statistics.stdev(several) if len(several) > 1 else None,
    }


def cell(values: Mapping[str, Any] | None, digits: int = 1) -> str:
    """The value of each seed, with mean and standard deviation."""
    if values is None:
        return "-"
    each = ", ".join(f"{value:.{digits}f}" for value in values["seeds"].values())
    return f"{each} ({spread(values, digits)})"


def spread(values: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Mean and standard deviation."""
    if values is None:
        return "-"
    std = "" if values["std"] is None else f" +- {values['std']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{std}"


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    """Values minus others, for the seeds that both have."""
    return {seed: values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())}


_OUTCOMES = {True: "holds", False: "**does not hold**", None: "**not clear**"}


class Statement(NamedTuple):
    """A statement, whether it holds here (None if that is not clear), and the supporting numbers.

    Its parts are combined by `outcome`, `every` and `some`.
    """

    text: str
    holds: bool | None
    numbers: str

    def __str__(self) -> str:
        return f"- {_OUTCOMES[self.holds]}: {self.text}. {self.numbers}."


def outcome(margins: Mapping[int, float], *, ties: bool = False) -> bool | None:
    """Whether a margin is positive: for all seeds (True), for none (False), or for some (None).

    Args:
        ties: whether zero counts as positive; otherwise it counts neither for nor against.
    """
    least, most = min(margins.values()), max(margins.values())
    if least > 0 or (ties and least == 0):
        return True
    return False if most < 0 else None


def every(outcomes: Iterable[bool | None]) -> bool | None:
    """Whether all parts of a statement hold; one that does not hold refutes it."""
    found = set(outcomes)
    return False if False in found else None if None in found else True


def some(outcomes: Iterable[bool | None]) -> bool | None:
    """Whether at least one part of a statement holds; only if none does is it refuted."""
    found = set(outcomes)
    return True if True in found else None if None in found else False


def gain_in_words(values: Mapping[int, float]) -> str:
    """Mean and standard deviation of a gain, and the number of seeds for which it is positive."""
    ahead = sum(value > 0 for value in values.values())
    return f"{spread(over_seeds(values))} ({ahead} of {len(values)} seeds)"
