"""VOC AP against loops over detections, against numbers worked out by hand, and for bad input."""

import json
import math

import numpy as np
import pytest
import torch

from box_sets import naive_iou, random_set
from deformnet.metrics import GroundTruth, Predictions, voc_ap

UNIT = [0.0, 0.0, 10.0, 10.0]
"""An object; `shifted(k)` has IoU (10 - k) / (10 + k) with it."""


def shifted(k):
    return [float(k), 0.0, 10.0 + k, 10.0]


def ground_truth(*boxes, labels=None, ignored=None):
    n = len(boxes)
    return GroundTruth(
        torch.tensor(boxes).reshape(n, 4),
        torch.tensor(labels or [0] * n),
        torch.tensor(ignored or [False] * n),
    )


def predictions(*boxes, scores, labels=None):
    n = len(boxes)
    return Predictions(
        torch.tensor(boxes).reshape(n, 4), torch.tensor(scores), torch.tensor(labels or [0] * n)
    )


def ap(targets, detections, iou=0.5, method="area", classes=("thing",)):
    return voc_ap(targets, detections, classes, [iou], method).ap[0][0]


# The definition, one detection at a time.


def naive_ap(targets, detections, label, threshold, method):
    taken, total, ranked = set(), 0, []
    for name, objects in targets.items():
        total += sum(
            int(own) == label and not bool(skip)
            for own, skip in zip(objects.labels, objects.ignored, strict=True)
        )
        if name in detections:
            for box, score, own in zip(*(x.tolist() for x in detections[name]), strict=True):
                if own == label:
                    ranked.append((score, name, box))
    if total == 0:
        return None
    ranked.sort(key=lambda entry: -entry[0])  # a stable sort
    hits, misses, curve = 0, 0, []
    for _, name, box in ranked:
        objects, best, chosen = targets[name], 0.0, None
        for number, other in enumerate(objects.boxes.tolist()):
            if objects.labels[number] == label and naive_iou(box, other) > best:
                best, chosen = naive_iou(box, other), number
        if best > threshold:
            if objects.ignored[chosen]:
                continue
            if (name, chosen) in taken:
                misses += 1
            else:
                taken.add((name, chosen))
                hits += 1
        else:
            misses += 1
        curve.append((hits / total, hits / (hits + misses)))
    if method == "11-point":
        points = [0.1 * k for k in range(11)]
        return sum(max([p for r, p in curve if r >= t], default=0.0) for t in points) / 11
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - before) * max(p for r, p in curve if r >= recall)
        before = recall
    return area


@pytest.mark.parametrize("method", ["11-point", "area"])
def test_agrees_with_loops(method):
    reached = 0
    for seed in range(60):
        targets, detections = random_set(seed)
        scores = voc_ap(targets, detections, "abc", (0.3, 0.5, 0.7), method)
        for threshold, values, mean in zip(scores.ious, scores.ap, scores.mean_ap, strict=True):
            expected = [naive_ap(targets, detections, c, threshold, method) for c in range(3)]
            counted = [value for value in expected if value is not None]
            reached += sum(0.1 < value < 0.9 for value in counted)
            for value, wanted in zip(values, expected, strict=True):
                assert math.isnan(value) if wanted is None else value == pytest.approx(wanted)
            assert mean == pytest.approx(sum(counted) / len(counted))
    assert reached > 200  # the cases are neither all right nor all wrong


def test_worked_out_by_hand():
    # Two objects; right, wrong, right: precision 1 at recall 1/2, then 2/3 at recall 1.
    targets = {"a": ground_truth(UNIT, [50.0, 50.0, 60.0, 60.0])}
    boxes = [UNIT, [20.0, 20.0, 30.0, 30.0], [50.0, 50.0, 60.0, 60.0]]
    detections = {"a": predictions(*boxes, scores=[0.9, 0.8, 0.7])}
    assert ap(targets, detections) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert ap(targets, detections, method="11-point") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_nothing_found_and_nothing_there():
    assert ap({"a": ground_truth(UNIT)}, {}) == 0
    assert ap({"a": ground_truth(UNIT)}, {"a": predictions(scores=[])}) == 0
    scores = voc_ap({"a": ground_truth()}, {"a": predictions(UNIT, scores=[0.5])}, ["thing"])
    assert math.isnan(scores.ap[0][0])
    assert math.isnan(scores.mean_ap[0])


