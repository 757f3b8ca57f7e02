"""Average precision of boxes as PASCAL VOC defines it (Everingham et al. 2010, section 4.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from deformnet._text import Table, percent
from deformnet.metrics.boxes import Array, as_array
from deformnet.metrics.boxes import ious as box_ious
from deformnet.metrics.curves import RECALLS, PrecisionRecall
from deformnet.metrics.numbers import by_name, mean_name

Method = Literal["11-point", "area"]
"""How AP is computed from the curve of precision and recall.

`"11-point"` (VOC to 2009, and the paper on VOC2007): the mean of the best precision at recall 0,
0.1, ..., 1 or beyond it. `"area"` (VOC from 2010): the area under the best precision at each recall
or beyond it.
"""

# As floats the points 0.3, 0.6 and 0.7 lie just above the tenths, so that 9 objects of 15 do not
# reach 0.6. So do the evaluators of published numbers, and a point is worth up to 1/11 of AP.
_RECALL_POINTS = np.arange(11) * 0.1


class GroundTruth(NamedTuple):
    """The objects of an image."""

    boxes: Array
    """[n, 4], edges x1 y1 x2 y2 in pixels: the first pixel is the box 0 0 1 1."""
    labels: Array
    """Integers [n], places in the list of classes."""
    ignored: Array
    """Bool [n]: objects (VOC's "difficult") that count neither as missed nor as detected."""


class Predictions(NamedTuple):
    """The detections of an image, in any order."""

    boxes: Array
    """[d, 4], edges x1 y1 x2 y2."""
    scores: Array
    """[d], higher is more confident."""
    labels: Array
    """Integers [d]."""


@dataclass(frozen=True)
class VOCScores:
    """Average precision of each class."""

    classes: tuple[str, ...]
    objects: tuple[int, ...]
    """Number of objects of each class, without the ignored ones."""
    ious: tuple[float, ...]
    """IoU thresholds."""
    method: Method
    ap: tuple[tuple[float, ...], ...]
    """For each threshold the AP of each class; NaN for a class without objects."""
    mean_ap: tuple[float, ...]
    """For each threshold the mean over the classes with objects; NaN if none has any."""

    @property
    def classes_scored(self) -> int:
        """Number of classes with objects."""
        return sum(count > 0 for count in self.objects)

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file, None for NaN, by thresholds ("0.5") and classes."""
        keys = [f"{iou:g}" for iou in self.ious]
        by_class = [by_name(self.classes, values) for values in self.ap]
        return {
            "mean_ap": by_name(keys, self.mean_ap),
            "ap": dict(zip(keys, by_class, strict=True)),
            "objects": dict(zip(self.classes, self.objects, strict=True)),
        }

    def table(self) -> Table:
        """The scores in percent, a row for each class."""
        columns = zip(self.classes, self.objects, zip(*self.ap, strict=True), strict=True)
        mean = mean_name("AP", self.classes_scored, len(self.classes))
        rows = [*columns, (mean, sum(self.objects), self.mean_ap)]
        return Table(
            f"VOC AP ({self.method})",
            ("class", "objects", *(f"AP@{iou:g}" for iou in self.ious)),
            [(name, str(count), *map(percent, values)) for name, count, values in rows],
        )


def voc_ap(
    ground_truth: Mapping[str, GroundTruth],
    predictions: Mapping[str, Predictions],
    classes: Sequence[str],
    ious: Sequence[float] = (0.5, 0.7),
    method: Method = "area",
) -> VOCScores:
    """Average precision of each class, and its mean.

    The detections of a class are taken from all images by descending score; equal scores keep the
    order of the images in `ground_truth` and of the detections in their image. Each is matched to
    the object of its class and image that it overlaps most. If their IoU is above the threshold, it
    is a true positive, or a false positive if an earlier detection took that object; if the object
    is ignored it does not count. All others are false positives.

    Args:
        ground_truth: the objects of every image of the set, by its name.
        predictions: the detections by the same names; images without detections may be missing.
        classes: class names; labels are places in this list.
        ious: IoU thresholds, in [0, 1).
        method: see `Method`.
    Raises:
        ValueError: for detections of images that are not in `ground_truth`, labels out of range,
            boxes or scores that are not finite, tensors whose sizes disagree, and invalid
            thresholds or methods; the message names the image.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"expected method to be one of {', '.join(get_args(Method))}, but got {method!r}"
        )
    if not ious or not all(0 <= iou < 1 for iou in ious):
        raise ValueError(f"expected ious to be thresholds in [0, 1), but got {list(ious)}")
    unknown = [name for name in predictions if name not in ground_truth]
    if unknown:
        raise ValueError(
            f"predictions: {len(unknown)} of {len(predictions)} images are not in the ground "
            f"truth, such as {unknown[0]!r}"
        )
    objects, labels, matches = _match_all(ground_truth, predictions, len(classes))
    of_class = [labels == label for label in range(len(classes))]
    ap = []
    for iou in ious:
        true, false = _positives(matches, iou)
        by_class = zip(of_class, objects.tolist(), strict=True)
        ap.append(tuple(_average(true[own], false[own], n, method) for own, n in by_class))
    means = tuple(_mean([value for value in values if not math.isnan(value)]) for values in ap)
    counts = tuple(objects.tolist())
    return VOCScores(tuple(classes), counts, tuple(ious), method, tuple(ap), means)


