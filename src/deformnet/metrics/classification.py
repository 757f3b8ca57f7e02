"""Top-1 and top-5 error of image classification, from counts of images.

Counts are 64-bit integers and add up, over batches and over processes, to the last digit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

TOP = 5
"""How many guesses the looser of the two errors allows."""


@dataclass(frozen=True)
class ClassificationScores:
    """
    Attributes:
        top1_error: share of the images whose class is not the best scored one; NaN without images.
        top5_error: share of the images whose class is not among the five best scored ones; None if
            there are five classes or fewer, where it would always be 0.
        class_errors: top-1 error over the images of each class; NaN for a class without images.
    """

    top1_error: float
    top5_error: float | None
    class_errors: tuple[float, ...]

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the classes' errors by name."""
        by_class = zip(classes, self.class_errors, strict=True)
        return {
            "top1_error": _or_none(self.top1_error),
            "top5_error": None if self.top5_error is None else _or_none(self.top5_error),
            "class_errors": {name: _or_none(error) for name, error in by_class},
        }


class ClassificationCounts(Metric):
    """Counts of right guesses; `classification_scores` makes the scores.

    Args:
        num_classes: classes.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        empty = torch.zeros(num_classes, 3, dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """
        Of classes with equal scores the first is preferred, on every device.

        Args:
            logits: [N, C] scores.
            target: [N] class ids.
        Raises:
            ValueError: if the shapes disagree, or a label is no class.
        """
        if logits.ndim != 2 or target.ndim != 1 or len(logits) != len(target):
            raise ValueError(
                f"logits and target must be [N, C] and [N], got {list(logits.shape)} and "
                f"{list(target.shape)}"
            )
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits: wanted {self.num_classes} classes, got {logits.shape[1]}")
        wrong = (target < 0) | (target >= self.num_classes)
        if wrong.any():
            raise ValueError(
                f"target has label {int(target[wrong][0])}, wanted 0 to {self.num_classes - 1}"
            )
        guesses = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP]
        right = guesses == target[:, None]
        row = torch.stack([right[:, 0], right.any(dim=1), torch.ones_like(right[:, 0])], dim=1)
        self.counts.index_add_(0, target, row.long())

    def compute(self) -> Tensor:
        """
        Returns:
            int64 [C, 3]: for each class the images whose first guess is right, those with the
            class among their five first guesses, and all its images.
        """
        return self.counts


def classification_scores(counts: Tensor) -> ClassificationScores:
    """The errors over the whole set, and of each class.

    Args:
        counts: [C, 3], what `ClassificationCounts.compute` returns.
    """
    first, within, images = counts.cpu().double().unbind(dim=1)
    total = images.sum()
    return ClassificationScores(
        float((total - first.sum()) / total),
        float((total - within.sum()) / total) if len(counts) > TOP else None,
        tuple(((images - first) / images).tolist()),  # NaN where there are none
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
