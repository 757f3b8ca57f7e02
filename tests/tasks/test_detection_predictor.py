import math

import pytest
import torch
from torch import nn

from deformnet.models.detection.detector import Candidates, Detector, Features, Proposals
from deformnet.recipes import RFCNRecipe, TestTimeAugmentation
from deformnet.tasks.detection import DetectionPredictor

NONE = TestTimeAugmentation()
RGB = ("red", "green", "blue")


class Spy(Detector):
    """A detector that passes the image on as its features and notes what it is asked."""

    def __init__(self, num_classes=3):
        super().__init__(nn.Identity(), num_classes)
        self.seen = []
        self.asked = []

    def features(self, images):
        self.seen.append(tuple(images.shape))
        return Features(images, images)

    def propose(self, features, sizes):
        everything = torch.tensor([[0.0, 0.0, sizes[0][1], sizes[0][0]]])
        return [Proposals(everything, torch.ones(1))]

    def candidates(self, features, sizes, proposals):
        assert features.last.shape[2:] == sizes[0]
        self.asked.append(proposals[0].clone())
        return [self.answer(features.last, proposals[0])]

    def answer(self, image, proposals):
        raise NotImplementedError

    def losses(self, images, sizes, targets, proposals=None):
        raise NotImplementedError


class ColorFinder(Spy):
    """Finds the box around all red, all green and all blue pixels of what it sees, surely."""

    takes_proposals = False

    def answer(self, image, proposals):
        boxes, scores = [], []
        for channel, color in enumerate(image[0]):
            mean, std = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))[channel]
            rows, columns = torch.nonzero(color * std + mean > 0.5, as_tuple=True)
            if len(rows) == 0:
                continue
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            scores.append([0.9 - 0.2 * channel if k == channel else 0.0 for k in range(3)])
        return Candidates(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(scores).reshape(-1, 3),
        )


class Repeater(Spy):
    """Returns the boxes it is asked about, the first one with the highest score."""

    def answer(self, image, proposals):
        falling = 0.9 * 0.9999 ** torch.arange(len(proposals))
        return Candidates(proposals, torch.stack([falling, 0 * falling, 0 * falling], dim=1))


def black(height, width):
    return torch.zeros(3, height, width, dtype=torch.uint8)


def colored(height, width, boxes):
    """A black image with a box of each color; boxes in whole pixels."""
    image = black(height, width)
    for channel, (x1, y1, x2, y2) in enumerate(boxes):
        image[channel, y1:y2, x1:x2] = 255
    return image


def predictor(model, augmentation=NONE, **options):
    recipe = RFCNRecipe(**{"short_side": 40, "max_side": 80} | options)
    return DetectionPredictor(recipe, model, RGB[: model.num_classes], augmentation, "cpu")


@pytest.mark.parametrize("size", [(40, 60), (60, 40)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(), (80,), (40, 80, 160)])
def test_boxes_come_back_in_pixels_of_the_image(size, flip, scales):
    """Whole factors, so that what is seen has edges on whole pixels at every size.

    A box that a flipped or enlarged view put elsewhere would be reported besides the right one.
    """
    boxes = [(3, 5, 21, 17), (0, 0, 8, 40), (30, 11, 40, 40)]
    predict = predictor(ColorFinder(), TestTimeAugmentation(scales=scales, flip=flip))
    detections = predict(colored(*size, boxes))
    assert torch.equal(detections.boxes, torch.tensor(boxes, dtype=torch.float32))
    assert torch.equal(detections.labels, torch.tensor([0, 1, 2]))
    assert torch.allclose(detections.scores, torch.tensor([0.9, 0.7, 0.5]))
    assert detections.boxes.dtype == torch.float32
    assert detections.labels.dtype == torch.int64


def test_flipped_input_is_flipped():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    seen = []
    model = ColorFinder()
    model.answer = lambda view, proposals: (
        seen.append(view.clone()) or Candidates(torch.zeros(0, 4), torch.zeros(0, 3))
    )
    predictor(model, TestTimeAugmentation(flip=True))(image)
    assert len(seen) == 2
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = (image.float() / 255 - mean) / std
    assert torch.allclose(seen[0][0], expected, atol=1e-6)
    assert torch.allclose(seen[1][0], expected[:, :, range(49, -1, -1)], atol=1e-6)


