"""Predictors with random weights: what their networks see, label maps, files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from deformnet import UserError
from deformnet.data.transforms import classification_evaluation_transforms
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe
from deformnet.tasks import DataIdentity, find_images, task_of
from deformnet.tasks.results import Written
from deformnet.visualization.drawing import palette
from pictures import noise, save

CLASSES = ("background", "one", "two")
SIZES = [(40, 30), (33, 64), (100, 41)]


def ramp(height, width):
    """Red grows down by 2 a pixel, green to the right."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([2 * y, 2 * x, 0 * y]).to(torch.uint8)


def predictor_of(recipe):
    torch.manual_seed(0)
    model = recipe.build_model(len(CLASSES))
    return task_of(recipe).predictor(model, DataIdentity.of(CLASSES, []), "cpu")


def segmenter(short_side=48, max_side=80):
    sizes = {"short_side": short_side, "max_side": max_side}
    return predictor_of(DeepLabRecipe(backbone="resnet18", deform_layers=0, **sizes))


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
    assert once.to_dict() == expected.to_dict()
    assert once.image is None
    assert expected.image is image
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


@pytest.fixture(scope="module")
def predictor():
    return segmenter(32, 48)


@pytest.mark.parametrize("size", [(32, 48), (40, 30), (90, 200), (1, 1), (7, 300)])
def test_label_maps_have_the_size_of_the_image(predictor, size):
    labels = predictor(noise(*size)).labels
    assert labels.dtype == torch.uint8
    assert labels.shape == size
    assert labels.max() < len(CLASSES)


def test_labels_are_those_of_the_highest_logit(predictor):
    """At the network's own size there is nothing to resize."""
    image = noise(32, 40)
    labels = predictor.predict(image)
    prepared = image.float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        logits = predictor.model(((prepared - mean) / std)[None])
    assert torch.equal(labels.long(), logits.argmax(1)[0])


def test_files(predictor, tmp_path):
    first = save(tmp_path / "first.png", noise(20, 30))
    last = save(tmp_path / "last.jpg", noise(30, 20))
    out = tmp_path / "out"
    results = list(predictor.write(find_images([first, last]), out))
    assert results == [Written("first.png"), Written("last.jpg")]
    written = {path.name for path in out.rglob("*.*")}
    assert written == {"first.jpg", "first.png", "last.jpg", "last.png"}
    with Image.open(out / "labels/first.png") as file:
        assert file.mode == "P"
        assert np.array_equal(np.asarray(file), predictor(first).labels.numpy())
        assert file.getpalette()[: 3 * len(CLASSES)] == palette(CLASSES).flatten().tolist()


def test_a_strip_costs_itself(tmp_path):
    """It has few pixels, but as many rows as any image after resizing."""
    strip, good = save(tmp_path / "a.png", noise(1, 20000)), save(tmp_path / "b.png", noise(9, 9))
    predict = predictor_of(
        ClassifierRecipe(backbone="resnet18", resize=(256, 256), test_short_side=256, crop=64)
    )
    results = list(predict.write(find_images([strip, good]), tmp_path / "out"))
    assert results[0].problem.startswith(
        f"{strip}: expected an image of at most 100 million pixels"
    )
    assert results[1].problem is None
    with pytest.raises(UserError, match=r"a\.png: expected an image of at most 100 million"):
        predict(strip)
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 1
