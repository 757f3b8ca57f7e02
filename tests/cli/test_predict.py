"""What `deformnet predict` says, with a detector that finds a box of score 0.42 everywhere."""

import pytest
import torch
from torch import nn

import deformnet.engine
from deformnet.cli import main
from deformnet.models.detection.detector import Candidates, Detector, Features
from deformnet.recipes import RFCNRecipe
from deformnet.tasks.detection import DetectionPredictor
from pictures import noise, save


class OneBox(Detector):
    takes_proposals = False
    score = 0.42

    def __init__(self):
        super().__init__(nn.Identity(), 1)

    def features(self, images):
        return Features(images, images)

    def propose(self, features, sizes):
        raise NotImplementedError

    def candidates(self, features, sizes, proposals):
        return [Candidates(torch.tensor([[1.0, 2, 9, 9]]), torch.tensor([[self.score]]))]

    def losses(self, images, sizes, targets, proposals=None):
        raise NotImplementedError


@pytest.fixture
def detector(monkeypatch):
    model = OneBox()
    predictor = DetectionPredictor(RFCNRecipe(short_side=40), model, ("cell",), device="cpu")
    monkeypatch.setattr(deformnet.engine, "load", lambda *_, **__: predictor)
    return model


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos/sub").mkdir(parents=True)
    save(tmp_path / "photos/a.png", noise(20, 30))
    save(tmp_path / "photos/sub/b.png", noise(20, 31))
    return tmp_path / "photos"


def said(capsys, *words):
    main(["predict", "run", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def test_boxes_are_counted(detector, photos, tmp_path, capsys):
    out = tmp_path / "out"
    lines = said(capsys, photos, "--out", out, "--threshold", "0.4")
    assert lines == [
        f"2 of 2 images done, results in {out}",
        "2 boxes with a score of at least 0.4, in 2 images",
    ]


def test_highest_score_is_printed_if_no_box_is_drawn(detector, photos, tmp_path, capsys):
    lines = said(capsys, photos, "--out", tmp_path / "out")
    assert lines[1] == (
        "no boxes drawn: none has a score of at least 0.5; the highest score is 0.420, in a.png: "
        "try a lower --threshold"
    )
    detector.score = 0.0
    lines = said(capsys, photos, "--out", tmp_path / "out")
    assert lines[1].endswith("none has a score of at least 0.5; the network predicted no boxes")


@pytest.mark.parametrize(
    ("name", "file"),
    [("coco", "detections.json"), ("yolo", "labels/sub/b.txt"), ("csv", "detections.csv")],
)
def test_formats(detector, photos, tmp_path, capsys, name, file):
    said(capsys, photos, "--out", tmp_path / "out", "--format", name)
    assert (tmp_path / "out" / file).is_file()
    assert (tmp_path / "out/pictures/sub/b.jpg").is_file()


def test_results_are_not_images_of_the_next_time(detector, photos, tmp_path, capsys):
    for _ in range(2):
        assert "2 of 2 images done" in said(capsys, photos, "--out", photos / "out")[0]


def test_inputs_are_not_overwritten(detector, photos, tmp_path, complaint):
    (photos / "sub").rename(photos / "pictures")
    save(photos / "pictures/a.jpg", noise(20, 30))
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    line = complaint("predict", "run", photos, "--out", photos)
    assert f"would overwrite {photos / 'pictures/a.jpg'}" in line
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before
