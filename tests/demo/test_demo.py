"""The demo at its smallest, end to end, and its parts."""

import json
import re
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from deformnet.cli import main
from deformnet.demo.page import comparison
from deformnet.demo.settings import Demo
from deformnet.engine.runs import checkpoint_path
from pages import Page

TINY = ["--iterations", "2", "--detector-iterations", "2"]
TINY += ["--images", "4", "--val", "3", "--size", "64"]


def contents(folder):
    """The files that a second run must not change."""
    files = [*folder.glob("data/**/*.*"), *folder.glob("runs/*/checkpoints/*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


def test_demo_twice(tmp_path, capsys):
    out = tmp_path / "demo"
    main(["demo", "--out", str(out), *TINY])
    printed = capsys.readouterr().out
    assert "about 1 min" in printed.splitlines()[0]

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"]["iterations"] == 2
    for name, layers in (("baseline", 0), ("deformable", 3)):
        recipe = json.loads((out / "runs" / name / "recipe.json").read_text())
        assert recipe.pop("deform_layers") == layers
        assert recipe["iterations"] == metrics[name]["iterations"] == 2
        assert set(metrics[name]["sizes"]) == {"small", "medium", "large"}
        assert 0 <= metrics[name]["mean_iou"] <= 1
    assert metrics["deformable"]["parameters"] > metrics["baseline"]["parameters"]

    assert 0 <= metrics["detector"]["voc"]["area"]["mean_ap"]["0.5"] <= 1
    assert re.search(r"The detector reaches \d+\.\d % mAP at IoU 0.5", printed)

    page = Page((out / "index.html").read_text())
    assert page.pictures == ["predictions.png", "sampling.png", "parts.png"]
    for name in (*page.pictures, "overview.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 300
    rows = comparison(metrics["baseline"], metrics["deformable"]).rows
    assert page.cells[3:] == [cell for row in rows for cell in row]
    for row in rows:
        assert any(all(cell in line for cell in row) for line in printed.splitlines()), row
    assert "not a measurement" in printed

    before = contents(out)
    assert len(before) > 20
    main(["demo", "--out", str(out), *TINY])
    again = capsys.readouterr().out
    assert again.count("before") == 4
    assert contents(out) == before
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_other_data_in_the_output_folder_are_kept(tmp_path, complaint):
    out = tmp_path / "demo"
    (out / "data").mkdir(parents=True)
    (out / "data/notes.txt").write_text("mine")
    assert str(out / "data") in complaint("demo", "--out", out, *TINY)
    assert [path.name for path in out.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["iterations", "detector_iterations", "images", "val", "size"])
def test_sizes_below_the_minimum_are_rejected(name):
    with pytest.raises(ValueError, match=f"expected {name} to be at least"):
        Demo(**{name: 0})


def test_table():
    def run(mean_iou, seconds):
        sizes = {
            "small": {"objects": 7, "mean_iou": 0.25},
            "large": {"objects": 0, "mean_iou": None},
        }
        return {
            "mean_iou": mean_iou,
            "sizes": sizes,
            "parameters": 1_000_000,
            "seconds_per_iteration": seconds,
        }

    assert comparison(run(0.5, 0.5), run(0.4567, None)).rows == [
        ["mean IoU", "50.0%", "45.7%", "-4.3"],
        ["IoU of 7 small objects", "25.0%", "25.0%", "+0.0"],
        ["IoU of 0 large objects", "-", "-", "-"],
        ["parameters", "1,000,000", "1,000,000", "+0.0%"],
        ["seconds per iteration", "0.500", "-", "-"],
    ]


def test_an_interrupted_run_resumes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"

    monkeypatch.setattr("deformnet.demo.run.train", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(out), *TINY])
    assert stopped.value.code == 130
    assert not (out / "metrics.json").exists()
    path = checkpoint_path(out / "runs/baseline")
    path.parent.mkdir(parents=True)
    content = {key: {} for key in ("model", "optimizer", "precision")}
    described = {"deformnet": {"recipe": {}, "data": {}}}
    torch.save({**content, **described, "iteration": 1}, path)
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(out), *TINY])
    assert "baseline network: resuming after iteration 1" in capsys.readouterr().out
