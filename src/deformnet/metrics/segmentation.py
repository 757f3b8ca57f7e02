"""Scores of semantic segmentation, all from counts of pixels.

Counts are 64-bit integers and add up exactly: over batches, over processes (torchmetrics sums the
states), and over parts of a set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from deformnet._text import Table, percent
from deformnet.metrics.numbers import by_name, mean_name, require_labels, scaled, scored_classes

IGNORE = 255
"""Label of pixels that are not scored."""

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of images."""

    mean_iou: float
    """Mean of `iou` over the classes that occur; NaN if none does."""
    iou: tuple[float, ...]
    """IoU of each class; NaN where neither ground truth nor predictions have the class."""
    pixel_accuracy: float
    """Fraction of the valid pixels that are correct; NaN without valid pixels."""

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the IoU by class name."""
        return {
            "mean_iou": scaled(self.mean_iou),
            "pixel_accuracy": scaled(self.pixel_accuracy),
            "iou": by_name(classes, self.iou),
            **scored_classes(self.iou),
        }

    def table(self, classes: Sequence[str]) -> Table:
        """IoU in percent, with a row for each class and one for the mean."""
        mean = mean_name("IoU", *scored_classes(self.iou).values())
        rows = [*zip(classes, self.iou, strict=True), (mean, self.mean_iou)]
        return Table("IoU", (), [(name, percent(iou, 1)) for name, iou in rows])


class ConfusionMatrix(MulticlassConfusionMatrix):
    """Counts of pixels; `segmentation_scores(metric.compute())` computes the scores.

    The result is int64 [C, C], rows ground truth, columns prediction.

    Args:
        num_classes: number of classes.
        sync: whether `compute` sums over the processes of torch.distributed.
    """

    def __init__(self, num_classes: int, *, sync: bool = True) -> None:
        super().__init__(
            num_classes, ignore_index=IGNORE, validate_args=False, sync_on_compute=sync
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """
        Args:
            preds: [N, H, W] class ids, or logits [N, C, H, W].
            target: [N, H, W] class ids, 255 for void.
        Raises:
            ValueError: if the sizes disagree, or a label is out of range (torchmetrics counts some
                of those elsewhere).
        """
        if preds.ndim == target.ndim + 1:
            preds = preds.argmax(dim=1)
        if preds.shape != target.shape:
            raise ValueError(
                f"expected prediction and target to have one size, but got {list(preds.shape)} "
                f"and {list(target.shape)}"
            )
        require_labels("prediction", preds, self.num_classes)
        require_labels("target", target[target != IGNORE], self.num_classes)
        super().update(preds, target)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """Mean IoU over the classes that occur, IoU of each class and pixel accuracy.

    With one confusion matrix of the whole set, IoU of class c is TP / (TP + FP + FN): the measure
    of VOC and Cityscapes, not a mean over images. A class occurs if it has a pixel in the ground
    truth or in the predictions; one that does not has no IoU and is left out of the mean. (So a
    class that is absent from the ground truth counts 0 as soon as one pixel is predicted as it.)

    Args:
        confusion: [C, C] counts, rows ground truth, columns prediction.
    Raises:
        ValueError: if `confusion` is not a square matrix.
    """
    if confusion.numel() == 1:
        confusion = confusion.reshape(1, 1)  # torchmetrics drops the dimensions of a single count
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"expected confusion to be [C, C], but got {list(confusion.shape)}")
    counts = confusion.detach().cpu().double()
    right = counts.diagonal()
    iou = _ratio(right, counts.sum(0) + counts.sum(1) - right)
    accuracy = _ratio(right.sum(), counts.sum())
    return SegmentationScores(_mean(iou), tuple(iou.tolist()), float(accuracy))


@dataclass(frozen=True)
class SizeScores:
    """IoU of the objects of one size."""

    mean_iou: float
    """Mean of `iou` over the classes with an object of this size; NaN if none has."""
    iou: tuple[float, ...]
    """IoU of each class; NaN for a class without an object of this size."""
    objects: int
    """Number of objects."""

    def to_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN and the IoU by class name."""
        return {
            "mean_iou": scaled(self.mean_iou),
            "objects": self.objects,
            "iou": by_name(classes, self.iou),
        }


