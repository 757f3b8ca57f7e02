"""Predictions as people use them: from any form of an image, as pictures and plain values."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe
from deformnet.tasks import DataIdentity, task_of
from deformnet.tasks.classification import ImageClass
from deformnet.tasks.detection.data import Boxes
from deformnet.tasks.segmentation import LabelMap
from pictures import noise, save, turned

CLASSES = ("background", "one", "two")
SIZES = {"backbone": "resnet18", "deform_layers": 0, "short_side": 48, "max_side": 80}
RECIPES = {
    "deeplab": DeepLabRecipe(**SIZES),
    "rfcn": RFCNRecipe(**SIZES, anchor_sizes=(16, 32)),
    "classifier": ClassifierRecipe(
        backbone="resnet18", resize=(48, 48), test_short_side=48, crop=33
    ),
}
TASKS = list(RECIPES)


@pytest.fixture(scope="module")
def predictors():
    """A predictor of each task, with random weights."""
    made = {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = recipe.build_model(len(CLASSES))
        made[name] = task_of(recipe).predictor(model, DataIdentity.of(CLASSES, []), "cpu")
    return made


def forms(image, folder):
    """The same image in every form."""
    path = save(folder / "image.png", image)
    array = image.permute(1, 2, 0).numpy()
    return {
        "str": str(path),
        "Path": path,
        "PIL": Image.fromarray(array),
        "array": array,
        "tensor": image,
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["str", "Path", "PIL", "array", "tensor"])
def test_every_form_gives_the_same_result(predictors, task, form, tmp_path):
    image, predict = noise(40, 50), predictors[task]
    expected = predict.annotate(image)
    given = forms(image, tmp_path)[form]
    result = predict(given)
    assert type(result) is type(expected)
    assert result.to_dict() == expected.to_dict()
    assert torch.equal(result.image, image)
    for several in ([given, image], (given, image)):
        results = predict(several)
        assert [one.to_dict() for one in results] == [expected.to_dict()] * 2
    assert predict([]) == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("wrong", [3, None, b"x.png", {"image": 1}, [3]])
def test_other_objects_are_refused(predictors, task, wrong):
    with pytest.raises(TypeError, match="a path, a PIL image, a NumPy array, a tensor or a list"):
        predictors[task](wrong)


@pytest.mark.parametrize("task", TASKS)
def test_photographs_are_upright_unless_the_recipe_says_stored(predictors, task, tmp_path):
    path = save(tmp_path / "photo.jpg", noise(40, 50), exif=turned())
    assert predictors[task](path).image.shape == (3, 50, 40)
    recipe = type(RECIPES[task])(**{**vars(RECIPES[task]), "orientation": "stored"})
    model = predictors[task].model
    stored = task_of(recipe).predictor(model, DataIdentity.of(CLASSES, []), "cpu")
    assert stored(path).image.shape == (3, 40, 50)


@pytest.mark.parametrize("task", TASKS)
def test_results_are_pictures_and_plain_values(predictors, task):
    result = predictors[task](noise(40, 50))
    picture = result.plot()
    assert isinstance(picture, Image.Image)
    assert picture.width >= 50
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_boxes():
    boxes = torch.tensor([[1.0, 2, 11.5, 22], [3, 4, 5, 6]])
    scores, labels = torch.tensor([0.9, 0.3]), torch.tensor([2, 1])
    result = Boxes(boxes, labels, CLASSES, (30, 40), scores, noise(30, 40))
    assert result.to_dict() == {
        "boxes": [[1, 2, 11.5, 22], [3, 4, 5, 6]],
        "classes": ["two", "one"],
        "scores": [0.9, 0.3],
    }
    assert result.to_coco(7) == [
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10.5, 20], "score": 0.9},
        {"image_id": 7, "category_id": 2, "bbox": [3, 4, 2, 2], "score": 0.3},
    ]
    (first, second) = result.to_coco(7, {"one": 90, "two": 18})
    assert [first["category_id"], second["category_id"]] == [18, 90]
    drawn = [np.asarray(result.plot(threshold=least)) for least in (0.2, 0.5, 0.95)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    assert "image=" not in repr(result), "thousands of pixels say nothing"


def test_images_without_boxes():
    nothing = torch.zeros(0)
    result = Boxes(nothing.reshape(0, 4), nothing.long(), CLASSES, (30, 40), nothing, noise(30, 40))
    assert result.to_dict() == {"boxes": [], "classes": [], "scores": []}
    assert result.to_coco(1) == []
    assert result.plot().width >= 40


def test_label_maps():
    labels = torch.zeros(4, 6, dtype=torch.uint8)
    labels[1:3, 2:5] = 2
    labels[0] = 255
    result = LabelMap(labels, CLASSES)
    assert result.to_dict() == {"height": 4, "width": 6, "pixels": {"background": 12, "two": 6}}
    with pytest.raises(ValueError, match="expected a prediction, which keeps its image"):
        result.plot()


def test_classes_of_images():
    result = ImageClass("two", CLASSES, torch.tensor([0.25, 0.25, 0.5]), noise(30, 40))
    ranking = {"two": 0.5, "background": 0.25, "one": 0.25}
    assert result.to_dict() == {"class": "two", "probabilities": ranking}
    assert list(result.to_dict()["probabilities"]) == list(ranking), "best first"
    assert result.ranking(1) == [("two", 0.5)]
    assert ImageClass("one").to_dict() == {"class": "one"}


@pytest.mark.parametrize("task", ["deeplab", "classifier"])
def test_formats_are_for_boxes(predictors, task, tmp_path):
    with pytest.raises(ValueError, match="expected no format for a network without boxes"):
        predictors[task].write([], tmp_path, box_format="csv")
