"""Scores of segmentation against loops over pixels and against numbers worked out by hand."""

import json
import math
from collections import deque

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from deformnet.metrics import (
    ConfusionMatrix,
    ObjectCounts,
    segmentation_scores,
    size_scores,
)
from deformnet.metrics.segmentation import connected_regions


def labels(rows: str) -> torch.Tensor:
    """One image [1, H, W] from digits; '.' is class 0 and '#' void."""
    digits = {".": 0, "#": 255}
    grid = [[digits.get(c) if c in digits else int(c) for c in row] for row in rows.split()]
    return torch.tensor(grid)[None]


def random_labels(seed: int, classes: int = 5, void: float = 0.1, shape=(4, 17, 23)):
    """Ground truth in blocks, and a prediction that is right two times in three."""
    rng = np.random.default_rng(seed)
    n, h, w = shape
    blocks = rng.integers(0, classes, (n, h // 4 + 1, w // 4 + 1))
    target = blocks.repeat(4, axis=1).repeat(4, axis=2)[:, :h, :w].copy()
    prediction = np.where(rng.random(shape) < 2 / 3, target, rng.integers(0, classes, shape))
    target[rng.random(shape) < void] = 255
    return torch.from_numpy(prediction), torch.from_numpy(target)


def scores_of(prediction, target, classes):
    metric = ConfusionMatrix(classes)
    metric.update(prediction, target)
    return segmentation_scores(metric.compute())


# Mean IoU.


def naive_scores(prediction, target, classes):
    """IoU by the definition: sets of pixels, one class at a time."""
    iou = []
    pairs = list(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    pairs = [(p, t) for p, t in pairs if t != 255]
    for c in range(classes):
        intersection = sum(p == c and t == c for p, t in pairs)
        union = sum(p == c or t == c for p, t in pairs)
        iou.append(intersection / union if union else math.nan)
    occurring = [x for x in iou if not math.isnan(x)]
    return sum(occurring) / len(occurring), iou, sum(p == t for p, t in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_loops(seed):
    prediction, target = random_labels(seed)
    scores = scores_of(prediction, target, 7)  # classes 5 and 6 do not occur
    mean, iou, accuracy = naive_scores(prediction, target, 7)
    assert scores.mean_iou == pytest.approx(mean, abs=1e-15)
    assert scores.iou == pytest.approx(tuple(iou), abs=1e-15, nan_ok=True)
    assert scores.pixel_accuracy == pytest.approx(accuracy, abs=1e-15)
    assert all(math.isnan(x) for x in scores.iou[5:])


def test_by_hand():
    prediction = labels("0011 0011 2222")
    target = labels("0001 0#11 2#11")
    # 0: TP 3, FN 1, FP 0.  1: TP 3, FP 1, FN 2.  2: TP 1, FP 2.
    scores = scores_of(prediction, target, 4)
    assert scores.iou[:3] == (3 / 4, 3 / 6, 1 / 3)
    assert math.isnan(scores.iou[3])
    assert scores.mean_iou == pytest.approx((3 / 4 + 1 / 2 + 1 / 3) / 3)
    assert scores.pixel_accuracy == 7 / 10


def test_class_that_is_only_predicted_counts_zero():
    scores = scores_of(labels("0002"), labels("0000"), 3)
    assert scores.iou[0] == 3 / 4
    assert math.isnan(scores.iou[1])
    assert scores.iou[2] == 0
    assert scores.mean_iou == 3 / 8


def test_prediction_on_void_does_not_count():
    assert scores_of(labels("0012"), labels("00##"), 3).iou[0] == 1


def test_nothing_to_score_is_nan_and_null():
    scores = scores_of(labels("01"), labels("##"), 2)
    assert math.isnan(scores.mean_iou)
    assert math.isnan(scores.pixel_accuracy)
    expected = {"mean_iou": None, "pixel_accuracy": None, "iou": {"a": None, "b": None}}
    expected |= {"classes_scored": 0, "classes": 2}
    assert scores.to_json(("a", "b")) == expected
    json.dumps(scores.to_json(("a", "b")), allow_nan=False)


def test_a_mean_says_over_how_many_classes_it_is():
    alone = segmentation_scores(torch.tensor([[9, 0], [0, 0]]))
    json = alone.to_json(("a", "b"))
    assert (json["mean_iou"], json["classes_scored"], json["classes"]) == (1, 1, 2)
    assert alone.table(("a", "b")).rows[-1] == ("mean IoU over 1 of 2 classes", "100.0")
    both = segmentation_scores(torch.tensor([[9, 0], [0, 1]]))
    assert both.table(("a", "b")).rows[-1] == ("mean", "100.0")


def test_logits_are_taken_too():
    prediction, target = random_labels(0)
    logits = torch.nn.functional.one_hot(prediction, 5).permute(0, 3, 1, 2).float()
    assert scores_of(logits, target, 5) == scores_of(prediction, target, 5)


def test_equals_torchmetrics_where_all_classes_occur():
    prediction, target = random_labels(3)
    theirs = MulticlassJaccardIndex(5, average="none", ignore_index=255)(prediction, target)
    assert scores_of(prediction, target, 5).iou == pytest.approx(theirs.tolist(), abs=1e-6)


def test_parts_add_up_to_the_last_digit():
    prediction, target = random_labels(1, shape=(13, 17, 23))
    whole, parts = ConfusionMatrix(5), [ConfusionMatrix(5) for _ in range(3)]
    whole.update(prediction, target)
    for i in range(13):
        parts[i % 3].update(prediction[i : i + 1], target[i : i + 1])
    total = sum(part.compute() for part in parts)
    assert total.dtype == torch.int64
    assert torch.equal(total, whole.compute())
    assert segmentation_scores(total) == segmentation_scores(whole.compute())


def test_ground_truth_is_in_the_rows():
    metric = ConfusionMatrix(3)
    metric.update(labels("12"), labels("00"))
    assert metric.compute().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("bad", ["prediction", "target"])
@pytest.mark.parametrize("label", [3, -1, 254])
def test_label_out_of_range(bad, label):
    pair = {"prediction": labels("01"), "target": labels("01")}
    pair[bad] = torch.tensor([[[0, label]]])
    with pytest.raises(ValueError, match=f"labels of {bad} to be 0 to 2, but got {label}"):
        ConfusionMatrix(3).update(pair["prediction"], pair["target"])


def test_void_is_no_prediction():
    with pytest.raises(ValueError, match=r"labels of prediction to be .* but got 255"):
        ConfusionMatrix(3).update(labels("0#"), labels("01"))


def test_one_class():
    target = torch.tensor([[[0, 0, 255]]])
    scores = scores_of(torch.zeros(1, 1, 3, dtype=torch.int64), target, classes=1)
    assert (scores.mean_iou, scores.iou, scores.pixel_accuracy) == (1, (1,), 1)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"but got \[1, 1, 2\] and \[1, 1, 3\]"):
        ConfusionMatrix(3).update(labels("01"), labels("012"))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_confusion_of_another_shape(shape):
    with pytest.raises(ValueError, match="expected confusion to be"):
        segmentation_scores(torch.zeros(shape))


# Connected regions.


def flooded(grid: np.ndarray) -> np.ndarray:
    """Regions by flooding, one pixel after the other."""
    regions = np.full(grid.shape, -1)
    count = 0
    for start in np.ndindex(grid.shape):
        if regions[start] >= 0:
            continue
        regions[start] = count
        queue = deque([start])
        while queue:
            y, x = queue.popleft()
            for place in np.ndindex(3, 3):
                v, u = y + place[0] - 1, x + place[1] - 1
                inside = 0 <= v < grid.shape[0] and 0 <= u < grid.shape[1]
                if inside and regions[v, u] < 0 and grid[v, u] == grid[start]:
                    regions[v, u] = count
                    queue.append((v, u))
        count += 1
    return regions


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 17), (40, 31)])
@pytest.mark.parametrize("classes", [1, 2, 3, 9])
def test_regions_agree_with_flooding(shape, classes):
    for seed in range(5):
        grid = np.random.default_rng(seed).integers(0, classes, shape)
        np.testing.assert_array_equal(connected_regions(grid), flooded(grid))


