import dataclasses
import inspect
import re

import pytest

from deformnet.recipes import DeepLabRecipe, cityscapes, voc2012


def test_json_keeps_every_field(tmp_path):
    recipe = DeepLabRecipe(depth=34, crop=(96, 128), max_side=None, lr=1, weights="x.pth", clip=5.0)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    assert DeepLabRecipe.load(path) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "a recipe is a JSON object, got list"),
        ('{"deth": 18}', "a recipe has no field 'deth'; its fields are depth, "),
        ('{"depth": 19}', "depth must be one of 18, 34, 50, 101, got 19"),
        ('{"depth": "18"}', "depth must be one of 18, 34, 50, 101, got '18'"),
        ('{"batch": 2.5}', "batch must be int, got 2.5"),
        ('{"flip": 1}', "flip must be bool, got 1"),
        ('{"crop": [3]}', "crop must be "),
        ('{"lr": 0}', "lr must be positive, got 0"),
        ('{"lr": NaN}', "lr must be positive, got nan"),
        ('{"weight_decay": Infinity}', "weight_decay must not be negative, got inf"),
        ('{"short_side": 300, "max_side": 200}', "max_side must be at least short_side (300)"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        DeepLabRecipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_every_field_is_explained():
    """The command line shows these lines as its help."""
    lines = inspect.getsource(DeepLabRecipe).splitlines()
    for field in dataclasses.fields(DeepLabRecipe):
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
        assert (recipe.depth, recipe.norm, recipe.batch, recipe.lr) == (101, "frozen", 8, 1e-3)
    assert (voc2012().short_side, voc2012().iterations) == (360, 30_000)
    assert (cityscapes().short_side, cityscapes().iterations) == (1024, 45_000)
    assert voc2012(deform_layers=0).deform_layers == 0