def test_edges_of_the_image_stay_its_edges():
    """At sizes that divide nothing; nothing may be reported outside, and the edge is exact."""
    for height, width in [(37, 53), (101, 61), (333, 500), (17, 290)]:
        model = Repeater()
        predict = predictor(model, TestTimeAugmentation(scales=(23, 48, 57), flip=True))
        detections = predict(black(height, width))
        assert len(detections.boxes) == 1
        assert detections.boxes[0].tolist() == [0, 0, width, height]


def test_the_bound_on_the_longer_side_grows_with_the_scale():
    model = ColorFinder()
    augmentation = TestTimeAugmentation(scales=(30, 45, 61), flip=True)
    predictor(model, augmentation, short_side=30, max_side=50)(black(100, 300))
    # 50 * 45 / 30 = 75 and 50 * 61 / 30 = 101.67, and the long side is the bound at 1:3.
    expected = [(1, 3, 17, 50), (1, 3, 25, 75), (1, 3, 34, 102)]
    assert model.seen == [size for size in expected for _ in range(2)]
    model = ColorFinder()
    predictor(model, augmentation, short_side=30, max_side=None)(black(100, 300))
    assert model.seen[::2] == [(1, 3, 30, 90), (1, 3, 45, 135), (1, 3, 61, 183)]


def test_stored_proposals_reach_every_view():
    model = Repeater()
    augmentation = TestTimeAugmentation(scales=(40, 80), flip=True)
    given = torch.tensor([[2.0, 3, 10, 9], [20, 10, 35, 20], [-5, -5, 70, 12]])
    detections = predictor(model, augmentation).predict(black(20, 40), given)
    inside = torch.tensor([[2.0, 3, 10, 9], [20, 10, 35, 20], [0, 0, 40, 12]])
    flipped = torch.tensor([[30.0, 3, 38, 9], [5, 10, 20, 20], [0, 0, 40, 12]])
    for asked, expected in zip(
        model.asked, [2 * inside, 2 * flipped, 4 * inside, 4 * flipped], strict=True
    ):
        assert torch.equal(asked, expected)
    assert torch.equal(detections.boxes, inside)
    assert given[2, 0] == -5, "what was given is left as it was"


@pytest.mark.parametrize(
    ("proposals", "problem"),
    [
        (torch.zeros(4), r"floating-point \[P, 4\], but got torch.float32 \[4\]"),
        (torch.zeros(3, 5), r"floating-point \[P, 4\], but got torch.float32 \[3, 5\]"),
        (torch.zeros(1, 4, dtype=torch.int64), "but got torch.int64"),
        (torch.tensor([[0, 0, 1, math.nan]]), "to be finite"),
        (torch.tensor([[0, 0, 1, math.inf]]), "to be finite"),
    ],
)
def test_other_proposals_are_refused(proposals, problem):
    with pytest.raises(ValueError, match=problem):
        predictor(Repeater()).predict(black(20, 20), proposals)


def test_proposals_come_back_in_pixels_of_the_image():
    """Seen once and upright, whatever the augmentation; here at twice the size of the image."""

    class Proposer(Repeater):
        def propose(self, features, sizes):
            assert sizes == [(40, 60)]
            boxes = torch.tensor([[0.0, 0, 60, 40], [10, 12, 21, 15]])
            return [Proposals(boxes, torch.tensor([0.5, 0.25]))]

    predict = predictor(Proposer(), TestTimeAugmentation(scales=(80, 160), flip=True))
    boxes, scores = predict.propose(black(20, 30))
    assert boxes.tolist() == [[0, 0, 30, 20], [5, 6, 10.5, 7.5]]
    assert scores.tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="expected image to be uint8"):
        predict.propose(torch.zeros(3, 20, 30))


def test_no_proposals_no_boxes():
    for refine in (1, 3):
        detections = predictor(Repeater(), TestTimeAugmentation(refine=refine)).predict(
            black(20, 20), torch.zeros(0, 4)
        )
        assert [len(values) for values in detections] == [0, 0, 0]


