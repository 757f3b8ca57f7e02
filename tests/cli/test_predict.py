"""What `deformnet predict` says, with a detector that finds a box of score 0.42 everywhere."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
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


def test_every_bad_item_costs_itself_and_is_listed(detector, photos, tmp_path, capfd):
    os.mkfifo(photos / "pipe.jpg")
    (photos / "cut.jpg").write_bytes((photos / "a.png").read_bytes()[:300])
    (photos / "lost.jpg").symlink_to("nowhere")
    (photos / "text.png").write_text("no image")
    Image.new("RGB", (30, 20)).save(photos / "script.jpg", format="EPS")
    save(photos / os.fsdecode(b"\xff.png"), noise(20, 33))
    save(photos / "long.png", noise(1, 66000))
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    words = ["predict", "run", photos, folder, tmp_path / "none.jpg", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 2
    said, complaints = capfd.readouterr()
    bad = ["cut.jpg", "long.png", "lost.jpg", "pipe.jpg", "script.jpg", "text.png"]
    bad += ["folder.jpg", "none.jpg"]
    assert f"3 of 11 images done, results in {tmp_path / 'out'}\n" in said
    assert f"failed: {', '.join(bad)}\n" in said
    lines = complaints.splitlines()
    assert [Path(line.split(": ")[1]).name for line in lines if ": " in line] == bad, lines
    done = [json.loads(line) for line in (tmp_path / "out/detections.jsonl").open()]
    assert [it["image"] for it in done] == ["a.png", "sub/b.png", "\udcff.png"]


@pytest.mark.parametrize("name", ["sub", ""])
def test_unreadable_folders_are_failures(detector, photos, tmp_path, monkeypatch, capfd, name):
    listed, folder = os.scandir, photos / name

    def scandir(path):
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "iterdir", lambda path: scandir(path))
    with pytest.raises(SystemExit):
        main(["predict", "run", str(photos), "--out", str(tmp_path / "out")])
    assert capfd.readouterr().err == f"deformnet: {folder}: Permission denied\n"


def test_matches_of_a_pattern_are_not_results(detector, photos, tmp_path, capsys):
    for _ in range(3):
        assert "2 of 2 images" in said(capsys, photos / "**/*.*", "--out", photos / "out")[0]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_inputs_are_not_overwritten_through_links(detector, photos, tmp_path, complaint, link):
    out = tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    link(photos / "a.png", out / "pictures/a.jpg")
    assert "would overwrite" in complaint("predict", "run", photos, "--out", out)
    (out / "pictures/a.jpg").unlink()
    (out / "pictures").rmdir()
    (out / "pictures").symlink_to(photos)
    (photos / "a.png").unlink()
    save(photos / "a.jpg", noise(20, 30))
    before = (photos / "a.jpg").read_bytes()
    assert "would overwrite" in complaint("predict", "run", photos, "--out", out)
    assert (photos / "a.jpg").read_bytes() == before


def test_a_second_run_on_its_own_pictures_is_refused(detector, photos, complaint):
    main(["predict", "run", str(photos), "--out", str(photos)])
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    assert "would overwrite" in complaint("predict", "run", photos, "--out", photos)
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


def test_a_folder_that_cannot_be_written_is_named_at_once(detector, photos, tmp_path, complaint):
    (tmp_path / "file").touch()
    detector.features = None  # nothing is computed
    out = tmp_path / "file/out"
    assert complaint("predict", "run", photos, "--out", out).startswith(str(tmp_path / "file"))


def test_results_in_a_folder_whose_name_is_not_text(detector, photos, tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"\xfe")
    assert said(capsys, photos, "--out", out)[0].endswith("/\\udcfe")
