"""Confusion matrices: what is predicted instead of what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deformnet.metrics.boxes import Array, areas, as_array, intersections, ious
from deformnet.metrics.voc import GroundTruth, Predictions

SCORE = 0.5
"""Least score of the detections that are counted; `predict` draws the same ones."""
IOU = 0.5

_Name = TypeVar("_Name")


@dataclass(frozen=True, eq=False)
class Confusion:
    """A confusion matrix."""

    classes: tuple[str, ...]
    """Names of the rows and columns."""
    counts: np.ndarray
    """int64 [n, n], rows ground truth, columns prediction."""

    @classmethod
    def of(cls, classes: Sequence[str], counts: Array) -> "Confusion":
        """From counts [n, n], or a single one."""
        return cls(tuple(classes), as_array(counts).reshape(len(classes), len(classes)))

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file, a list for each row."""
        return {"classes": list(self.classes), "counts": self.counts.tolist()}


def detection_confusion(
    ground_truth: Mapping[_Name, GroundTruth],
    predictions: Mapping[_Name, Predictions],
    classes: Sequence[str],
    *,
    crowds: bool = False,
) -> Confusion:
    """Counts of objects by their class and that of the detection in their place.

    The detections of an image with a score of at least `SCORE`, best first, each take one of the
    free objects with which their IoU is above `IOU`: of those of their own class, or else of
    another, the one that they overlap most. Objects without a detection count in the last column,
    detections without an object in the last row, both named "background" (or "no object", if a
    class has that name). Ignored objects are not counted, nor are detections of their class on
    them.

    Args:
        ground_truth: the objects of every image, by its name or number.
        predictions: the detections by the same names; images without detections may be missing.
        classes: class names; labels are places in this list.
        crowds: ignored objects are COCO's crowds, which a detection is on if `IOU` of its own area
            is inside. Otherwise it is on an ignored object if their IoU is above `IOU`.
    """
    counts = np.zeros((len(classes) + 1,) * 2, dtype=np.int64)
    for name, target in ground_truth.items():
        _count(counts, target, predictions.get(name, _NONE), crowds)
    return Confusion((*classes, "no object" if "background" in classes else "background"), counts)


_NONE = Predictions(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def _count(counts: np.ndarray, target: GroundTruth, own: Predictions, crowds: bool) -> None:
    """Adds one image to `counts`."""
    boxes = as_array(target.boxes).astype(np.float64).reshape(-1, 4)
    labels, ignored = as_array(target.labels), as_array(target.ignored).astype(bool)
    scores = as_array(own.scores)
    order = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores >= SCORE)]
    detected = as_array(own.boxes).astype(np.float64).reshape(-1, 4)[order]
    overlaps = ious(detected, boxes)
    on_ignored = overlaps
    if crowds:
        on_ignored = intersections(detected, boxes) / np.maximum(areas(detected), 1e-12)[:, None]
    free = ~ignored
    for number, label in enumerate(as_array(own.labels)[order]):
        candidates = free & (overlaps[number] > IOU)
        same = candidates & (labels == label)
        chosen = same if same.any() else candidates
        if chosen.any():
            best = np.where(chosen, overlaps[number], 0).argmax()
            free[best] = False
            counts[labels[best], label] += 1
        elif not (on_ignored[number, ignored & (labels == label)] > IOU).any():
            counts[-1, label] += 1
    np.add.at(counts[:, -1], labels[free].astype(np.int64), 1)