def test_regions_of_long_paths():
    """Of a line that runs to and fro, and of a spiral."""
    snake = np.zeros((41, 41), dtype=int)
    snake[::2] = snake[1::4, -1] = snake[3::4, 0] = 1
    spiral = np.ones((1, 1), dtype=int)
    while len(spiral) < 41:  # another turn around it
        spiral = np.rot90(np.pad(spiral, ((0, 2), (0, 0))))
        spiral[:, -1] = spiral[0] = 1
    for grid in (snake, spiral):
        assert grid.sum() > 700
        np.testing.assert_array_equal(connected_regions(grid), flooded(grid))
        np.testing.assert_array_equal(connected_regions(grid.T), flooded(grid.T))


def test_no_regions_in_no_pixels():
    assert connected_regions(np.zeros((0, 5), dtype=int)).shape == (0, 5)


# IoU by size.


def naive_counts(prediction, target, classes, small, large, background):
    """The definition, pixel by pixel."""
    counts = np.zeros((3, classes, 4), dtype=np.int64)
    for predicted, known in zip(prediction.numpy(), target.numpy(), strict=True):
        regions = flooded(known)
        for region in range(regions.max() + 1):
            pixels = np.argwhere(regions == region)
            label = known[tuple(pixels[0])]
            if label in (255, background):
                continue
            (y1, x1), (y2, x2) = pixels.min(0), pixels.max(0)
            grow_y, grow_x = math.ceil((y2 - y1 + 1) / 2), math.ceil((x2 - x1 + 1) / 2)
            size = 0 if len(pixels) < small else 1 if len(pixels) <= large else 2
            counts[size, label, 3] += 1
            for y, x in np.ndindex(known.shape):
                if regions[y, x] == region:
                    counts[size, label, 0 if predicted[y, x] == label else 2] += 1
                    continue
                near = y1 - grow_y <= y <= y2 + grow_y and x1 - grow_x <= x <= x2 + grow_x
                if near and predicted[y, x] == label and known[y, x] not in (label, 255):
                    counts[size, label, 1] += 1
    return counts


