import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deformnet.data.files import read_image
from deformnet.metrics.detections import read_detections
from deformnet.models.detection.detector import Candidates, Detector, Features
from deformnet.recipes import RFCNRecipe
from deformnet.tasks.detection import DetectionPredictor
from deformnet.visualization.drawing import draw_boxes
from pictures import noise, save, turned

CLASSES = ("cell", "plate")


class Constant(Detector):
    """Finds the same three boxes everywhere, in parts of the image's size."""

    takes_proposals = False

    def __init__(self):
        super().__init__(nn.Identity(), len(CLASSES))

    def features(self, images):
        return Features(images, images)

    def propose(self, features, sizes):
        raise NotImplementedError

    def candidates(self, features, sizes, proposals):
        height, width = sizes[0]
        parts = torch.tensor([[0.1, 0.2, 0.4, 0.5], [0.5, 0.5, 1, 1], [0, 0.6, 0.2, 1]])
        boxes = parts * torch.tensor([width, height, width, height])
        return [Candidates(boxes, torch.tensor([[0.9, 0], [0, 0.6], [0.2, 0]]))]

    def losses(self, images, sizes, targets, proposals=None):
        raise NotImplementedError


@pytest.fixture
def predictor():
    recipe = RFCNRecipe(short_side=40, max_side=80)
    return DetectionPredictor(recipe, Constant(), CLASSES, device="cpu")


def test_files_with_a_broken_one_among_them(predictor, tmp_path):
    first = save(tmp_path / "first.png", noise(20, 30))
    broken = save(tmp_path / "broken.jpg", noise(200, 300))
    broken.write_bytes(broken.read_bytes()[:2000])
    missing = tmp_path / "missing.jpg"
    last = save(tmp_path / "last.photo.jpg", noise(500, 600))
    out = tmp_path / "out"
    results = dict(predictor.write([first, broken, missing, last], out))
    assert list(results) == [first, broken, missing, last]
    assert results[first] is None
    assert results[last] is None
    for path in (broken, missing):
        assert str(results[path]).startswith(f"{path}: ")
        assert "\n" not in str(results[path])
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
    assert written == ["detections.jsonl", "pictures/first.jpg", "pictures/last.photo.jpg"]

    lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["first", "last.photo"]
    assert lines[0]["scores"] == pytest.approx([0.9, 0.6, 0.2]), "all, drawn or not"
    assert lines[0]["classes"] == ["cell", "plate", "cell"]
    expected = [[3, 4, 12, 10], [15, 10, 30, 20], [0, 12, 6, 20]]
    assert np.allclose(lines[0]["boxes"], expected, atol=1e-4)
    again = read_detections(out / "detections.jsonl")
    assert [record.image for record in again] == ["first", "last.photo"]
    assert np.allclose(again[0].boxes, expected, atol=1e-4)


@pytest.mark.parametrize(("threshold", "drawn"), [(0.1, 3), (0.5, 2), (0.7, 1), (0.95, 0)])
def test_pictures_show_what_scores_enough(predictor, tmp_path, threshold, drawn):
    path = save(tmp_path / "x.png", noise(500, 600))
    for _, problem in predictor.write([path], tmp_path / "out", threshold=threshold):
        assert problem is None
    image = read_image(path)
    boxes, scores, labels = predictor(image)
    expected = draw_boxes(image, boxes[:drawn], labels[:drawn], CLASSES, scores[:drawn])
    with Image.open(tmp_path / "out/pictures/x.jpg") as file:
        assert file.size == expected.size
        difference = np.asarray(file).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 8, "but for JPEG's loss the same"


def test_photographs_are_turned_upright(predictor, tmp_path):
    path = save(tmp_path / "photo.jpg", noise(20, 30), exif=turned())
    assert [problem for _, problem in predictor.write([path], tmp_path)] == [None]
    line = json.loads((tmp_path / "detections.jsonl").read_text())
    assert np.allclose(line["boxes"][1], [10, 15, 20, 30], atol=1e-4)


def test_an_older_file_stays_until_all_is_done(predictor, tmp_path):
    paths = [save(tmp_path / f"{k}.png", noise(20, 30 + k)) for k in range(3)]
    lines = tmp_path / "out/detections.jsonl"
    lines.parent.mkdir()
    lines.write_text("older")
    results = predictor.write(paths, tmp_path / "out")
    next(results)
    next(results)
    assert lines.read_text() == "older"
    results.close()  # as an interruption does
    assert lines.read_text() == "older"
    assert sorted(p.name for p in lines.parent.iterdir()) == ["detections.jsonl", "pictures"]
    assert all(problem is None for _, problem in predictor.write(paths, lines.parent))
    assert len(lines.read_text().splitlines()) == 3


def test_a_folder_that_cannot_be_written_is_named(predictor, tmp_path):
    (tmp_path / "out").touch()
    path = save(tmp_path / "x.png", noise(20, 30))
    with pytest.raises(OSError, match="out"):
        list(predictor.write([path], tmp_path / "out"))