def voc_curves(
    ground_truth: Mapping[str, GroundTruth],
    predictions: Mapping[str, Predictions],
    classes: Sequence[str],
    method: Method = "area",
) -> PrecisionRecall:
    """Precision-recall curves at an IoU of 0.5; see `voc_ap` for arguments and errors."""
    objects, labels, matches = _match_all(ground_truth, predictions, len(classes))
    positives = _positives(matches, 0.5)
    precision, scores, ap = [], [], []
    for label, count in enumerate(objects.tolist()):
        own = labels == label
        true, false = (kind[own] for kind in positives)
        ap.append(_average(true, false, count, method))
        at, score = _sampled(true, false, count, matches.score[own])
        precision.append(at)
        scores.append(score)
    shape = (len(classes), len(RECALLS))
    return PrecisionRecall(
        tuple(classes), np.reshape(precision, shape), np.reshape(scores, shape), tuple(ap)
    )


class _Matches(NamedTuple):
    """For each detection of the set [D] the object of its class and image that it overlaps most."""

    score: np.ndarray
    iou: np.ndarray
    """0 where there is no such object."""
    object: np.ndarray
    """Its number in the set."""
    ignored: np.ndarray
    """Whether it is an ignored one."""


def _match_all(
    ground_truth: Mapping[str, GroundTruth],
    predictions: Mapping[str, Predictions],
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray, _Matches]:
    """Number of evaluated objects of each class, [C]; labels of the detections in descending order
    of score, [D], and their matches."""
    objects = np.zeros(num_classes, dtype=np.int64)
    first = 0
    labels = [np.zeros(0, dtype=np.int64)]
    matches = [_Matches(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))]
    for name, target in ground_truth.items():
        where = f"ground_truth[{name!r}]"
        boxes, true_labels = _checked(where, target.boxes, target.labels, num_classes)
        ignored = _column(where, "ignored", target.ignored, true_labels).astype(bool)
        objects += np.bincount(true_labels[~ignored], minlength=num_classes)
        if name in predictions:
            where, own = f"predictions[{name!r}]", predictions[name]
            own_boxes, own_labels = _checked(where, own.boxes, own.labels, num_classes)
            scores = _column(where, "scores", own.scores, own_labels).astype(np.float64)
            if not np.isfinite(scores).all():
                raise ValueError(f"{where}: expected finite scores, but got NaN or infinity")
            labels.append(own_labels)
            iou, best = _best(own_boxes, own_labels, boxes, true_labels)
            # Without objects there is nothing to look up, and an IoU of 0 matches nothing.
            of_ignored = ignored[best] if len(boxes) else np.zeros(len(best), dtype=bool)
            matches.append(_Matches(scores, iou, first + best, of_ignored))
        first += len(boxes)
    columns = [np.concatenate(column) for column in zip(*matches, strict=True)]
    # Stable: see `voc_ap` on equal scores.
    order = np.argsort(-columns[0], kind="stable")
    return objects, np.concatenate(labels)[order], _Matches(*(column[order] for column in columns))