def test_overlap_must_exceed_the_threshold():
    wide = [0.0, 0.0, 20.0, 10.0]
    assert naive_iou(UNIT, wide) == 0.5
    assert ap({"a": ground_truth(UNIT)}, {"a": predictions(wide, scores=[1.0])}, 0.5) == 0
    assert ap({"a": ground_truth(UNIT)}, {"a": predictions(wide, scores=[1.0])}, 0.499) == 1


def test_second_detection_of_an_object_is_wrong():
    targets = {"a": ground_truth(UNIT, [50.0, 50.0, 60.0, 60.0])}
    boxes = [shifted(1), UNIT, [50.0, 50.0, 60.0, 60.0]]
    # The surer one has the object, though the other one fits better.
    detections = {"a": predictions(*boxes, scores=[0.9, 0.8, 0.7])}
    assert ap(targets, detections) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_detection_is_held_against_the_best_object_alone():
    # The second detection overlaps both objects enough; the better one is taken, so it is wrong.
    targets = {"a": ground_truth(UNIT, shifted(4))}
    detections = {"a": predictions(UNIT, shifted(1), scores=[0.9, 0.8])}
    assert naive_iou(shifted(1), shifted(4)) > 0.5
    assert ap(targets, detections) == pytest.approx(0.5)


def test_ignored_objects_count_neither_way():
    far = [50.0, 50.0, 60.0, 60.0]
    targets = {"a": ground_truth(UNIT, far, ignored=[True, False])}
    # Two detections of the ignored one are forgotten.
    detections = {"a": predictions(UNIT, shifted(1), far, scores=[0.9, 0.8, 0.7])}
    scores = voc_ap(targets, detections, ["thing"], [0.5])
    assert scores.ap == ((1.0,),)
    assert scores.objects == (1,)
    # And a class of ignored objects alone has no AP.
    assert math.isnan(ap({"a": ground_truth(UNIT, ignored=[True])}, detections))


def test_classes_are_apart_and_those_without_objects_leave_the_mean():
    targets = {"a": ground_truth(UNIT, labels=[1])}
    detections = {"a": predictions(UNIT, UNIT, UNIT, scores=[0.9, 0.8, 0.7], labels=[0, 1, 2])}
    scores = voc_ap(targets, detections, ["one", "two", "three"], [0.5, 0.7])
    for values, mean in zip(scores.ap, scores.mean_ap, strict=True):
        assert math.isnan(values[0])
        assert math.isnan(values[2])
        assert values[1] == mean == 1


def test_equal_scores_keep_the_order_of_the_images():
    targets = {"b": ground_truth(UNIT), "a": ground_truth()}
    right, wrong = predictions(UNIT, scores=[0.5]), predictions(UNIT, scores=[0.5])
    for detections in ({"b": right, "a": wrong}, {"a": wrong, "b": right}):
        assert ap(targets, detections) == 1
    targets = {"a": ground_truth(), "b": ground_truth(UNIT)}
    assert ap(targets, {"b": right, "a": wrong}) == 0.5
    # Within an image as well.
    both = predictions(shifted(9), UNIT, scores=[0.5, 0.5])
    assert ap({"b": ground_truth(UNIT)}, {"b": both}) == 0.5


def test_recall_points_are_those_of_the_published_evaluators():
    # 3 objects of 5: as floats, recall 0.6 stays below the point 0.6000000000000001.
    far = [[100.0 * i, 0.0, 100.0 * i + 10, 10.0] for i in range(5)]
    detections = {"a": predictions(*far[:3], scores=[0.9, 0.8, 0.7])}
    assert ap({"a": ground_truth(*far)}, detections, method="11-point") == pytest.approx(6 / 11)


