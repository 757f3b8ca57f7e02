"""Scores as JSON has them: None instead of NaN."""

import math
from collections.abc import Iterable


def scaled(score: float | None, factor: float = 1) -> float | None:
    """`score` times `factor`; None for None and NaN."""
    return None if score is None or math.isnan(score) else factor * score


def by_name(
    names: Iterable[str], scores: Iterable[float], factor: float = 1
) -> dict[str, float | None]:
    """Each score, times `factor`, by its name."""
    return {name: scaled(score, factor) for name, score in zip(names, scores, strict=True)}