class ObjectCounts(Metric):
    """Counts for the IoU of small, medium and large objects; `size_scores` makes the scores.

    An object is a connected region (8 neighbors) of one class in the ground truth, its size the
    number of its pixels. This needs no instance labels, so every set can be scored; touching
    objects of a class count as one.

    A false positive belongs to no object, and so has no size by itself. Here each object is scored
    in a window around it: its bounding box, grown on every side by half the box's width and height.
    For an object of class c, pixels of the window count

    - as TP or FN inside the object, if they are predicted c or not;
    - as FP if they are predicted c and the ground truth is another class;
    - not at all if the ground truth is void, or another object of class c.

    TP, FP and FN are summed by class and size over the set (an FP near two objects counts for
    both), IoU is TP / (TP + FP + FN), and the mean is over the classes with objects of that size.
    As the window grows with the object, small and large objects pay alike for predictions beyond
    their outline; if all false positives of an image counted, small objects would pay for those of
    the large ones. False positives far from any object of their class show in the mean IoU alone.
    """

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
            large: objects of more pixels are large (COCO: 96^2); all others are medium.
            background: a class without objects; None if all have them.
        Raises:
            ValueError: if not 0 < small <= large.
        """
        super().__init__()
        if not 0 < small <= large:
            raise ValueError(f"expected 0 < small <= large, but got small={small}, large={large}")
        self.num_classes, self.background = num_classes, background
        self.small, self.large = small, large
        empty = torch.zeros(len(SIZES), num_classes, 4, dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """
        Args:
            prediction: [N, H, W] class ids.
            target: [N, H, W] class ids, 255 for void.
        Raises:
            ValueError: if the shapes are not equal or not [N, H, W], or a label is out of range.
        """
        if prediction.shape != target.shape or target.ndim != 3:
            raise ValueError(
                "expected prediction and target to be [N, H, W], but got "
                f"{list(prediction.shape)} and {list(target.shape)}"
            )
        require_labels("target", target[target != IGNORE], self.num_classes)
        counts = np.zeros(self.counts.shape, dtype=np.int64)
        for pair in zip(prediction.cpu().numpy(), target.cpu().numpy(), strict=True):
            self._count_image(*pair, counts)
        self.counts += torch.from_numpy(counts).to(self.counts.device)

    def compute(self) -> Tensor:
        """
        Returns:
            int64 [3, C, 4]: by size (small, medium, large) and class, TP, FP and FN in pixels, and
            the number of objects.
        """
        return self.counts

    def _count_image(self, prediction: np.ndarray, target: np.ndarray, counts: np.ndarray) -> None:
        """Adds one image (both [H, W]) to `counts`."""
        regions = connected_regions(target)
        for region, box in enumerate(region_boxes(regions)):
            inside = regions[box] == region
            label = target[box][inside][0]
            if label in (IGNORE, self.background):
                continue
            area = np.count_nonzero(inside)
            size = 0 if area < self.small else 2 if area > self.large else 1
            true = np.count_nonzero(inside & (prediction[box] == label))
            window = tuple(_grown(*pair) for pair in zip(box, target.shape, strict=True))
            other = (target[window] != label) & (target[window] != IGNORE)
            false = np.count_nonzero(other & (prediction[window] == label))
            counts[size, label] += (true, false, area - true, 1)


def size_scores(counts: Tensor) -> dict[str, SizeScores]:
    """The scores of "small", "medium" and "large" objects, from `ObjectCounts.compute`."""
    scores = {}
    for size, of_size in zip(SIZES, counts.cpu(), strict=True):
        true, false, missed, objects = of_size.unbind(-1)
        iou = _ratio(true.double(), (true + false + missed).double())
        scores[size] = SizeScores(_mean(iou), tuple(iou.tolist()), int(objects.sum()))
    return scores


def connected_regions(labels: np.ndarray) -> np.ndarray:
    """Numbers connected regions (8 neighbors) of equal labels [H, W] from 0, in reading order."""
    regions = np.zeros(labels.shape, dtype=np.int64)
    count = 0
    for label in np.unique(labels):
        labeled = ndimage.label(labels == label, structure=np.ones((3, 3)))
        of_label, number = cast(tuple[np.ndarray, int], labeled)
        np.add(of_label, count - 1, out=regions, where=of_label > 0)
        count += number
    first = np.zeros(count, dtype=np.int64)
    # Of several values for a region, the last one stays: its first pixel.
    first[regions.ravel()[::-1]] = np.arange(regions.size)[::-1]
    return first.argsort().argsort()[regions]


def region_boxes(regions: np.ndarray) -> list[tuple[slice, slice]]:
    """The bounding box (rows, columns) of each of the regions of `connected_regions`."""
    return ndimage.find_objects(regions + 1)


def _grown(span: slice, length: int) -> slice:
    """`span` and half as far again on both sides, within 0 to `length`."""
    more = math.ceil((span.stop - span.start) / 2)
    return slice(max(0, span.start - more), min(length, span.stop + more))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN where `whole` is 0."""
    return torch.where(whole > 0, part / whole, torch.nan)


def _mean(values: Tensor) -> float:
    return float(values.nanmean())
