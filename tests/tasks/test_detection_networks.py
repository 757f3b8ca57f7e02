"""The predictor with each of the networks: random weights, small images."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou, nms

from deformnet.data.boxes import BoxAnnotations
from deformnet.data.transforms import detection_transforms
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
    TestTimeAugmentation,
)
from deformnet.tasks.detection import DetectionPredictor
from pictures import smooth_noise as noise

NONE = TestTimeAugmentation()
CLASSES = ("one", "two", "three")
SMALL = {
    "backbone": "resnet18",
    "short_side": 64,
    "max_side": 100,
    "anchor_sizes": (16, 32),
    "proposals": 20,
    "max_detections": 50,
}
TWO_STAGES = [FasterRCNNRecipe, RFCNRecipe]


@pytest.fixture(scope="module", params=[RPNRecipe, ClassAwareRPNRecipe, *TWO_STAGES])
def recipe(request):
    return request.param(**SMALL)


def build(recipe, augmentation=NONE):
    torch.manual_seed(0)
    one_class = isinstance(recipe, RPNRecipe)
    model = recipe.build_model(1 if one_class else len(CLASSES))
    # Boxes that differ from the proposals, and scores that differ from one another.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone") and parameter.ndim > 1:
                parameter.mul_(5)
    return DetectionPredictor(recipe, model, CLASSES, augmentation, "cpu")


def assert_detections(detections, expected):
    """Compares detections with a list of (score, label, box) in any order."""
    assert len(detections.scores) == min(50, len(expected)) > 3
    ordered = sorted(expected, key=lambda entry: -entry[0])
    for (score, label, box), own_box, own_score, own_label in zip(
        ordered, *detections, strict=False
    ):
        assert own_label == label
        assert own_score == pytest.approx(score, abs=1e-5)
        assert torch.allclose(own_box, box, atol=1e-2)


def as_in_training(image, short_side, max_side):
    nothing = BoxAnnotations(
        tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=image.shape[1:]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.bool),
    )
    transforms = detection_transforms(short_side=short_side, max_side=max_side, flip=False)
    return transforms(tv_tensors.Image(image), nothing)[0][None]


def test_images_of_any_size(recipe):
    predict = build(recipe)
    for height, width in [(64, 100), (50, 41), (130, 400), (3, 200), (1, 1)]:
        boxes, scores, labels = predict.predict(noise(height, width))
        assert boxes.shape == (len(scores), 4)
        assert len(scores) == len(labels) <= 50
        assert boxes.isfinite().all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert set(labels.tolist()) <= set(range(len(CLASSES)))


@pytest.mark.parametrize("two_stages", TWO_STAGES)
def test_one_look_is_the_network_on_the_images_of_training(two_stages):
    recipe = two_stages(**SMALL)
    predict = build(recipe)
    image = noise(90, 120)
    prepared = as_in_training(image, 64, 100)
    height, width = prepared.shape[2:]
    with torch.no_grad():
        boxes, scores = predict.model(prepared, [(height, width)])[0]
    boxes = boxes * torch.tensor([120 / width, 90 / height] * 2)
    expected = []
    for label in range(len(CLASSES)):
        own = boxes if boxes.ndim == 2 else boxes[:, label]
        kept = nms(own, scores[:, label], 0.3)
        expected += [(float(scores[k, label]), label, own[k]) for k in kept]
    assert_detections(predict.predict(image), expected)


@pytest.mark.parametrize("two_stages", TWO_STAGES)
def test_own_proposals_given_back_change_nothing(two_stages):
    predict = build(two_stages(**SMALL))
    image = noise(90, 120)
    proposals, scores = predict.propose(image)
    assert len(proposals) == len(scores) == 20
    assert (proposals >= 0).all()
    assert (proposals <= torch.tensor([120, 90, 120, 90])).all()
    given, own = predict.predict(image, proposals), predict.predict(image)
    assert torch.equal(given.labels, own.labels)
    assert torch.allclose(given.scores, own.scores, atol=1e-4)
    assert torch.allclose(given.boxes, own.boxes, atol=1e-1)


@pytest.mark.parametrize("two_stages", TWO_STAGES)
def test_everything_at_once_against_plain_loops(two_stages):
    """Sizes, flip images, refinement and averaging (Table 5's "M" and "B"), box by box."""
    recipe = two_stages(**(SMALL | {"proposals": 3}))
    image = noise(90, 120)
    augmentation = TestTimeAugmentation(scales=(48, 80), flip=True, refine=2, box_averaging=True)
    predict = build(recipe, augmentation)
    model = predict.model
    everything = []  # (label, score, box in pixels of the image)
    for short_side, max_side in [(48, 75), (80, 125)]:
        upright = as_in_training(image, short_side, max_side)
        height, width = upright.shape[2:]
        for flipped in (False, True):
            seen = upright.flip(3) if flipped else upright
            with torch.no_grad():
                features = model.features(seen)
                asked = [(box, None) for box in model.propose(features, [(height, width)])[0].boxes]
                for _ in range(2):
                    following = []
                    for box, only in asked:
                        boxes, scores = model.candidates(features, [(height, width)], [box[None]])[
                            0
                        ]
                        for label in range(len(CLASSES)):
                            if only not in (None, label) or scores[0, label] <= 1e-3:
                                continue
                            new = boxes[0] if boxes.ndim == 2 else boxes[0, label]
                            x1, y1, x2, y2 = new.tolist()
                            if flipped:
                                x1, x2 = width - x2, width - x1
                            there = [x1 * 120 / width, y1 * 90 / height]
                            there += [x2 * 120 / width, y2 * 90 / height]
                            everything.append((label, float(scores[0, label]), there))
                            if boxes.ndim == 3:
                                following.append((new, label))
                        if boxes.ndim == 2:
                            following.append((boxes[0], None))
                    asked = following
    expected = []
    for label in range(len(CLASSES)):
        own = torch.tensor([box for k, _, box in everything if k == label])
        scores = torch.tensor([score for k, score, _ in everything if k == label])
        for k in nms(own, scores, 0.3):
            near = box_iou(own[k][None], own)[0] >= 0.5
            weights = scores[near][:, None]
            expected.append((float(scores[k]), label, (weights * own[near]).sum(0) / weights.sum()))
    assert_detections(predict.predict(image), expected)


@pytest.mark.parametrize("soft_nms", [False, True])
def test_networks_without_pooling_take_sizes_and_flip_images(soft_nms):
    augmentation = TestTimeAugmentation(
        scales=(48, 80), flip=True, box_averaging=True, soft_nms=soft_nms
    )
    detections = build(ClassAwareRPNRecipe(**SMALL), augmentation)(noise(90, 120))
    assert len(detections.boxes) == 50
    assert detections.boxes.isfinite().all()
