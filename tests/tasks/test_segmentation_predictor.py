"""Label maps from random weights, in memory and in files."""

import numpy as np
import pytest
import torch
from PIL import Image

from deformnet.data.files import read_image
from deformnet.recipes import DeepLabRecipe
from deformnet.tasks import DataIdentity, task_of
from deformnet.visualization.drawing import palette

CLASSES = ("background", "one", "two")


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    recipe = DeepLabRecipe(backbone="resnet18", deform_layers=0, short_side=32, max_side=48)
    model = recipe.build_model(len(CLASSES))
    return task_of(recipe).predictor(model, DataIdentity.of(CLASSES, []), "cpu")


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def save(path, image, **options):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


@pytest.mark.parametrize("size", [(32, 48), (40, 30), (90, 200), (1, 1), (7, 300)])
def test_label_maps_have_the_size_of_the_image(predictor, size):
    labels = predictor(noise(*size))
    assert labels.dtype == torch.uint8
    assert labels.shape == size
    assert labels.max() < len(CLASSES)


def test_labels_are_those_of_the_highest_logit(predictor):
    """At the network's own size there is nothing to resize."""
    image = noise(32, 40)
    labels = predictor(image)
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
    assert dict(predictor.write([first, last], out)) == {first: None, last: None}
    assert sorted(p.name for p in out.rglob("*.*")) == [
        "first.jpg",
        "first.png",
        "last.jpg",
        "last.png",
    ]
    with Image.open(out / "labels/first.png") as file:
        assert file.mode == "P"
        assert np.array_equal(np.asarray(file), predictor(read_image(first, upright=True)).numpy())
        assert file.getpalette()[: 3 * len(CLASSES)] == palette(CLASSES).flatten().tolist()