class TwoBoxes(Spy):
    def propose(self, features, sizes):
        return [Proposals(torch.tensor([[0.0, 0, 8, 8], [0, 20, 8, 28]]), torch.ones(2))]


class Walker(TwoBoxes):
    """Moves every box 1 pixel to the right, one pass after another, and scores by position."""

    def answer(self, image, proposals):
        boxes = proposals + torch.tensor([1.0, 0, 1, 0])
        # The lower box never scores enough to be followed.
        score = torch.where(boxes[:, 1] < 10, 0.1 * boxes[:, 0], 1e-4)
        return Candidates(boxes, torch.stack([score, 0 * score, 0 * score], dim=1))


@pytest.mark.parametrize("refine", [1, 2, 4])
def test_each_pass_starts_where_the_last_one_ended(refine):
    model = Walker()
    detections = predictor(model, TestTimeAugmentation(refine=refine))(black(40, 40))
    assert [len(asked) for asked in model.asked] == [2] + [1] * (refine - 1)
    assert [asked[0, 0].item() for asked in model.asked] == list(range(refine))
    assert len(model.seen) == 1, "the features are made once"
    # Boxes of all passes count, and suppress one another (IoU 7/9, 6/10 and 5/11, all above 0.3).
    assert detections.boxes.tolist() == [[refine, 0, refine + 8, 8]]
    assert math.isclose(detections.scores[0], 0.1 * refine, rel_tol=1e-6)


def test_averaging_takes_boxes_of_all_passes_and_views():
    model = Walker()
    augmentation = TestTimeAugmentation(refine=3, box_averaging=True)
    detections = predictor(model, augmentation)(black(40, 40))
    # Boxes at x = 1, 2, 3 with scores 0.1, 0.2, 0.3; all overlap the last with IoU of 0.5 or more.
    mean = (0.1 * 1 + 0.2 * 2 + 0.3 * 3) / 0.6
    assert torch.allclose(detections.boxes, torch.tensor([[mean, 0, mean + 8, 8]]))
    assert math.isclose(detections.scores[0], 0.3, rel_tol=1e-6)


def test_mixed_precision_does_not_round_boxes():
    given = torch.tensor([[701.0, 1, 903, 30], [703, 1, 903, 30]])
    predict = predictor(
        Repeater(), TestTimeAugmentation(box_averaging=True), short_side=40, max_side=None
    )
    with torch.autocast("cpu", torch.bfloat16):
        detections = predict.predict(black(40, 1000), given)
    # bfloat16 knows only whole multiples of 4 there.
    mean = (701 + 703 * 0.9999) / 1.9999
    assert torch.allclose(detections.boxes, torch.tensor([[mean, 1, 903, 30]]), rtol=0, atol=1e-3)


class ClassWalker(TwoBoxes):
    """Each class moves boxes by its own step; scores depend on where the box that was asked is."""

    def answer(self, image, proposals):
        steps = torch.tensor([10.0, 0, 10, 0])[None] * torch.arange(1, 3)[:, None]
        boxes = proposals[:, None] + steps
        start = proposals[:, 0]
        # At the start only class 0 of the first box and class 1 of the second; later both.
        first = proposals[:, 1] < 10
        here = torch.stack([first, ~first], dim=1) | (start > 0)[:, None]
        return Candidates(boxes, torch.where(here, (0.3 + 0.01 * start)[:, None], 1e-4))


def test_where_classes_have_their_own_boxes_each_is_followed_for_its_class():
    model = ClassWalker(num_classes=2)
    detections = predictor(model, TestTimeAugmentation(refine=2)).predict(black(40, 60))
    assert model.asked[0].tolist() == [[0, 0, 8, 8], [0, 20, 8, 28]]
    assert model.asked[1].tolist() == [[10, 0, 18, 8], [20, 20, 28, 28]]
    seen = {
        (label, *box, round(score, 3))
        for box, score, label in zip(*(part.tolist() for part in detections), strict=True)
    }
    assert seen == {
        (0, 10, 0, 18, 8, 0.3),
        (1, 20, 20, 28, 28, 0.3),
        (0, 20, 0, 28, 8, 0.4),
        (1, 40, 20, 48, 28, 0.5),
    }