def _best(
    boxes: np.ndarray, labels: np.ndarray, true_boxes: np.ndarray, true_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the object of the same class that overlaps most, and that object's index, [d]."""
    if len(true_boxes) == 0:
        return np.zeros(len(boxes)), np.zeros(len(boxes), dtype=np.int64)
    iou = np.where(labels[:, None] == true_labels, box_ious(boxes, true_boxes), 0)
    best = iou.argmax(1)
    return iou[np.arange(len(boxes)), best], best


def _positives(matches: _Matches, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """The true and the false positives among detections sorted by score, bool [D] each."""
    matched = matches.iou > iou
    claims = np.flatnonzero(matched & ~matches.ignored)
    true = np.zeros(len(matched), dtype=bool)
    true[claims[np.unique(matches.object[claims], return_index=True)[1]]] = True
    return true, ~true & ~(matched & matches.ignored)


def _average(true: np.ndarray, false: np.ndarray, objects: int, method: Method) -> float:
    """AP of the detections of one class, sorted by score."""
    if objects == 0:
        return math.nan
    hits, precision = _best_precision(true, false)
    precision = precision[true]
    if method == "area":  # recall rises by 1 / objects at every true positive
        return float(precision.sum() / objects)
    recall = hits[true] / objects
    reached = [precision[recall >= point] for point in _RECALL_POINTS]
    return _mean([float(values.max(initial=0.0)) for values in reached])


def _best_precision(true: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative number of true positives, and the highest precision from there on."""
    hits = true.cumsum()
    counted = np.maximum(hits + false.cumsum(), 1)  # 0 before the first that counts
    return hits, np.maximum.accumulate((hits / counted)[::-1])[::-1]


def _sampled(
    true: np.ndarray, false: np.ndarray, objects: int, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and score at each of `RECALLS`; see `_average` for the arguments."""
    if objects == 0:
        return np.full(len(RECALLS), math.nan), np.full(len(RECALLS), math.nan)
    hits, precision = _best_precision(true, false)
    first = np.searchsorted(hits / objects, RECALLS)
    sampled = (np.append(values, 0.0)[first] for values in (precision, scores))
    precision, scores = sampled
    return precision, scores


def _checked(
    name: str, boxes: Array, labels: Array, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float64 [n, 4] and labels int64 [n]."""
    numbers = as_array(boxes).astype(np.float64)
    places = as_array(labels)
    if numbers.size == 0 and places.size == 0:
        return np.zeros((0, 4)), np.zeros(0, dtype=np.int64)
    if numbers.ndim != 2 or numbers.shape[1] != 4 or places.shape != numbers.shape[:1]:
        raise ValueError(
            f"{name}: expected boxes [n, 4] and labels [n], but got {list(numbers.shape)} and "
            f"{list(places.shape)}"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: expected finite boxes, but got NaN or infinity")
    wrong = places[(places < 0) | (places >= num_classes)]
    if wrong.size:
        raise ValueError(f"{name}: expected labels 0 to {num_classes - 1}, but got {wrong[0]}")
    return numbers, places.astype(np.int64)


def _column(where: str, name: str, values: Array, labels: np.ndarray) -> np.ndarray:
    """Values [n] beside the labels of an image."""
    column = as_array(values)
    if column.shape != labels.shape:
        raise ValueError(
            f"{where}: expected {name} to be [{len(labels)}] like the labels, but got "
            f"{list(column.shape)}"
        )
    return column


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
