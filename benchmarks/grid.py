"""Shared by experiments of many runs: stored results, numbers over seeds, and statements."""

import fcntl
import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


def stored(path: Path, settings: str, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored result of a run; None if it is not finished.

    Args:
        path: file of the result.
        settings: key of the run's settings in it.
        expected: settings that it should have.
    Raises:
        ValueError: if it has other settings.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    expected = json.loads(json.dumps(expected))  # lists for tuples
    if found[settings] != expected:
        raise ValueError(f"{path}: expected a run of {expected}, but got {found[settings]}")
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


class Statement(NamedTuple):
    """A statement, whether it holds here, and the supporting numbers."""

    text: str
    holds: bool
    numbers: str

    def __str__(self) -> str:
        return f"- {'holds' if self.holds else '**does not hold**'}: {self.text}. {self.numbers}."


def gain_in_words(values: Mapping[int, float]) -> str:
    """Mean and standard deviation of a gain, and the number of seeds for which it is positive."""
    ahead = sum(value > 0 for value in values.values())
    return f"{spread(over_seeds(values))} ({ahead} of {len(values)} seeds)"
