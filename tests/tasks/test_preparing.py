"""What the predictors call their networks with, and where pixels go."""

import pytest
import torch
from torchvision import tv_tensors

from deformnet.data.transforms import classification_evaluation_transforms
from deformnet.inference import (
    ClassificationPredictor,
    SegmentationPredictor,
    detection_predictor,
    overlay,
)
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe

CLASSES = ("background", "one", "two")
SIZES = [(40, 30), (33, 64), (100, 41)]


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def ramp(height, width):
    """Red grows down by 2 a pixel, green to the right."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([2 * y, 2 * x, 0 * y]).to(torch.uint8)


def segmenter():
    torch.manual_seed(0)
    recipe = DeepLabRecipe(backbone="resnet18", deform_layers=0, short_side=48, max_side=80)
    return SegmentationPredictor(recipe, recipe.build_model(len(CLASSES)), CLASSES, "cpu")


def detector():
    torch.manual_seed(0)
    recipe = RFCNRecipe(backbone="resnet18", short_side=48, max_side=80, anchor_sizes=(16, 32))
    return detection_predictor(recipe, recipe.build_model(3), CLASSES, device="cpu")


def classifier():
    torch.manual_seed(0)
    recipe = ClassifierRecipe(backbone="resnet18", resize=(48, 48), test_short_side=48, crop=33)
    return ClassificationPredictor(recipe, recipe.build_model(len(CLASSES)), CLASSES, "cpu")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("build", [segmenter, detector, classifier])
def test_pixels_are_where_they_are_said_to_be(build, size):
    prepared = build().prepare(ramp(*size))
    mean, std = torch.tensor([0.485, 0.456]), torch.tensor([0.229, 0.224])
    shown = prepared.input[0, :2].permute(1, 2, 0) * std + mean
    seen = shown * 255 / 2  # (y, x) in the image of each pixel
    places = torch.stack(
        torch.meshgrid(*(torch.arange(side) for side in prepared.size), indexing="ij"), -1
    ).double()
    told = prepared.to_image(places)
    # At the edges resizing repeats the border; colours are whole numbers.
    within = ((told >= 1) & (told <= torch.tensor(size) - 2)).all(-1)
    assert within.sum() > 100
    assert (seen - told)[within].abs().max() < 0.5
    for y, x in [(0, 0), (5, 11), (prepared.size[0] - 1, prepared.size[1] - 1)]:
        assert prepared.to_input(tuple(told[y, x].tolist())) == pytest.approx((y, x))


def test_in_parts_as_in_one():
    image = noise(40, 50)
    with torch.inference_mode():
        predictor = segmenter()
        logits = predictor.model(predictor.prepare(image).input)
        assert torch.equal(predictor.labels(logits, (40, 50)), predictor(image))
        predictor = detector()
        prepared = predictor.prepare(image)
        features = predictor.model.features(prepared.input)
        found, expected = predictor.detect(features, prepared.size, (40, 50)), predictor(image)
        assert len(expected.scores) > 5
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        prepare = classification_evaluation_transforms(short_side=48, crop=33)
        assert torch.equal(classifier().prepare(image).input[0], prepare(tv_tensors.Image(image)))


def test_void_is_not_tinted():
    image = noise(500, 500)
    labels = torch.full((500, 500), 255, dtype=torch.uint8)
    drawn = torch.tensor(list(overlay(image, labels, CLASSES[1:]).tobytes()), dtype=torch.uint8)
    assert torch.equal(drawn.reshape(500, 500, 3), image.permute(1, 2, 0))