def test_boxes_without_area_match_nothing():
    point = [5.0, 5.0, 5.0, 5.0]
    assert ap({"a": ground_truth(point)}, {"a": predictions(point, scores=[1.0])}, iou=0) == 0


def test_arrays_and_tensors_give_the_same():
    targets, detections = random_set(3)
    tensors = [
        {
            name: type(value)(*(torch.from_numpy(np.asarray(x)) for x in value))
            for name, value in part.items()
        }
        for part in (targets, detections)
    ]
    assert voc_ap(*tensors, "abc") == voc_ap(targets, detections, "abc")


def test_json_and_table():
    targets = {"a": ground_truth(UNIT, labels=[1])}
    detections = {"a": predictions(UNIT, scores=[0.9], labels=[1])}
    scores = voc_ap(targets, detections, ["cat", "aeroplane"])
    content = scores.to_json()
    assert json.loads(json.dumps(content)) == {
        "mean_ap": {"0.5": 1.0, "0.7": 1.0},
        "ap": {"0.5": {"cat": None, "aeroplane": 1.0}, "0.7": {"cat": None, "aeroplane": 1.0}},
        "objects": {"cat": 0, "aeroplane": 1},
    }
    title, head, cat, aeroplane, mean = str(scores.table()).splitlines()
    assert "area" in title
    assert head.split() == ["class", "objects", "AP@0.5", "AP@0.7"]
    assert cat.split() == ["cat", "0", "-", "-"]
    assert aeroplane.split() == ["aeroplane", "1", "100.00", "100.00"]
    assert mean.startswith("mean AP over 1 of 2 classes  ")
    assert mean.split()[-3:] == ["1", "100.00", "100.00"]
    assert len({len(line) for line in (head, cat, aeroplane, mean)}) == 1


@pytest.mark.parametrize(
    ("boxes", "changes", "message"),
    [
        ([UNIT], {"scores": [math.nan]}, r"predictions\['a'\]: expected finite scores"),
        ([UNIT], {"scores": [math.inf]}, r"predictions\['a'\]: expected finite scores"),
        ([[math.nan] * 4], {}, r"predictions\['a'\]: expected finite boxes"),
        ([UNIT], {"labels": [1]}, "expected labels 0 to 0, but got 1"),
        ([UNIT], {"labels": [-1]}, "expected labels 0 to 0, but got -1"),
        ([UNIT], {"scores": [1.0, 0.5]}, r"expected scores to be \[1\] .* got \[2\]"),
        ([UNIT], {"labels": [0, 0]}, r"\[1, 4\] and \[2\]"),
    ],
)
def test_bad_detections_are_named(boxes, changes, message):
    bad = {"a": predictions(*boxes, **{"scores": [1.0]} | changes)}
    with pytest.raises(ValueError, match=message) as caught:
        voc_ap({"a": ground_truth(UNIT)}, bad, ["thing"])
    assert "\n" not in str(caught.value)


def test_bad_ground_truth_and_settings_are_named():
    with pytest.raises(ValueError, match=r"predictions: 1 of 1 images .* such as 'b'"):
        voc_ap({"a": ground_truth(UNIT)}, {"b": predictions(UNIT, scores=[1.0])}, ["thing"])
    with pytest.raises(ValueError, match=r"ground_truth\['a'\]: expected labels 0 to 0, but got 3"):
        voc_ap({"a": ground_truth(UNIT, labels=[3])}, {}, ["thing"])
    with pytest.raises(ValueError, match=r"'a'\]: expected ignored to be \[1\] .* got \[2\]"):
        voc_ap({"a": ground_truth(UNIT, ignored=[True, False])}, {}, ["thing"])
    with pytest.raises(ValueError, match="to be one of 11-point, area, but got 'points'"):
        voc_ap({}, {}, ["thing"], method="points")  # pyright: ignore[reportArgumentType]
    for ious in ([], [1.0], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"expected ious to be thresholds in \[0, 1\)"):
            voc_ap({}, {}, ["thing"], ious)
