"""What the predictors call their networks with, and where pixels go."""

import pytest
import torch
from torchvision import tv_tensors

from deformnet.data.transforms import classification_evaluation_transforms
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe
from deformnet.tasks import DataIdentity, task_of

CLASSES = ("background", "one", "two")
SIZES = [(40, 30), (33, 64), (100, 41)]


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def ramp(height, width):
    """Red grows down by 2 a pixel, green to the right."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([2 * y, 2 * x, 0 * y]).to(torch.uint8)


def predictor_of(recipe):
    torch.manual_seed(0)
    model = recipe.build_model(len(CLASSES))
    return task_of(recipe).predictor(model, DataIdentity.of(CLASSES, []), "cpu")


def segmenter():
    recipe = DeepLabRecipe(backbone="resnet18", deform_layers=0, short_side=48, max_side=80)
    return predictor_of(recipe)


def detector():
    recipe = RFCNRecipe(backbone="resnet18", short_side=48, max_side=80, anchor_sizes=(16, 32))
    return predictor_of(recipe)


def classifier():
    recipe = ClassifierRecipe(backbone="resnet18", resize=(48, 48), test_short_side=48, crop=33)
    return predictor_of(recipe)


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
    # At the edges resizing repeats the border; colors are whole numbers.
    within = ((told >= 1) & (told <= torch.tensor(size) - 2)).all(-1)
    assert within.sum() > 100
    assert (seen - told)[within].abs().max() < 0.5
    for y, x in [(0, 0), (5, 11), (prepared.size[0] - 1, prepared.size[1] - 1)]:
        assert prepared.to_input(tuple(told[y, x].tolist())) == pytest.approx((y, x))


@pytest.mark.parametrize("build", [segmenter, detector, classifier])
def test_one_pass_gives_the_prediction(build):
    image, predictor = noise(40, 50), build()
    prepared = predictor.prepare(image)
    once, expected = predictor.infer(prepared, (40, 50)).annotation, predictor.annotate(image)
    assert vars(once).keys() == vars(expected).keys()
    for one, other in zip(vars(once).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    with torch.no_grad():
        predictor.model(*predictor.arguments(prepared))


def test_classifiers_see_the_images_of_evaluation():
    image = noise(40, 50)
    prepare = classification_evaluation_transforms(short_side=48, crop=33)
    assert torch.equal(classifier().prepare(image).input[0], prepare(tv_tensors.Image(image)))


@pytest.mark.parametrize("build", [segmenter, detector, classifier])
@pytest.mark.parametrize("size", [(4, 4, 3), (2,), (3, 0, 4), (3, 4, 4)])
def test_other_images_are_refused(build, size):
    dtype = torch.float32 if size == (3, 4, 4) else torch.uint8
    with pytest.raises(ValueError, match=r"expected image to be uint8 \[3, H, W\], but got torch"):
        build()(torch.zeros(size, dtype=dtype))
