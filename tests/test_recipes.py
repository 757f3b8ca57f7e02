import dataclasses
import inspect
import json
import math
import re

import pytest

from deformnet import UserError
from deformnet.recipes import (
    RECIPES,
    ClassifierRecipe,
    DeepLabRecipe,
    DetectorRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    cityscapes,
    coco_detection,
    finetune,
    imagenet,
    voc2012,
    voc_detection,
)

DETECTORS = [recipe for recipe in RECIPES if issubclass(recipe, DetectorRecipe)]


def test_json_keeps_every_field(tmp_path):
    recipe = DeepLabRecipe(
        backbone="resnet34", crop=(96, 128), max_side=None, lr=1, init="x.pth", clip=5.0
    )
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    assert DeepLabRecipe.load(path) == recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_keeps_every_recipe(tmp_path, recipe):
    path = tmp_path / "recipe.json"
    path.write_text(recipe(seed=3).to_json())
    assert Recipe.load(path) == recipe(seed=3)


def test_recipes_without_an_output_stride_have_16(tmp_path):
    values = DeepLabRecipe(seed=3).to_dict()
    del values["output_stride"]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    assert DeepLabRecipe.load(path) == DeepLabRecipe(seed=3, output_stride=16)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"output_stride": 4},
            TypeError,
            "expected output_stride to be one of 8, 16, 32, but got 4",
        ),
        (
            {"output_stride": 8, "loss_stride": 16},
            UserError,
            "expected loss_stride to be at most output_stride (8), but got 16",
        ),
        (
            {"output_stride": 32, "dilation": 4},
            UserError,
            "expected dilation to be 2, the default, for output_stride 32, which does not dilate, ",
        ),
        (
            {"output_stride": 32, "freeze": 5, "norm": "frozen"},
            UserError,
            "expected output_stride to be 8 or 16 for freeze 5 without a neck, but got 32",
        ),
    ],
)
def test_invalid_output_strides_raise(fields, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        DeepLabRecipe(**fields)


def test_detectors_have_no_output_stride():
    assert not any(hasattr(recipe, "output_stride") for recipe in DETECTORS)


def test_a_recipe_of_another_network_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(RFCNRecipe().to_json())
    with pytest.raises(ValueError, match="expected a recipe of faster-rcnn, but got rfcn"):
        FasterRCNNRecipe.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"convention": "modem"}, "convention to be one of 'modern', 'msra2017', but got 'modem'"),
        ({"anchor_sizes": ()}, "expected anchor_sizes to be positive, but got ()"),
        ({"anchor_sizes": (32, 0)}, "expected anchor_sizes to be positive, but got (32, 0)"),
        ({"nms": 1.5}, "expected nms to be 0 to 1, but got 1.5"),
        ({"score_threshold": float("nan")}, "expected score_threshold to be 0 to 1, but got nan"),
        ({"proposals": 0}, "expected proposals to be positive, but got 0"),
        ({"pool": "max"}, "pool to be one of 'average', 'deformable', but got 'max'"),
    ],
)
def test_invalid_detector_settings_raise(fields, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        RFCNRecipe(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "expected a recipe, a JSON object, but got list"),
        ('{"deth": 18}', "but got 'deth'"),
        ("{}", "but got None"),
        ('{"network": "yolo"}', "expected network to be one of deeplab, rpn, "),
        (
            '{"backbone": "resnet19"}',
            "expected backbone to be one of resnet18, resnet34, resnet50, resnet101, "
            "aligned-inception-resnet or timm/NAME, but got resnet19",
        ),
        ('{"batch": "18"}', "expected batch to be int, but got '18'"),
        (
            '{"stride_in_1x1": true, "backbone": "resnet18"}',
            "expected backbone to be resnet50 or resnet101 for stride_in_1x1",
        ),
        ('{"batch": 2.5}', "expected batch to be int, but got 2.5"),
        ('{"flip": 1}', "expected flip to be bool, but got 1"),
        ('{"crop": [3]}', "expected crop to be "),
        ('{"lr": 0}', "expected lr to be positive, but got 0"),
        ('{"lr": NaN}', "expected finite numbers, but got NaN"),
        ('{"weight_decay": Infinity}', "expected finite numbers, but got Infinity"),
        ('{"short_side": 300, "max_side": 200}', "max_side to be at least short_side (300)"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    if "network" not in text:
        text = text.replace('{"', '{"network": "deeplab", "', 1)
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        DeepLabRecipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_field_is_explained(recipe):
    """The command line shows these lines as its help."""
    bases = [base for base in recipe.__mro__ if dataclasses.is_dataclass(base)]
    lines = "\n".join(inspect.getsource(base) for base in bases).splitlines()
    for field in dataclasses.fields(recipe):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].strip().startswith('"""'), field.name


def test_learning_rate_of_a_run():
    recipe = DeepLabRecipe(iterations=30, warmup=5)
    factors = [recipe.lr_factor(i) for i in range(30)]
    assert factors[:6] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    assert factors[5:20] == [1.0] * 15
    assert factors[20:] == [0.1] * 10


def test_the_papers_settings():
    for recipe in (voc2012(), cityscapes()):
        assert (recipe.backbone, recipe.norm) == ("resnet101", "frozen")
        assert (recipe.batch, recipe.lr) == (8, 1e-3)
    assert (voc2012().short_side, voc2012().iterations) == (360, 30_000)
    assert (cityscapes().short_side, cityscapes().iterations) == (1024, 45_000)
    assert voc2012(deform_layers=0).deform_layers == 0


@pytest.mark.parametrize("recipe", DETECTORS)
def test_the_papers_settings_of_detectors(recipe):
    voc, coco = voc_detection(recipe), coco_detection(recipe)
    for settings in (voc, coco):
        assert (settings.backbone, settings.norm, settings.batch) == ("resnet101", "frozen", 8)
        assert (settings.short_side, settings.max_side, settings.lr) == (600, 1000, 1e-3)
        assert settings.convention == "msra2017"
    assert (voc.iterations, voc.anchor_sizes, voc.max_detections) == (30_000, (128, 256, 512), 300)
    assert (coco.iterations, len(coco.anchor_sizes), coco.max_detections) == (240_000, 4, 100)


def test_the_cosine_schedule():
    recipe = DeepLabRecipe(iterations=30, warmup=10, schedule="cosine")
    factors = [recipe.lr_factor(i) for i in range(31)]
    assert factors[:3] == pytest.approx([0.1, 0.19, 0.28])
    assert factors[10] == 1.0
    assert factors[20] == pytest.approx(0.5)
    assert factors[15] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert factors[30] == 0.0
    assert recipe.lr_factor(31) == 0.0
    assert DeepLabRecipe(iterations=5, warmup=10, schedule="cosine").lr_factor(10) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema": 1.0}, "expected ema to be between 0 and 1, but got 1.0"),
        ({"optimizer": "adam"}, "optimizer to be one of 'sgd', 'adamw', but got 'adam'"),
        ({"momentum": 1.0}, "momentum to be below 1"),
        ({"optimizer": "adamw", "momentum": 1.0}, "momentum to be below 1"),
        ({"scale_jitter": (1.5, 0.5)}, "scale_jitter to be ascending, but got (1.5, 0.5)"),
        ({"scale_jitter": (0.0, 1.0)}, "scale_jitter to be positive, but got (0.0, 1.0)"),
        ({"orientation": "exif"}, "orientation to be one of 'auto', 'stored', 'upright'"),
    ],
)
def test_invalid_training_settings_raise(fields, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        DeepLabRecipe(**fields)


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_for_own_data(recipe):
    usual = finetune(recipe, images=200)
    assert (usual.init, usual.norm, usual.schedule) == ("IMAGENET1K_V1", "frozen", "cosine")
    assert usual.iterations == 1000
    assert usual.iterations * usual.batch / 200 >= 40
    scratch = finetune(recipe, images=200, init=None)
    assert (scratch.init, scratch.norm) == (None, "trained")
    assert finetune(recipe, images=3).batch == 3
    assert finetune(recipe, images=10**6).iterations == 30_000
    assert finetune(recipe, images=200, gpu=False).batch == usual.batch // 2
    fewer = finetune(recipe, images=200, batch=usual.batch // 4)
    assert fewer.iterations == pytest.approx(40 * 200 / fewer.batch)
    assert fewer.lr == pytest.approx(usual.lr / 4)


def test_image_sizes_for_own_data():
    small = finetune(RFCNRecipe, images=200, short_side=300)
    assert (small.short_side, small.max_side) == (300, 500)
    assert small.anchor_sizes == (16, 32, 64, 128, 256)
    assert finetune(RFCNRecipe, images=200, short_side=3000).short_side == 480
    on_cpu = finetune(RFCNRecipe, images=200, short_side=3000, gpu=False)
    assert (on_cpu.short_side, on_cpu.anchor_sizes) == (240, (16, 32, 64, 128))
    assert finetune(DeepLabRecipe, images=200, short_side=20).short_side == 160


def test_published_settings():
    assert DeepLabRecipe.published() == voc2012()
    assert RFCNRecipe.published() == voc_detection(RFCNRecipe)
    assert ClassifierRecipe.published() == imagenet(backbone="resnet50")
