"""Scores of semantic segmentation, all from counts of pixels.

Counts are 64-bit integers and add up: over batches, over processes (torchmetrics sums the states),
and over parts of a set, to the last digit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

IGNORE = 255
"""The label of pixels that are not scored."""

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class SegmentationScores:
    """
    Attributes:
        mean_iou: mean of `iou` over the classes that occur; NaN if none does.
        iou: intersection over union of each class; NaN for a class that occurs neither in the truth
            nor in the predictions.
        pixel_accuracy: right pixels among those that are scored; NaN if none is.
    """

    mean_iou: float
    iou: tuple[float, ...]
    pixel_accuracy: float

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the IoU by class name."""
        return {
            "mean_iou": _or_none(self.mean_iou),
            "pixel_accuracy": _or_none(self.pixel_accuracy),
            "iou": _by_name(classes, self.iou),
        }


class _ConfusionMatrix(MulticlassConfusionMatrix):
    """With a check of every label: torchmetrics counts some labels out of range elsewhere."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        if preds.ndim == target.ndim + 1:
            preds = preds.argmax(dim=1)
        if preds.shape != target.shape:
            raise ValueError(
                f"prediction {list(preds.shape)} and target {list(target.shape)} differ in size"
            )
        _check_labels("prediction", preds, self.num_classes)
        _check_labels("target", target[target != IGNORE], self.num_classes)
        super().update(preds, target)


def confusion_matrix(num_classes: int) -> MulticlassConfusionMatrix:
    """The metric that counts: `update(prediction, target)`, then `segmentation_scores(compute())`.

    `target` is [N, H, W], class ids or 255 where not scored; `prediction` is [N, H, W], class ids,
    or logits [N, C, H, W]. The result is int64 [C, C], row truth, column prediction. Updating
    raises ValueError for tensors of other sizes and for labels that are no class.
    """
    return _ConfusionMatrix(num_classes)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """Mean IoU over the classes that occur, IoU of each class and pixel accuracy.

    With one confusion matrix of the whole set, IoU of class c is TP / (TP + FP + FN): the measure
    of VOC and Cityscapes, not a mean over images. A class occurs if it has a pixel in the truth or
    in the predictions; one that does not has no IoU and is left out of the mean. (So a class that
    is absent from the truth counts 0 as soon as one pixel is given to it.)

    Args:
        confusion: [C, C] counts, row truth, column prediction.
    Raises:
        ValueError: if `confusion` is not a square matrix.
    """
    if confusion.numel() == 1:
        confusion = confusion.reshape(1, 1)  # torchmetrics drops the dimensions of a single count
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion must be [C, C], got {list(confusion.shape)}")
    counts = confusion.detach().cpu().double()
    right = counts.diagonal()
    iou = _ratio(right, counts.sum(0) + counts.sum(1) - right)
    accuracy = _ratio(right.sum(), counts.sum())
    return SegmentationScores(_mean(iou), tuple(iou.tolist()), float(accuracy))


@dataclass(frozen=True)
class SizeScores:
    """IoU of the objects of one size.

    Attributes:
        mean_iou: mean of `iou` over the classes with an object of this size; NaN if none has.
        iou: of each class; NaN for a class without an object of this size.
        objects: how many objects there are.
    """

    mean_iou: float
    iou: tuple[float, ...]
    objects: int

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the IoU by class name."""
        return {
            "mean_iou": _or_none(self.mean_iou),
            "objects": self.objects,
            "iou": _by_name(classes, self.iou),
        }


