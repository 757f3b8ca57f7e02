import math

import pytest
import torch
from detector_testing import iou, random_boxes
from torchvision import ops

from deformnet.models.detection.detector import Candidates
from deformnet.models.detection.postprocess import merge, postprocess

THRESHOLD = 0.05


def crowd(count=60, classes=4, *, own_boxes=False, seed=0):
    """Candidates many of which overlap."""
    torch.manual_seed(seed)
    middles = random_boxes(6)[torch.randint(6, (count,))]
    boxes = middles + torch.randn(count, 4) * 2
    if own_boxes:
        boxes = boxes[:, None] + torch.randn(count, classes, 4)
    scores = (torch.randn(count, classes + 1) * 1.5).softmax(dim=1)[:, 1:]
    return Candidates(boxes, scores)


def of_class(candidates, label):
    """(score, box) of one class above the threshold, best first."""
    boxes = candidates.boxes if candidates.boxes.ndim == 2 else candidates.boxes[:, label]
    pairs = list(zip(candidates.scores[:, label].tolist(), boxes.tolist(), strict=True))
    return sorted((pair for pair in pairs if pair[0] > THRESHOLD), key=lambda pair: -pair[0])


def suppressed(pairs, threshold):
    kept = []
    for score, box in pairs:
        if all(iou(box, other) <= threshold for _, other in kept):
            kept.append((score, box))
    return kept


def softly_suppressed(pairs):
    left, kept = list(pairs), []
    while left:
        best = max(left, key=lambda pair: pair[0])
        left.remove(best)
        if best[0] <= THRESHOLD:
            break
        kept.append(best)
        left = [(score * math.exp(-(iou(box, best[1]) ** 2) / 0.6), box) for score, box in left]
    return kept


def averaged(kept, pairs):
    result = []
    for score, box in kept:
        votes = [pair for pair in pairs if iou(pair[1], box) >= 0.5]
        total = sum(weight for weight, _ in votes)
        result.append(
            (score, [sum(weight * other[i] for weight, other in votes) / total for i in range(4)])
        )
    return result


@pytest.mark.parametrize("own_boxes", [False, True], ids=["shared boxes", "own boxes"])
@pytest.mark.parametrize("box_averaging", [False, True], ids=["", "averaging"])
@pytest.mark.parametrize("soft_nms", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("limit", [11, 300])
def test_against_loops(own_boxes, box_averaging, soft_nms, limit):
    candidates = crowd(own_boxes=own_boxes)
    expected = []
    for label in range(4):
        pairs = of_class(candidates, label)
        kept = softly_suppressed(pairs) if soft_nms else suppressed(pairs, 0.4)
        if box_averaging:
            kept = averaged(kept, pairs)
        expected += [(score, label, box) for score, box in kept]
    everything = sum(len(of_class(candidates, label)) for label in range(4))
    assert 11 < len(expected) < everything  # something is suppressed, something is left
    expected = sorted(expected, key=lambda entry: -entry[0])[:limit]
    found = postprocess(
        candidates,
        score_threshold=THRESHOLD,
        nms=0.4,
        max_detections=limit,
        soft_nms=soft_nms,
        box_averaging=box_averaging,
    )
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([score for score, _, _ in expected]))
    torch.testing.assert_close(found.boxes, torch.tensor([box for _, _, box in expected]))


def test_the_same_box_may_have_two_classes():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 10.0, 10.0]])
    found = postprocess(Candidates(boxes, torch.tensor([[0.3, 0.6], [0.25, 0.1]])))
    assert found.labels.tolist() == [1, 0]
    assert torch.equal(found.boxes, boxes[[0, 0]])


def test_an_overlap_of_exactly_the_threshold_remains():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 1.0], [2.0, 0.0, 4.0, 1.0]])  # IoU 1/2
    candidates = Candidates(boxes, torch.tensor([[0.9], [0.8]]))
    assert len(postprocess(candidates, nms=0.5).boxes) == 2
    assert len(postprocess(candidates, nms=0.49).boxes) == 1


def test_ties_keep_the_order_of_the_candidates():
    boxes = torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(40)])
    found = postprocess(Candidates(boxes, torch.full((40, 2), 0.25)), max_detections=50)
    assert found.labels.tolist() == [0] * 40 + [1] * 10
    assert torch.equal(found.boxes, torch.cat((boxes, boxes[:10])))


