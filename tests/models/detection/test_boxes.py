import math

import pytest
import torch
from detector_testing import random_boxes
from torchvision.ops import box_iou, clip_boxes_to_image

from deformnet.models.detection.boxes import HEAD, UNIT, decode, encode

# The authors' boxes name their first and last pixel, and all sizes have a "+1". Here are their
# formulas on such boxes (x1, y1, x2, y2), written down one number at a time.


def inclusive(boxes):
    """The authors' box of the same pixels."""
    return [[x1, y1, x2 - 1, y2 - 1] for x1, y1, x2, y2 in boxes.tolist()]


def center_and_size(box):
    width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
    return box[0] + 0.5 * (width - 1), box[1] + 0.5 * (height - 1), width, height


def authors_encode(box, anchor, stds):
    x, y, width, height = center_and_size(box)
    anchor_x, anchor_y, anchor_width, anchor_height = center_and_size(anchor)
    deltas = (
        (x - anchor_x) / anchor_width,
        (y - anchor_y) / anchor_height,
        math.log(width / anchor_width),
        math.log(height / anchor_height),
    )
    return [delta / std for delta, std in zip(deltas, stds, strict=True)]


def authors_decode(deltas, anchor, stds):
    x, y, width, height = center_and_size(anchor)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds, strict=True))
    x, y = x + dx * width, y + dy * height
    half_width = 0.5 * (width * math.exp(dw) - 1)
    half_height = 0.5 * (height * math.exp(dh) - 1)
    return [x - half_width, y - half_height, x + half_width, y + half_height]


@pytest.mark.parametrize("stds", [UNIT, HEAD], ids=["unit", "head"])
def test_the_authors_arithmetic_on_inclusive_boxes_agrees(stds):
    torch.manual_seed(0)
    boxes, anchors = random_boxes(30).double(), random_boxes(30).double()
    deltas = encode(boxes, anchors, stds)
    expected = [
        authors_encode(box, anchor, stds)
        for box, anchor in zip(inclusive(boxes), inclusive(anchors), strict=True)
    ]
    torch.testing.assert_close(deltas, torch.tensor(expected, dtype=torch.float64))

    deltas = torch.randn(30, 4, dtype=torch.float64)
    decoded = decode(deltas, anchors, stds)
    expected = [
        authors_decode(delta, anchor, stds)
        for delta, anchor in zip(deltas.tolist(), inclusive(anchors), strict=True)
    ]
    torch.testing.assert_close(
        decoded - torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor(expected, dtype=torch.float64)
    )


def test_the_authors_overlaps_and_clipping_agree():
    torch.manual_seed(1)
    boxes = random_boxes(40).round().double()
    pixels = [
        {(x, y) for x in range(int(x1), int(x2) + 1) for y in range(int(y1), int(y2) + 1)}
        for x1, y1, x2, y2 in inclusive(boxes)
    ]
    expected = torch.tensor([[len(a & b) / len(a | b) for a in pixels] for b in pixels])
    torch.testing.assert_close(box_iou(boxes, boxes), expected.double(), rtol=0, atol=1e-7)

    # Boxes that reach into the image, as anchors and predictions around objects do.
    height, width = 40, 70
    boxes = boxes[(boxes[:, :2] < torch.tensor([width, height])).all(dim=1)]
    boxes = boxes[(boxes[:, 2:] > 0).all(dim=1)]
    assert len(boxes) > 10
    clipped = [
        [max(x1, 0), max(y1, 0), min(x2, width - 1), min(y2, height - 1)]
        for x1, y1, x2, y2 in inclusive(boxes)
    ]
    assert inclusive(clip_boxes_to_image(boxes, (height, width))) == clipped


def test_decoding_undoes_encoding_for_each_class():
    torch.manual_seed(2)
    anchors = random_boxes(12)
    boxes = torch.stack([random_boxes(12) for _ in range(5)], dim=1)
    deltas = torch.stack([encode(boxes[:, c], anchors, HEAD) for c in range(5)], dim=1)
    torch.testing.assert_close(decode(deltas, anchors, HEAD), boxes, rtol=1e-5, atol=1e-4)


def test_a_wild_answer_stays_finite():
    anchors = torch.tensor([[0.0, 0.0, 16.0, 8.0]])
    box = decode(torch.tensor([[0.0, 0.0, 1e4, -1e4]]), anchors)[0]
    torch.testing.assert_close(box[2] - box[0], torch.tensor(1000.0))
    assert box[3] == box[1]


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4)], ids=str)
def test_no_boxes(shape):
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert decode(torch.zeros(shape), torch.zeros(0, 4), HEAD).shape == shape


def test_half_precision_does_not_round_corners():
    anchors = torch.tensor([[700.25, 300.5, 900.75, 520.125]])
    for dtype in (torch.float16, torch.bfloat16):
        boxes = decode(torch.zeros(1, 4, dtype=dtype), anchors)
        assert boxes.dtype == torch.float32
        assert torch.equal(boxes, anchors)
