"""Average precision of boxes as PASCAL VOC defines it (Everingham et al. 2010, section 4.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

Method = Literal["11-point", "area"]
"""How AP is read off the curve of precision and recall.

`"11-point"` (VOC to 2009, and the paper on VOC2007): the mean of the best precision at recall 0,
0.1, ..., 1 or beyond it. `"area"` (VOC from 2010): the area under the best precision at each recall
or beyond it.
"""

# As floats the points 0.3, 0.6 and 0.7 lie just above the tenths, so that 9 objects of 15 do not
# reach 0.6. The evaluators that published numbers come from do so, and a point is worth up to 1/11
# of AP: to compare, it must be so here, too.
_RECALL_POINTS = np.arange(11) * 0.1

Array = Tensor | np.ndarray


class Truth(NamedTuple):
    """The objects of an image."""

    boxes: Array
    """[n, 4], edges x1 y1 x2 y2 in pixels: the first pixel is the box 0 0 1 1."""
    labels: Array
    """Integers [n], places in the list of classes."""
    ignored: Array
    """Bool [n]: objects (VOC's "difficult") that neither count as missed nor as found."""


class Found(NamedTuple):
    """The detections of an image, in any order."""

    boxes: Array
    """[d, 4], edges x1 y1 x2 y2."""
    scores: Array
    """[d], higher is surer."""
    labels: Array
    """Integers [d]."""


@dataclass(frozen=True)
class VOCScores:
    """Attributes:
    classes: their names.
    objects: of each class, without the ignored ones.
    ious: the thresholds.
    method: how AP is read off the curve.
    ap: for each threshold the AP of each class; NaN for a class without objects.
    mean_ap: for each threshold the mean over the classes that have objects; NaN if none has.
    """

    classes: tuple[str, ...]
    objects: tuple[int, ...]
    ious: tuple[float, ...]
    method: Method
    ap: tuple[tuple[float, ...], ...]
    mean_ap: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file, None for NaN, by thresholds ("0.5") and classes."""
        keys = [f"{iou:g}" for iou in self.ious]
        by_class = [
            {name: _or_none(value) for name, value in zip(self.classes, values, strict=True)}
            for values in self.ap
        ]
        return {
            "mean_ap": dict(zip(keys, map(_or_none, self.mean_ap), strict=True)),
            "ap": dict(zip(keys, by_class, strict=True)),
            "objects": dict(zip(self.classes, self.objects, strict=True)),
        }


def voc_ap(
    truths: Mapping[str, Truth],
    found: Mapping[str, Found],
    classes: Sequence[str],
    ious: Sequence[float] = (0.5, 0.7),
    method: Method = "area",
) -> VOCScores:
    """Average precision of each class, and its mean.

    The detections of a class are taken from all images by falling score; equal scores keep the
    order of the images in `truths` and of the detections in their image. Each is held against the
    object of its class and image that it overlaps most. If their IoU is above the threshold, it is
    right where no earlier detection took that object and wrong where one did; if the object is
    ignored it does not count. All others are wrong.

    Args:
        truths: the objects of every image of the set, by its name.
        found: the detections by the same names; an image may be missing if it has none.
        classes: names; labels are places in this list.
        ious: thresholds, from 0 to below 1.
        method: see `Method`.
    Raises:
        ValueError: for detections of images that are not in `truths`, labels that are no class,
            boxes or scores that are not finite, tensors whose sizes disagree, and thresholds or
            methods that are none; the message names the image.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: wanted one of {', '.join(get_args(Method))}, got {method!r}")
    if not ious or not all(0 <= iou < 1 for iou in ious):
        raise ValueError(f"ious: wanted thresholds from 0 to below 1, got {list(ious)}")
    unknown = [name for name in found if name not in truths]
    if unknown:
        raise ValueError(
            f"found: {len(unknown)} of {len(found)} images are not in the ground truth, "
            f"such as {unknown[0]!r}"
        )
    objects, labels, matches = _match_all(truths, found, len(classes))
    # Stable: see the docstring on equal scores.
    order = np.argsort(-matches.score, kind="stable")
    matches = _Matches(*(column[order] for column in matches))
    average = _eleven_points if method == "11-point" else _area
    ap = []
    for iou in ious:
        right, wrong = _judge(matches, iou)
        ap.append(
            tuple(
                average(right[labels[order] == c], wrong[labels[order] == c], int(objects[c]))
                for c in range(len(classes))
            )
        )
    means = tuple(_mean([value for value in values if not math.isnan(value)]) for values in ap)
    counts = tuple(objects.tolist())
    return VOCScores(tuple(classes), counts, tuple(ious), method, tuple(ap), means)


def voc_table(scores: Mapping[str, Any], method: Method) -> str:
    """Scores as `VOCScores.to_json` has them, in percent as text: a line for each class."""
    objects, mean, ap = scores["objects"], scores["mean_ap"], scores["ap"]
    rows = [("class", "objects", [f"AP@{iou}" for iou in mean])]
    for name, count in objects.items():
        rows.append((name, str(count), [_percent(by_class[name]) for by_class in ap.values()]))
    rows.append(("mean", str(sum(objects.values())), [_percent(value) for value in mean.values()]))
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"{name:{width}} {count:>8}" + "".join(f" {value:>8}" for value in values)
        for name, count, values in rows
    ]
    return "\n".join([f"VOC AP in percent, {method}", *lines])


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
    truths: Mapping[str, Truth], found: Mapping[str, Found], num_classes: int
) -> tuple[np.ndarray, np.ndarray, _Matches]:
    """Objects that count of each class [C], labels of the detections [D], and their matches."""
    objects = np.zeros(num_classes, dtype=np.int64)
    first = 0
    labels = [np.zeros(0, dtype=np.int64)]
    matches = [_Matches(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))]
    for name, truth in truths.items():
        boxes, true_labels = _checked(f"truths[{name!r}]", truth.boxes, truth.labels, num_classes)
        ignored = _array(truth.ignored).astype(bool)
        if ignored.shape != true_labels.shape:
            raise ValueError(
                f"truths[{name!r}]: {len(true_labels)} labels, but ignored is {list(ignored.shape)}"
            )
        objects += np.bincount(true_labels[~ignored], minlength=num_classes)
        if name in found:
            of_image = found[name]
            found_boxes, found_labels = _checked(
                f"found[{name!r}]", of_image.boxes, of_image.labels, num_classes
            )
            scores = _array(of_image.scores).astype(np.float64)
            if scores.shape != found_labels.shape:
                raise ValueError(
                    f"found[{name!r}]: {len(found_labels)} labels, but scores are "
                    f"{list(scores.shape)}"
                )
            if not np.isfinite(scores).all():
                raise ValueError(f"found[{name!r}]: a score is NaN or infinite")
            labels.append(found_labels)
            iou, best = _best(found_boxes, found_labels, boxes, true_labels)
            # Without objects there is nothing to look up, and an IoU of 0 matches nothing.
            of_ignored = ignored[best] if len(boxes) else np.zeros(len(best), dtype=bool)
            matches.append(_Matches(scores, iou, first + best, of_ignored))
        first += len(boxes)
    columns = (np.concatenate(column) for column in zip(*matches, strict=True))
    return objects, np.concatenate(labels), _Matches(*columns)


