"""The files of scores have the same names after training and evaluation."""

import dataclasses
import json

import pytest
from PIL import Image

import deformnet.engine
from deformnet._text import Table
from deformnet.cli import main
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import Hardware, LoopOptions, evaluate, train
from deformnet.engine.results import Result, UnsavedScores
from deformnet.recipes import DeepLabRecipe, RFCNRecipe
from deformnet.tasks.base import Scores

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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "scores not written (out of memory)"),
        (MemoryError("out of memory (encoder error)"), "scores not written (out of memory (enc"),
        (OSError("no codec"), "scores not written (no codec)"),
        (OSError(28, "No space left on device", "a.png"), "a.png: No space left on device"),
    ],
)
def test_scores_that_cannot_be_written_are_printed(error, reason, tmp_path, capsys, monkeypatch):
    def draw():
        raise error

    table = Table("mean IoU", ("class", "IoU"), [("cat", "7.5")])
    scores = Scores({}, table, {"mean IoU": 7.5}, pictures={"confusion-matrix": draw})
    result = Result(
        network="deeplab", iterations=1, seconds_per_iteration=None, parameters=1, seed=0
    )
    result = dataclasses.replace(result, scores=scores, split="val", images=2)
    monkeypatch.setattr(deformnet.engine, "evaluate", lambda *_, **__: result.save(tmp_path))
    with pytest.raises(UnsavedScores) as unsaved:
        result.save(tmp_path)
    assert unsaved.value.error is error  # what the demo sends to its main process
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "run", "--data", "data", "--split", "val"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "7.5" in printed.out
    assert printed.err.startswith(f"deformnet: {reason}")