@pytest.mark.parametrize("background", [0, 2, None])
@pytest.mark.parametrize("seed", range(3))
def test_object_counts_agree_with_loops(seed, background):
    prediction, target = random_labels(seed, void=0.02)
    metric = ObjectCounts(6, small=12, large=30, background=background)
    metric.update(prediction, target)
    expected = naive_counts(prediction, target, 6, 12, 30, background)
    assert (expected[:, :5, 3].sum(1) > 0).all()
    np.testing.assert_array_equal(metric.compute().numpy(), expected)


def test_object_counts_by_hand():
    target = labels("""
        ..........
        .11....2..
        .11......1
        ..........
        ..........
    """)
    prediction = labels("""
        .1........
        .11.1..2..
        .1.....2.1
        ..........
        .....1....
    """)
    metric = ObjectCounts(3, small=2, large=3)
    metric.update(prediction, target)
    counts = metric.compute()
    # The square: window rows 0-3, columns 0-3, in which one pixel is spilled; (1, 4) and (4, 5)
    # are outside it.
    assert counts[2, 1].tolist() == [3, 1, 1, 1]
    # The single pixels: windows of 3 by 3.
    assert counts[0, 1].tolist() == [1, 0, 0, 1]
    assert counts[0, 2].tolist() == [1, 1, 0, 1]
    assert counts[1].sum() == 0
    scores = size_scores(counts)
    assert scores["large"].mean_iou == 3 / 5
    assert scores["small"].mean_iou == (1 + 1 / 2) / 2
    assert scores["small"].objects == 2
    assert math.isnan(scores["medium"].mean_iou)
    assert scores["small"].to_json(("bg", "a", "b")) == {
        "mean_iou": 3 / 4,
        "objects": 2,
        "iou": {"bg": None, "a": 1.0, "b": 0.5},
    }


def test_void_and_neighbors_of_the_class_do_not_count():
    target = labels("1#1..")
    prediction = labels("111..")
    metric = ObjectCounts(2)
    metric.update(prediction, target)
    assert metric.compute()[0, 1].tolist() == [2, 0, 0, 2]


def test_thresholds_are_those_of_coco():
    target = torch.zeros(1, 200, 200, dtype=torch.int64)
    target[0, :31, :33] = 1  # 1023: small
    target[0, :32, 40:72] = 2  # 1024: medium
    target[0, 50:146, 0:96] = 3  # 9216: medium
    target[0, 50:147, 100:196] = 4  # 9312: large
    metric = ObjectCounts(5)
    metric.update(target, target)
    assert metric.compute()[..., 3].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert [score.mean_iou for score in size_scores(metric.compute()).values()] == [1, 1, 1]


def test_object_counts_add_up():
    prediction, target = random_labels(5, shape=(6, 17, 23))
    whole, parts = ObjectCounts(5), ObjectCounts(5)
    whole.update(prediction, target)
    for i in range(6):
        parts.update(prediction[i : i + 1], target[i : i + 1])
    assert torch.equal(whole.compute(), parts.compute())
    parts.reset()
    assert parts.counts.sum() == 0


def test_object_counts_refuse_bad_input():
    metric = ObjectCounts(3)
    with pytest.raises(ValueError, match=r"\[N, H, W\], but got \[1, 1, 2\] and \[1, 1, 3\]"):
        metric.update(labels("01"), labels("012"))
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        metric.update(labels("01")[0], labels("01")[0])
    with pytest.raises(ValueError, match="labels of target to be 0 to 2, but got 3"):
        metric.update(labels("01"), labels("03"))
    with pytest.raises(ValueError, match="small=5, large=4"):
        ObjectCounts(3, small=5, large=4)