def _best(
    boxes: np.ndarray, labels: np.ndarray, true_boxes: np.ndarray, true_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """IoU with the object of the same class that overlaps most, and that object's place, [d]."""
    if len(true_boxes) == 0:
        return np.zeros(len(boxes)), np.zeros(len(boxes), dtype=np.int64)
    low = np.maximum(boxes[:, None, :2], true_boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true_boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    union = _areas(boxes)[:, None] + _areas(true_boxes) - common
    same = labels[:, None] == true_labels
    iou = np.divide(common, union, out=np.zeros_like(common), where=same & (union > 0))
    best = iou.argmax(1)
    return iou[np.arange(len(boxes)), best], best


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1)


def _judge(matches: _Matches, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Which detections, sorted by score, are right and which are wrong, bool [D] each."""
    matched = matches.iou > iou
    claims = np.flatnonzero(matched & ~matches.ignored)
    right = np.zeros(len(matched), dtype=bool)
    right[claims[np.unique(matches.object[claims], return_index=True)[1]]] = True
    return right, ~right & ~(matched & matches.ignored)


def _curve(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits at each right detection and the best precision from there on."""
    hits = right.cumsum()
    counted = np.maximum(hits + wrong.cumsum(), 1)  # 0 before the first that counts
    precision = np.maximum.accumulate((hits / counted)[::-1])[::-1]
    return hits[right], precision[right]


def _eleven_points(right: np.ndarray, wrong: np.ndarray, objects: int) -> float:
    if objects == 0:
        return math.nan
    hits, precision = _curve(right, wrong)
    recall = hits / objects
    reached = [precision[recall >= point] for point in _RECALL_POINTS]
    return _mean([float(values.max(initial=0.0)) for values in reached])


def _area(right: np.ndarray, wrong: np.ndarray, objects: int) -> float:
    if objects == 0:
        return math.nan
    # Recall rises by 1 / objects at every right detection.
    return float(_curve(right, wrong)[1].sum() / objects)


def _checked(
    name: str, boxes: Array, labels: Array, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float64 [n, 4] and labels int64 [n]."""
    numbers = _array(boxes).astype(np.float64)
    places = _array(labels)
    if numbers.size == 0 and places.size == 0:
        return np.zeros((0, 4)), np.zeros(0, dtype=np.int64)
    if numbers.ndim != 2 or numbers.shape[1] != 4 or places.shape != numbers.shape[:1]:
        raise ValueError(
            f"{name}: wanted boxes [n, 4] and labels [n], got {list(numbers.shape)} and "
            f"{list(places.shape)}"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: a box is NaN or infinite")
    wrong = places[(places < 0) | (places >= num_classes)]
    if wrong.size:
        raise ValueError(f"{name}: label {wrong[0]}, wanted 0 to {num_classes - 1}")
    return numbers, places.astype(np.int64)


def _array(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
