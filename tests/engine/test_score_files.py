"""The files of scores have the same names after training and evaluation."""

import json

import pytest
from PIL import Image

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import Hardware, LoopOptions, evaluate, train
from deformnet.recipes import DeepLabRecipe, RFCNRecipe

COMMON = {"backbone": "resnet18", "short_side": 64, "max_side": None, "deform_layers": 0}
COMMON |= {"batch": 2, "iterations": 1, "warmup": 0, "lr": 0.002}
DETECTOR = {"anchor_sizes": (16, 32), "proposals": 20, "score_threshold": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, Shapes(train=2, val=2, height=64, width=80, objects=(2, 3)))
    return root


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (DeepLabRecipe(**COMMON), ["confusion-matrix"]),
        (RFCNRecipe(**COMMON, **DETECTOR), ["confusion-matrix", "precision-recall"]),
    ],
)
def test_pictures_beside_the_numbers(recipe, names, data, tmp_path):
    hardware = Hardware(workers=0)
    loop = LoopOptions(progress=False)
    result = train(recipe, data, tmp_path, val_split="val", loop=loop, hardware=hardware)
    evaluate(tmp_path, data, "train", progress=False)
    for suffix in ("", "-train"):
        pictures = {path.name for path in tmp_path.glob(f"*[a-z]{suffix}.png")}
        assert {f"{name}{suffix}.png" for name in names} <= pictures
        for name in names:
            with Image.open(tmp_path / f"{name}{suffix}.png") as picture:
                picture.load()
        metrics = json.loads((tmp_path / f"metrics{suffix}.json").read_text())
        matrix = metrics["confusion_matrix"]
        assert len(matrix["counts"]) == len(matrix["classes"])
        assert metrics["classes_scored"] <= metrics["classes"]
    table = str(result)
    scored, classes = (result.to_json()[name] for name in ("classes_scored", "classes"))
    assert (f"over {scored} of {classes} classes" in table) == (scored < classes)
    # A row of the matrix is a line of the file.
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert sum(line.startswith(" " * 6 + "[") for line in lines) >= len(matrix["counts"])
