"""Confusion matrices and curves against loops over detections."""

import math

import numpy as np
import pytest

from box_sets import naive_iou, random_set
from deformnet.metrics import GroundTruth, Predictions, detection_confusion, voc_ap, voc_curves

BOX, FAR, CROWD = [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 40, 40]


def objects(*rows):
    """From rows of box, label and whether it is ignored."""
    boxes, labels, ignored = zip(*rows, strict=True) if rows else ([], [], [])
    return GroundTruth(
        np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(ignored, bool)
    )


def detections(*rows):
    """From rows of box, label and score."""
    boxes, labels, scores = zip(*rows, strict=True) if rows else ([], [], [])
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Predictions(boxes, np.array(scores, float), np.array(labels, int))


def confusion(target, own, classes=("cat", "dog"), **options):
    return detection_confusion({"a": target}, {"a": own}, classes, **options).counts.tolist()


def naive_confusion(targets, found, classes):
    """One detection at a time."""
    counts = [[0] * (classes + 1) for _ in range(classes + 1)]
    for name, (boxes, labels, ignored) in targets.items():
        own = found.get(name, detections())
        rows = sorted(zip(*map(list, own), strict=True), key=lambda row: -row[1])
        taken = set()
        for box, score, label in rows:
            if score < 0.5:
                continue
            overlaps = [naive_iou(box, other) for other in boxes]
            near = [k for k in range(len(boxes)) if overlaps[k] > 0.5]
            free = [k for k in near if not ignored[k] and k not in taken]
            own_class = [k for k in free if labels[k] == label]
            if free:
                best = max(own_class or free, key=lambda k: overlaps[k])
                taken.add(best)
                counts[labels[best]][label] += 1
            elif not any(ignored[k] and labels[k] == label for k in near):
                counts[classes][label] += 1
        for k in range(len(boxes)):
            if not ignored[k] and k not in taken:
                counts[labels[k]][classes] += 1
    return counts


def test_agrees_with_loops():
    total = np.zeros((4, 4), int)
    for seed in range(60):
        targets, found = random_set(seed)
        rng = np.random.default_rng(seed)
        found = {
            name: own._replace(labels=np.where(rng.random(len(own.labels)) < 0.7, own.labels, 1))
            for name, own in found.items()
        }
        result = detection_confusion(targets, found, "abc")
        assert result.classes == ("a", "b", "c", "background")
        assert result.counts.tolist() == naive_confusion(targets, found, 3)
        total += result.counts
        real = sum((~np.asarray(target.ignored)).sum() for target in targets.values())
        assert result.counts[:-1].sum() == real  # every object is in one place
    assert (total[:, [0, 1, 3]].ravel()[:-1] > 0).sum() >= 9  # many cases occur


def test_what_is_in_the_place_of_what():
    cat_and_dog = objects((BOX, 0, False), (FAR, 1, False))
    # The cat is taken for a dog, the dog is missed, and there is a cat where nothing is.
    own = detections((BOX, 1, 0.9), ([100, 100, 110, 110], 0, 0.8), (FAR, 1, 0.4))
    assert confusion(cat_and_dog, own) == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    # The object of the own class goes before the one that overlaps more.
    both = objects((BOX, 0, False), ([0, 0, 10, 9], 1, False))
    assert confusion(both, detections((BOX, 1, 0.9))) == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    # The second detection of an object is on nothing.
    twice = detections((BOX, 0, 0.9), (BOX, 1, 0.8))
    assert confusion(objects((BOX, 0, False)), twice) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert confusion(objects(), detections()) == np.zeros((3, 3)).tolist()


def test_ignored_objects_and_crowds():
    difficult, crowd = objects((BOX, 0, True)), objects((CROWD, 0, True))
    nothing, wrong = np.zeros((3, 3)).tolist(), [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    own = detections((BOX, 0, 0.9))
    assert confusion(difficult, own) == nothing
    assert confusion(crowd, own) == wrong  # IoU 1/16
    assert confusion(crowd, own, crowds=True) == nothing
    assert confusion(objects((BOX, 1, True)), own) == wrong  # of another class


def test_name_of_the_background():
    names = detection_confusion({}, {}, ("background", "cat")).classes
    assert names == ("background", "cat", "no object")


@pytest.mark.parametrize("method", ["11-point", "area"])
def test_curves_agree_with_loops(method):
    unreached = 0
    for seed in range(20):
        targets, found = random_set(seed)
        curves = voc_curves(targets, found, "abc", method)
        expected = voc_ap(targets, found, "abc", (0.5,), method)
        np.testing.assert_array_equal(curves.ap, expected.ap[0])
        for label in range(3):
            points, count = naive_curve(targets, found, label)
            if not count:
                assert np.isnan(curves.precision[label]).all()
                assert np.isnan(curves.scores[label]).all()
                continue
            for k in range(101):
                later = [point for point in points if point[0] >= k / 100]
                best = max((precision for _, precision, _ in later), default=0)
                score = later[0][2] if later else 0
                assert curves.precision[label, k] == pytest.approx(best)
                assert curves.scores[label, k] == score
                unreached += not later
    assert unreached > 100


def naive_curve(targets, found, label):
    """Recall, precision and score after each detection of a class, and its number of objects."""
    alone, only = {}, {}
    for name, (boxes, labels, ignored) in targets.items():
        own = labels == label
        alone[name] = GroundTruth(boxes[own], labels[own] * 0, ignored[own])
    for name, (boxes, scores, labels) in found.items():
        own = labels == label
        only[name] = Predictions(boxes[own], scores[own], labels[own] * 0)
    count = sum(int((~target.ignored).sum()) for target in alone.values())
    rows = [
        (score, name, box)
        for name in alone
        if name in only
        for box, score in zip(only[name].boxes, only[name].scores, strict=True)
    ]
    points, taken, right, wrong = [], set(), 0, 0
    for score, name, box in sorted(rows, key=lambda row: -row[0]):
        overlaps = [naive_iou(box, other) for other in alone[name].boxes]
        best = max(range(len(overlaps)), key=lambda k: overlaps[k], default=None)
        hit = best is not None and overlaps[best] > 0.5
        if hit and alone[name].ignored[best]:
            pass  # moves neither count
        elif hit and (name, best) not in taken:
            taken.add((name, best))
            right += 1
        else:
            wrong += 1
        points.append((right / max(count, 1), right / max(right + wrong, 1), score))
    return points, count


def test_json_ends_where_recall_does():
    targets = {"a": objects((BOX, 0, False), (FAR, 0, False))}
    curves = voc_curves(targets, {"a": detections((BOX, 0, 0.75))}, ("cat", "dog"))
    values = curves.to_json()
    assert values["recall"][:3] == [0, 0.01, 0.02]
    assert values["precision"] == {"cat": [1.0] * 51, "dog": []}
    assert values["score"] == {"cat": [0.75] * 51, "dog": []}
    assert (curves.ap[0], math.isnan(curves.ap[1])) == (0.5, True)