class ObjectCounts(Metric):
    """Counts for the IoU of small, medium and large objects; `size_scores` makes the scores.

    An object is a connected region (8 neighbours) of one class in the truth, its size the number
    of its pixels. That needs no instance labels, so every set can be scored; objects of a class
    that touch count as one.

    A wrongly labelled pixel belongs to no object, so what is a false positive for one size must be
    laid down. Here each object is scored in a window around it: its bounding box, grown on every
    side by half the box's width and height. For an object of class c, pixels of the window count

    - as TP or FN where they are the object's, as they are predicted c or not;
    - as FP where they are predicted c and the truth is another class;
    - not at all where the truth is void, or another object of class c.

    TP, FP and FN are summed by class and size over the set (an FP near two objects counts for
    both), IoU is TP / (TP + FP + FN), and the mean is over the classes that have objects of that
    size. Growing with the object, the window
    charges small and large objects alike for spilling over their outline; to charge all false
    positives of an image instead would make small objects answer for those of the large ones. What
    is far from any object of its class shows in the mean IoU alone.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        small: int = 32**2,
        large: int = 96**2,
        background: int | None = 0,
    ) -> None:
        """
        Args:
            small: objects of fewer pixels are small (COCO: 32^2).
            large: objects of more pixels are large (COCO: 96^2); the others are medium.
            background: a class that has no objects; None if all have.
        Raises:
            ValueError: if not 0 < small <= large.
        """
        super().__init__()
        if not 0 < small <= large:
            raise ValueError(f"wanted 0 < small <= large, got small={small}, large={large}")
        self.num_classes = num_classes
        self.small = small
        self.large = large
        self.background = background
        empty = torch.zeros(len(SIZES), num_classes, 4, dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """
        Args:
            prediction: [N, H, W] class ids.
            target: [N, H, W] class ids, 255 where not scored.
        Raises:
            ValueError: if the shapes are not equal or not [N, H, W], or a label is no class.
        """
        if prediction.shape != target.shape or target.ndim != 3:
            raise ValueError(
                "prediction and target must both be [N, H, W], got "
                f"{list(prediction.shape)} and {list(target.shape)}"
            )
        _check_labels("target", target[target != IGNORE], self.num_classes)
        counts = np.zeros(self.counts.shape, dtype=np.int64)
        for predicted, truth in zip(prediction.cpu().numpy(), target.cpu().numpy(), strict=True):
            self._count_image(predicted, truth, counts)
        self.counts += torch.from_numpy(counts).to(self.counts.device)

    def compute(self) -> Tensor:
        """
        Returns:
            int64 [3, C, 4]: by size (small, medium, large) and class, TP, FP and FN in pixels, and
            the number of objects.
        """
        return self.counts

    def _count_image(self, predicted: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> None:
        """Adds one image (both [H, W]) to `counts`."""
        regions = connected_regions(truth)
        for region, box in enumerate(region_boxes(regions)):
            inside = regions[box] == region
            label = truth[box][inside][0]
            if label in (IGNORE, self.background):
                continue
            area = np.count_nonzero(inside)
            size = 0 if area < self.small else 2 if area > self.large else 1
            found = np.count_nonzero(inside & (predicted[box] == label))
            window = tuple(_grown(*pair) for pair in zip(box, truth.shape, strict=True))
            other = (truth[window] != label) & (truth[window] != IGNORE)
            spilled = np.count_nonzero(other & (predicted[window] == label))
            counts[size, label] += (found, spilled, area - found, 1)


def size_scores(counts: Tensor) -> dict[str, SizeScores]:
    """The scores of "small", "medium" and "large" objects.

    Args:
        counts: [3, C, 4], what `ObjectCounts.compute` returns.
    """
    scores = {}
    for size, of_size in zip(SIZES, counts.cpu(), strict=True):
        true, false, missed, objects = of_size.unbind(-1)
        iou = _ratio(true.double(), (true + false + missed).double())
        scores[size] = SizeScores(_mean(iou), tuple(iou.tolist()), int(objects.sum()))
    return scores


def connected_regions(labels: np.ndarray) -> np.ndarray:
    """Numbers the connected regions (8 neighbours) of equal labels from 0, in reading order.

    Args:
        labels: [H, W] integers.
    Returns:
        int64 [H, W]
    """
    if labels.size == 0:
        return np.zeros(labels.shape, dtype=np.int64)
    # Nodes are the runs of equal labels within a row: far fewer than pixels.
    starts = np.ones(labels.shape, dtype=bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = (np.cumsum(starts) - 1).reshape(labels.shape)
    first, second = _touching_runs(labels, runs)
    # A run's number falls to the least in its region. Two steps alternate and end in a few rounds:
    # the lower number goes to the root of the higher one, then all chains are shortened.
    root = np.arange(runs[-1, -1] + 1)
    while True:
        low = np.minimum(root[first], root[second])
        high = np.maximum(root[first], root[second])
        apart = low != high
        if not apart.any():
            break
        np.minimum.at(root, high[apart], low[apart])
        while (root[root] != root).any():
            root = root[root]
    return np.unique(root, return_inverse=True)[1][runs]


def _touching_runs(labels: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of runs in neighbouring rows that have one label and touch, also by a corner."""
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    every, but_first, but_last = slice(None), slice(1, None), slice(None, -1)
    for above, below in ((every, every), (but_last, but_first), (but_first, but_last)):
        same = labels[:-1, above] == labels[1:, below]
        pair = np.stack([runs[:-1, above][same], runs[1:, below][same]])
        new = np.ones(pair.shape[1], dtype=bool)
        new[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)
        pairs.append(pair[:, new])
    first, second = np.concatenate(pairs, axis=1)
    return first, second


def region_boxes(regions: np.ndarray) -> list[tuple[slice, slice]]:
    """The bounding box (rows, columns) of each region.

    Args:
        regions: [H, W], as `connected_regions` numbers them.
    """
    spans = []
    for places in np.indices(regions.shape, sparse=True):
        first = np.full(regions.max(initial=-1) + 1, max(regions.shape))
        last = np.zeros_like(first)
        np.minimum.at(first, regions, places)
        np.maximum.at(last, regions, places)
        spans.append([slice(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    return list(zip(*spans, strict=True))


def _grown(span: slice, length: int) -> slice:
    """`span` and half as far again on both sides, within 0 to `length`."""
    more = math.ceil((span.stop - span.start) / 2)
    return slice(max(0, span.start - more), min(length, span.stop + more))


def _check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"{name} has label {int(labels[wrong][0])}, wanted 0 to {num_classes - 1}")


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN where `whole` is 0."""
    return torch.where(whole > 0, part / whole, torch.nan)


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by_name(classes: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in zip(classes, values, strict=True)}
