"""Label maps and boxes as pictures."""

import numpy as np
import pytest
import torch

from deformnet.visualization.drawing import (
    distinct_colors,
    draw_boxes,
    label_image,
    legible_on,
    overlay,
    palette,
)
from pictures import noise

CLASSES = ("cat", "dog", "hovercraft")
LABELS = ("background", "one", "two")


def gray(height, width, value=100):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def boxes_on(image, boxes, labels, scores=None):
    """What `draw_boxes` makes of lists: [H, W, 3]."""
    scores = None if scores is None else torch.tensor(scores)
    boxes, labels = torch.tensor(boxes).float(), torch.tensor(labels)
    return np.asarray(draw_boxes(image, boxes, labels, CLASSES, scores))


def has_color(drawn, color):
    return (drawn == color).all(axis=-1)


@pytest.mark.parametrize("scores", [None, [0.2, 0.9]])
def test_lines_run_along_the_boxes(scores):
    boxes = [[50, 60, 250, 220], [300, 300, 580, 520]]
    drawn = boxes_on(gray(600, 700), boxes, [0, 2], scores)
    assert drawn.shape[0] > 600, "the legend comes below"
    for (x1, y1, x2, y2), label in zip(boxes, [0, 2], strict=True):
        line = has_color(drawn, palette(CLASSES)[label])
        # Whole sides in the class's color, but for where the tag may hang.
        assert line[y1 + 30 : y2 - 30, x1].all()
        assert line[y1 + 30 : y2 - 30, x2 - 1].all()
        assert line[y2 - 1, x1 + 80 : x2 - 80].all()
        assert line[y1, x1 + 100 : x2 - 100].all()
        inside = drawn[y1 + 30 : y2 - 30, x1 + 10 : x2 - 10]
        assert (inside == 100).all(), "what is found stays visible"
        outside = has_color(drawn[:600], palette(CLASSES)[label])
        outside[y1 - 30 : y2 + 30, x1:x2] = False
        assert not outside.any()


def test_no_boxes_leave_the_image_as_it_is():
    image = noise(500, 600)
    before = image.clone()
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    drawn = draw_boxes(image, *nothing, CLASSES, torch.zeros(0))
    assert np.array_equal(np.asarray(drawn), image.permute(1, 2, 0).numpy())
    boxes_on(image, [[5, 5, 90, 90]], [0])
    assert torch.equal(image, before), "drawing does not change what it is given"


def test_small_images_are_enlarged_and_boxes_with_them():
    drawn = boxes_on(gray(40, 60), [[10, 5, 50, 35]], [1])
    scale = 8
    assert drawn.shape[1] == scale * 60
    line = has_color(drawn[: scale * 40], palette(CLASSES)[1])
    rows, columns = np.nonzero(line)
    assert columns.min() == scale * 10
    assert columns.max() == scale * 50 - 1
    assert rows.max() == scale * 35 - 1


def test_a_strip_does_not_become_huge():
    assert boxes_on(gray(3000, 2), [[0, 0, 2, 9]], [0]).size < 300_000


@pytest.mark.parametrize(
    "box", [[-500.0, -20, 900, 700], [30, 30, 30, 30], [600, 400, 700, 500], [90, 80, 20, 10]]
)
def test_boxes_of_any_kind_can_be_drawn(box):
    """Outside the image, without area, inverted: a data set may have them."""
    assert boxes_on(gray(400, 600), [box], [0]).shape[1] == 600


def test_better_boxes_lie_on_top():
    for scores, top in (([0.3, 0.6], 1), ([0.6, 0.3], 0), (None, 0)):
        drawn = boxes_on(gray(600, 600), [[100, 100, 300, 300]] * 2, [0, 1], scores)
        assert (drawn[200, 100] == palette(CLASSES)[top]).all()


def test_tags_do_not_cover_one_another():
    """Of two boxes in one place the lower one's lines are hidden, but neither tag is."""

    def drawn_colors(*labels):
        drawn = boxes_on(gray(600, 600), [[200, 200, 400, 400]] * len(labels), labels)[:600]
        return [has_color(drawn, palette(CLASSES)[label]) for label in labels]

    alone = drawn_colors(1)[0]
    alone[200:400, 200:400] = False  # the lines; the tag hangs above
    assert alone.sum() > 100
    upper, lower = drawn_colors(0, 1)
    assert lower.sum() == alone.sum()
    assert np.array_equal(upper[:200], drawn_colors(0)[0][:200])


def test_text_can_be_read_on_every_color():
    """The contrast that WCAG 2 asks of text: 4.5."""

    def luminance(color):
        c = np.asarray(color) / 255
        linear = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for color in distinct_colors(80):
        text = {"black": 0.0, "white": 1.0}[legible_on(tuple(int(c) for c in color))]
        light, dark = max(luminance(color), text), min(luminance(color), text)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, color


def test_colors_can_be_told_apart():
    colors = distinct_colors(30).astype(int)
    apart = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 999 * np.eye(30, dtype=int)
    assert apart.min() > 60
    assert np.array_equal(distinct_colors(5), distinct_colors(30)[:5])
    assert len(distinct_colors(255)) == 255


def test_overlay_tints_classes_and_leaves_the_background():
    image = gray(600, 600)
    labels = torch.zeros(600, 600, dtype=torch.uint8)
    labels[200:400, 200:400] = 2
    drawn = np.asarray(overlay(image, labels, LABELS))
    assert drawn.shape[0] > 600, "the legend comes below"
    assert (drawn[:199, :600] == 100).all()
    assert (drawn[200, 300] == palette(LABELS)[2]).all(), "the outline has the class's color"
    inside = drawn[300, 300].astype(int)
    color = palette(LABELS)[2].astype(int)
    assert np.abs(inside - color).sum() < np.abs(100 - color).sum()
    swatches = has_color(drawn[600:], color).sum()
    assert swatches > 100


def test_an_empty_scene_has_no_legend():
    image = noise(600, 500)
    drawn = overlay(image, torch.zeros(600, 500, dtype=torch.uint8), LABELS)
    assert np.array_equal(np.asarray(drawn), image.permute(1, 2, 0).numpy())


def test_label_image_keeps_the_labels():
    labels = torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8)
    assert np.array_equal(np.asarray(label_image(labels, LABELS)), labels.numpy())


def test_void_is_not_tinted():
    image = noise(500, 500)
    labels = torch.full((500, 500), 255, dtype=torch.uint8)
    drawn = np.asarray(overlay(image, labels, LABELS[1:]))
    assert np.array_equal(drawn, image.permute(1, 2, 0).numpy())
