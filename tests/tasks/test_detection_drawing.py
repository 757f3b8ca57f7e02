import numpy as np
import pytest
import torch

from deformnet.inference import draw_boxes, palette
from deformnet.visualization.drawing import distinct_colors, legible_on

CLASSES = ("cat", "dog", "hovercraft")


def grey(height, width, value=100):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def has_colour(drawn, colour):
    return (np.asarray(drawn) == colour).all(axis=-1)


@pytest.mark.parametrize("scores", [None, torch.tensor([0.2, 0.9])])
def test_lines_run_along_the_boxes(scores):
    boxes = torch.tensor([[50.0, 60, 250, 220], [300, 300, 580, 520]])
    drawn = np.asarray(draw_boxes(grey(600, 700), boxes, torch.tensor([0, 2]), CLASSES, scores))
    assert drawn.shape[0] > 600, "the legend comes below"
    for (x1, y1, x2, y2), label in (((50, 60, 250, 220), 0), ((300, 300, 580, 520), 2)):
        line = has_colour(drawn, palette(CLASSES)[label])
        # Whole sides in the class's colour, but for where the tag may hang.
        assert line[y1 + 30 : y2 - 30, x1].all()
        assert line[y1 + 30 : y2 - 30, x2 - 1].all()
        assert line[y2 - 1, x1 + 80 : x2 - 80].all()
        assert line[y1, x1 + 100 : x2 - 100].all()
        inside = drawn[y1 + 30 : y2 - 30, x1 + 10 : x2 - 10]
        assert (inside == 100).all(), "what is found stays visible"
        outside = has_colour(drawn[:600], palette(CLASSES)[label])
        outside[y1 - 30 : y2 + 30, x1:x2] = False
        assert not outside.any()


def test_no_boxes_leave_the_image_as_it_is():
    image = torch.randint(0, 256, (3, 500, 600), dtype=torch.uint8)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    before = image.clone()
    assert np.array_equal(
        np.asarray(draw_boxes(image, *nothing, CLASSES, torch.zeros(0))),
        image.permute(1, 2, 0).numpy(),
    )
    draw_boxes(image, torch.tensor([[5.0, 5, 90, 90]]), torch.tensor([0]), CLASSES)
    assert torch.equal(image, before), "drawing does not change what it is given"


def test_small_images_are_enlarged_and_boxes_with_them():
    drawn = np.asarray(
        draw_boxes(grey(40, 60), torch.tensor([[10.0, 5, 50, 35]]), torch.tensor([1]), CLASSES)
    )
    scale = 8
    assert drawn.shape[1] == scale * 60
    line = has_colour(drawn[: scale * 40], palette(CLASSES)[1])
    rows, columns = np.nonzero(line)
    assert columns.min() == scale * 10
    assert columns.max() == scale * 50 - 1
    assert rows.max() == scale * 35 - 1


def test_a_strip_does_not_become_huge():
    drawn = draw_boxes(grey(3000, 2), torch.tensor([[0.0, 0, 2, 9]]), torch.tensor([0]), CLASSES)
    assert drawn.width * drawn.height < 100_000


@pytest.mark.parametrize(
    "box", [[-500.0, -20, 900, 700], [30, 30, 30, 30], [600, 400, 700, 500], [90, 80, 20, 10]]
)
def test_boxes_of_any_kind_can_be_drawn(box):
    """Outside the image, without area, inverted: a data set may have them."""
    drawn = draw_boxes(grey(400, 600), torch.tensor([box]), torch.tensor([0]), CLASSES)
    assert drawn.width == 600


def test_better_boxes_lie_on_top():
    boxes = torch.tensor([[100.0, 100, 300, 300], [100, 100, 300, 300]])
    labels = torch.tensor([0, 1])
    for scores, top in ((torch.tensor([0.3, 0.6]), 1), (torch.tensor([0.6, 0.3]), 0), (None, 0)):
        drawn = np.asarray(draw_boxes(grey(600, 600), boxes, labels, CLASSES, scores))
        assert (drawn[200, 100] == palette(CLASSES)[top]).all()


def test_tags_do_not_cover_one_another():
    """Of two boxes in one place the lower one's lines are hidden, but neither tag is."""

    def drawn_colours(*labels):
        boxes = torch.tensor([[200.0, 200, 400, 400]] * len(labels))
        drawn = np.asarray(draw_boxes(grey(600, 600), boxes, torch.tensor(labels), CLASSES))[:600]
        return [has_colour(drawn, palette(CLASSES)[label]) for label in labels]

    alone = drawn_colours(1)[0]
    alone[200:400, 200:400] = False  # the lines; the tag hangs above
    assert alone.sum() > 100
    upper, lower = drawn_colours(0, 1)
    assert lower.sum() == alone.sum()
    assert np.array_equal(upper[:200], drawn_colours(0)[0][:200])


def test_text_can_be_read_on_every_colour():
    """The contrast that WCAG 2 asks of text: 4.5."""

    def luminance(colour):
        c = np.asarray(colour) / 255
        linear = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for colour in distinct_colors(80):
        text = {"black": 0.0, "white": 1.0}[legible_on(tuple(int(c) for c in colour))]
        light, dark = max(luminance(colour), text), min(luminance(colour), text)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour
