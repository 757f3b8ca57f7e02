"""Confusion matrices of classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deformnet.metrics.boxes import Array, areas, as_array, intersections, ious
from deformnet.metrics.voc import GroundTruth, Predictions

SCORE = 0.5
"""Minimum score of the detections that are counted; `predict` draws the same ones by default."""
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
        """Creates it from counts [n, n]."""
        return cls(tuple(classes), as_array(counts).reshape(len(classes), len(classes)))

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file, one list per row."""
        return {"classes": list(self.classes), "counts": self.counts.tolist()}


def detection_confusion(
    ground_truth: Mapping[_Name, GroundTruth],
    predictions: Mapping[_Name, Predictions],
    classes: Sequence[str],
    *,
    crowds: bool = False,
) -> Confusion:
    """Confusion matrix of objects and detections.

    In each image, detections with a score of at least `SCORE` are matched in descending order of
    score. A detection is matched with the unmatched object of its class that has the largest IoU
    with it, if that is above `IOU`; if there is none, with such an object of another class. Objects
    without a detection count in the last column, and detections without an object in the last row;
    both are named "background" (or "no object" if a class has that name). Ignored objects, and
    detections of their class that match them, are not counted.

    Args:
        ground_truth: the objects of every image, by name or number.
        predictions: the detections by the same names; images without detections may be missing.
        classes: class names; labels are indices into this list.
        crowds: ignored objects are COCO crowds, which a detection matches if more than `IOU` of
            the detection's area is inside. Otherwise, the IoU needs to be above `IOU`.
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