@pytest.mark.parametrize("soft_nms", [False, True])
@pytest.mark.parametrize("box_averaging", [False, True])
def test_what_is_not_finite_or_has_no_area_is_never_selected(soft_nms, box_averaging):
    nan, inf = math.nan, math.inf
    good = [10.0, 10.0, 30.0, 20.0]
    bad = [
        [nan, 10.0, 30.0, 20.0],
        [10.0, 10.0, inf, 20.0],
        [-inf, 10.0, inf, 20.0],
        [inf, 10.0, inf, 20.0],
        [10.0, 10.0, 10.0, 20.0],
        [10.0, 20.0, 30.0, 10.0],
        [30.0, 20.0, 10.0, 10.0],
        [-1e30, -1e30, 1e30, 1e30],
        [0.0, 0.0, 1e-30, 1e-30],  # its area is zero in float32
    ]
    boxes = torch.tensor([*bad, good, good])
    scores = torch.tensor([0.9] * len(bad) + [nan, 0.4])[:, None]
    found = postprocess(Candidates(boxes, scores), soft_nms=soft_nms, box_averaging=box_averaging)
    torch.testing.assert_close(found.boxes, torch.tensor([good]))
    assert found.scores.tolist() == scores[-1].tolist()


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (5, 4)], ids=str)
@pytest.mark.parametrize("soft_nms", [False, True])
def test_nothing_to_select(shape, soft_nms):
    boxes, scores = torch.ones(shape), torch.zeros(shape[0], 3)
    found = postprocess(Candidates(boxes, scores), soft_nms=soft_nms, box_averaging=True)
    assert [list(part.shape) for part in found] == [[0, 4], [0], [0]]
    assert found.labels.dtype == torch.int64


def test_an_untrained_network_with_many_classes_is_feasible(monkeypatch):
    entered = []

    def counted(boxes, scores, threshold):
        entered.append(scores)
        return torch.arange(min(len(scores), 500))

    monkeypatch.setattr(ops, "nms", counted)
    torch.manual_seed(0)
    scores = torch.rand(20_000, 80) / 80 + 0.002
    found = postprocess(Candidates(random_boxes(20_000), scores))
    assert len(found.scores) == 300
    assert len(entered) == 80
    for label in (0, 79):
        best = scores[:, label].sort(descending=True).values[:6000]
        assert torch.equal(entered[label], best)


def test_merged_runs_count_as_one():
    first, second = crowd(20, seed=1), crowd(30, seed=2)
    merged = merge([first, second])
    assert torch.equal(merged.boxes, torch.cat((first.boxes, second.boxes)))
    assert torch.equal(merged.scores, torch.cat((first.scores, second.scores)))
    alone = merge([first])
    assert torch.equal(alone.boxes, first.boxes)
    assert torch.equal(alone.scores, first.scores)


def test_merged_runs_may_differ_in_whether_classes_have_boxes():
    shared, own = crowd(20), crowd(30, own_boxes=True)
    merged = merge([shared, own])
    assert merged.boxes.shape == (50, 4, 4)
    for label in range(4):
        assert torch.equal(merged.boxes[:20, label], shared.boxes)
    assert torch.equal(merged.boxes[20:], own.boxes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score_threshold": -0.1}, "expected score_threshold to be 0 to 1, but got -0.1"),
        ({"score_threshold": math.nan}, "expected score_threshold to be 0 to 1, but got nan"),
        ({"nms": 1.5}, "expected nms to be an IoU from 0 to 1, but got 1.5"),
        ({"max_detections": 0}, "expected max_detections to be at least 1, but got 0"),
    ],
)
def test_wrong_numbers(changed, message):
    with pytest.raises(ValueError, match=message):
        postprocess(crowd(), **changed)


@pytest.mark.parametrize("shape", [(60,), (59, 4), (60, 3, 4), (60, 5)], ids=str)
def test_wrong_shapes(shape):
    message = r"expected candidates to have boxes .* and scores .*, but got \["
    with pytest.raises(ValueError, match=message):
        postprocess(Candidates(torch.zeros(shape), torch.zeros(60, 4)))


def test_merging_nothing():
    message = "expected parts to have candidates of at least one pass, but got none"
    with pytest.raises(ValueError, match=message):
        merge([])