def test_many_boxes_pass_in_parts():
    """More boxes than are pooled at once; their order and number stay."""
    model = Repeater()
    y, x = torch.meshgrid(torch.arange(50.0), torch.arange(50.0), indexing="ij")
    given = torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4)
    detections = predictor(model, short_side=50, max_side=50, max_detections=9999).predict(
        black(50, 50), given
    )
    assert max(len(asked) for asked in model.asked) <= 1000
    assert torch.equal(torch.cat(model.asked), given)
    assert set(map(tuple, detections.boxes.tolist())) == set(map(tuple, given.tolist()))


class Broken(Spy):
    """Gives a good box among others that are NaN or infinite, or have such scores."""

    def answer(self, image, proposals):
        assert proposals.isfinite().all()
        rows = [[1, 1, 9, 9], [math.nan, 1, 9, 9], [1, 1, math.inf, 9], [20, 20, 30, 30]]
        scores = torch.tensor([0.8, 0.9, 0.9, math.nan])
        return Candidates(torch.tensor(rows), torch.stack([scores] * 3, dim=1))


@pytest.mark.parametrize("soft_nms", [False, True])
def test_values_that_are_not_finite_are_not_reported(soft_nms):
    augmentation = TestTimeAugmentation(refine=2, box_averaging=True, flip=True, soft_nms=soft_nms)
    detections = predictor(Broken(), augmentation)(black(40, 40))
    assert len(detections.boxes) > 0
    assert detections.boxes.isfinite().all()
    assert detections.scores.isfinite().all()


def test_soft_nms_keeps_what_overlaps_with_a_lower_score():
    model = Repeater()
    given = torch.tensor([[0.0, 0, 20, 20], [5, 0, 25, 20]])
    hard = predictor(model).predict(black(40, 40), given)
    soft = predictor(model, TestTimeAugmentation(soft_nms=True)).predict(black(40, 40), given)
    assert len(hard.boxes) == 1
    iou = 15 / 25
    lowered = 0.9 * 0.9999 * math.exp(-(iou**2) / 0.6)
    assert torch.equal(soft.boxes, given)
    assert torch.allclose(soft.scores, torch.tensor([0.9, lowered]))


def test_thresholds_and_limits_are_those_asked_for():
    given = torch.tensor([[0.0, 0, 20, 20], [2, 0, 22, 20], [0, 22, 20, 39]])  # IoU 9/11 and 0
    for options, count in (
        ({"nms": 0.8}, 2),
        ({"nms": 0.85}, 3),
        ({"max_detections": 1}, 1),
        ({"nms": 1.0, "score_threshold": 0.89985}, 2),  # scores are 0.9, 0.89991 and 0.89982
    ):
        detections = predictor(Repeater(), **options).predict(black(40, 40), given)
        assert len(detections.boxes) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2)])
def test_the_smallest_images(size):
    detections = predictor(Repeater(), TestTimeAugmentation(flip=True, refine=2))(black(*size))
    assert detections.boxes.tolist() == [[0, 0, size[1], size[0]]]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"scales": (480, 0)}, "expected scales to be at least 1 pixel"),
        ({"scales": (480, 600, 480)}, "expected scales to be distinct"),
        ({"refine": 0}, "expected refine to be at least 1, but got 0"),
    ],
)
def test_settings_without_meaning_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        TestTimeAugmentation(**values)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the 3 classes of the model, but got 2"):
        DetectionPredictor(RFCNRecipe(), Repeater(), RGB[:2])
    with pytest.raises(ValueError, match="ColorFinder, which takes no boxes to refine, but got 2"):
        predictor(ColorFinder(), TestTimeAugmentation(refine=2))
    with pytest.raises(ValueError, match="no proposals for ColorFinder"):
        predictor(ColorFinder()).predict(black(20, 20), torch.zeros(0, 4))


def test_nothing_is_recorded_for_gradients():
    class Learner(Repeater):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def answer(self, image, proposals):
            boxes, scores = super().answer(image, proposals)
            return Candidates(boxes * self.scale, scores * self.scale)

    model = Learner().train()
    detections = predictor(model)(black(40, 40))
    assert not detections.scores.requires_grad
    assert not model.training
