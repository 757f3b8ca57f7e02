"""Scores as JSON has them, None instead of NaN; and a check of labels."""

import math
from collections.abc import Iterable

from torch import Tensor


def scaled(score: float | None, factor: float = 1) -> float | None:
    """`score` times `factor`; None for None and NaN."""
    return None if score is None or math.isnan(score) else factor * score


def by_name(
    names: Iterable[str], scores: Iterable[float], factor: float = 1
) -> dict[str, float | None]:
    """Each score, times `factor`, by its name."""
    return {name: scaled(score, factor) for name, score in zip(names, scores, strict=True)}


def scored_classes(scores: Iterable[float]) -> dict[str, int]:
    """Entries of a JSON file: the number of classes that a mean includes (those without NaN)."""
    missing = [math.isnan(score) for score in scores]
    return {"classes_scored": len(missing) - sum(missing), "classes": len(missing)}


def mean_name(score: str, scored: int, classes: int) -> str:
    """Name of a mean over classes: "mean", or "mean IoU over 1 of 2 classes"."""
    return "mean" if scored == classes else f"mean {score} over {scored} of {classes} classes"


def require_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises ValueError, which names the tensor, for labels out of range."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(
            f"expected labels of {name} to be 0 to {num_classes - 1}, "
            f"but got {int(labels[wrong][0])}"
        )
