"""Top-1 and top-5 error of image classification, from counts of images.

Counts are 64-bit integers and add up exactly, over batches and over processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from deformnet.metrics.numbers import by_name, require_labels, scaled, scored_classes

_TOP = 5  # guesses that the looser of the two errors allows


@dataclass(frozen=True)
class ClassificationScores:
    """Errors of a set of images."""

    top1_error: float
    """Fraction of the images whose class does not have the best score; NaN without images."""
    top5_error: float | None
    """The same of the five best scores; None for five classes or fewer, where it is always 0."""
    class_errors: tuple[float, ...]
    """Top-1 error over the images of each class; NaN for a class without images."""

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the classes' errors by name."""
        return {
            "top1_error": scaled(self.top1_error),
            "top5_error": scaled(self.top5_error),
            "class_errors": by_name(classes, self.class_errors),
            **scored_classes(self.class_errors),
        }


class ClassificationCounts(Metric):
    """Counts of correct guesses; `classification_scores` computes the scores.

    Args:
        num_classes: number of classes.
        sync: whether `compute` sums over the processes of torch.distributed.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, *, sync: bool = True) -> None:
        super().__init__(sync_on_compute=sync)
        self.num_classes = num_classes
        empty = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("counts", empty, "sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """
        Ties are broken by the lower class, on every device.

        Args:
            logits: [N, C] scores.
            target: [N] class ids.
        Raises:
            ValueError: if the shapes disagree, or a label is out of range.
        """
        if logits.ndim != 2 or target.ndim != 1 or len(logits) != len(target):
            raise ValueError(
                f"expected logits [N, C] and target [N], but got {list(logits.shape)} and "
                f"{list(target.shape)}"
            )
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"expected logits of {self.num_classes} classes, but got {logits.shape[1]}"
            )
        require_labels("target", target, self.num_classes)
        guesses = logits.argsort(dim=1, descending=True, stable=True)[:, :_TOP]
        one = torch.ones_like(target)
        self.counts.index_put_((target, guesses[:, 0]), one, accumulate=True)
        within = (guesses == target[:, None]).any(dim=1).long()
        self.counts[:, -1].index_add_(0, target, within)

    def compute(self) -> Tensor:
        """
        Returns:
            int64 [C, C + 1]: for each class, the number of its images that are predicted as each
            class (the confusion matrix), and the number with the class among the top five.
        """
        return self.counts


def classification_scores(counts: Tensor) -> ClassificationScores:
    """The errors of the whole set, and of each class, from `ClassificationCounts.compute`."""
    confusion, within = counts[:, :-1].cpu().double(), counts[:, -1].cpu().double()
    first, images = confusion.diagonal(), confusion.sum(dim=1)
    total = images.sum()
    return ClassificationScores(
        float((total - first.sum()) / total),
        float((total - within.sum()) / total) if len(counts) > _TOP else None,
        tuple(((images - first) / images).tolist()),  # NaN where there are none
    )
