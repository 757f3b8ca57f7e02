"""What detectors write, and what they read."""

import csv
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deformnet import UserError
from deformnet.data.files import read_image
from deformnet.metrics.detections import read_detections
from deformnet.models.detection.detector import Candidates, Detector, Features
from deformnet.recipes import RFCNRecipe
from deformnet.tasks import find_images, video
from deformnet.tasks.detection import DetectionPredictor
from deformnet.tasks.results import require_apart
from deformnet.tasks.segmentation import SegmentationPredictor
from deformnet.tasks.video import read_frames
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


def written(predictor, paths, out, **options):
    """What is wrong with each image."""
    files = find_images(paths, videos=True, apart_from=out)
    return [one.problem for one in predictor.write(files, out, **options)]


def test_files_with_a_broken_one_among_them(predictor, tmp_path):
    first = save(tmp_path / "first.png", noise(20, 30))
    broken = save(tmp_path / "broken.jpg", noise(200, 300))
    broken.write_bytes(broken.read_bytes()[:2000])
    missing = tmp_path / "missing.jpg"
    last = save(tmp_path / "last.photo.jpg", noise(500, 600))
    out = tmp_path / "out"
    results = list(predictor.write(find_images([first, broken, missing, last]), out))
    assert [one.name for one in results] == [
        *("first.png", "broken.jpg", "missing.jpg", "last.photo.jpg"),
    ]
    assert [one.boxes for one in results] == [2, 0, 0, 2]
    assert [one.best for one in results] == [pytest.approx(0.9), None, None, pytest.approx(0.9)]
    problems = [one.problem for one in results]
    assert problems[0] is problems[3] is None
    for path, problem in ((broken, problems[1]), (missing, problems[2])):
        assert problem.startswith(f"{path}: ")
        assert "\n" not in problem
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
    assert written == ["detections.jsonl", "pictures/first.jpg", "pictures/last.photo.jpg"]

    lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["first.png", "last.photo.jpg"]
    assert lines[0]["scores"] == pytest.approx([0.9, 0.6, 0.2]), "all, drawn or not"
    assert lines[0]["classes"] == ["cell", "plate", "cell"]
    expected = [[3, 4, 12, 10], [15, 10, 30, 20], [0, 12, 6, 20]]
    assert np.allclose(lines[0]["boxes"], expected, atol=1e-4)
    again = read_detections(out / "detections.jsonl")
    assert [record.image for record in again] == ["first.png", "last.photo.jpg"]
    assert np.allclose(again[0].boxes, expected, atol=1e-4)


@pytest.mark.parametrize(("threshold", "drawn"), [(0.1, 3), (0.5, 2), (0.7, 1), (0.95, 0)])
def test_pictures_show_what_scores_enough(predictor, tmp_path, threshold, drawn):
    path = save(tmp_path / "x.png", noise(500, 600))
    assert written(predictor, [path], tmp_path / "out", threshold=threshold) == [None]
    image = read_image(path)
    boxes, scores, labels = predictor.predict(image)
    expected = draw_boxes(image, boxes[:drawn], labels[:drawn], CLASSES, scores[:drawn])
    with Image.open(tmp_path / "out/pictures/x.jpg") as file:
        assert file.size == expected.size
        difference = np.asarray(file).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 8, "but for JPEG's loss the same"


def test_photographs_are_turned_upright(predictor, tmp_path):
    path = save(tmp_path / "photo.jpg", noise(20, 30), exif=turned())
    assert written(predictor, [path], tmp_path / "out") == [None]
    line = json.loads((tmp_path / "out/detections.jsonl").read_text())
    assert np.allclose(line["boxes"][1], [10, 15, 20, 30], atol=1e-4)


def test_an_older_file_stays_until_all_is_done(predictor, tmp_path):
    paths = [save(tmp_path / f"{k}.png", noise(20, 30 + k)) for k in range(3)]
    lines = tmp_path / "out/detections.jsonl"
    lines.parent.mkdir()
    lines.write_text("older")
    results = predictor.write(find_images(paths), tmp_path / "out")
    next(results)
    next(results)
    assert lines.read_text() == "older"
    results.close()  # as an interruption does
    assert lines.read_text() == "older"
    assert sorted(p.name for p in lines.parent.iterdir()) == ["detections.jsonl", "pictures"]
    assert written(predictor, paths, lines.parent) == [None] * 3
    assert len(lines.read_text().splitlines()) == 3


def test_a_folder_that_cannot_be_written_is_named(predictor, tmp_path):
    (tmp_path / "out").touch()
    path = save(tmp_path / "x.png", noise(20, 30))
    with pytest.raises(OSError, match="out"):
        written(predictor, [path], tmp_path / "out")


def folder(tmp_path):
    """Images of 40 x 60 and 50 x 80 pixels in a folder and its sub-folder."""
    (tmp_path / "photos/a b").mkdir(parents=True)
    save(tmp_path / "photos/x.png", noise(40, 60))
    save(tmp_path / "photos/a b/ü.jpg", noise(50, 80))
    return tmp_path / "photos"


def test_coco_files(predictor, tmp_path):
    photos = folder(tmp_path)
    assert written(predictor, [photos], tmp_path / "out", box_format="coco") == [None, None]
    content = json.loads((tmp_path / "out/detections.json").read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a b/ü.jpg", "height": 50, "width": 80},
        {"id": 2, "file_name": "x.png", "height": 40, "width": 60},
    ]
    assert content["categories"] == [{"id": 1, "name": "cell"}, {"id": 2, "name": "plate"}]
    assert [one["image_id"] for one in content["annotations"]] == [1, 1, 1, 2, 2, 2]
    assert [one["id"] for one in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    first = content["annotations"][3]
    assert first["bbox"] == pytest.approx([6, 8, 18, 12], abs=1e-3)
    assert first["area"] == pytest.approx(216, abs=0.1)
    assert first["score"] == pytest.approx(0.9)
    assert [first["category_id"], first["iscrowd"]] == [1, 0]
    assert (tmp_path / "out/pictures/a b/ü.jpg").is_file()


def test_yolo_files(predictor, tmp_path):
    photos = folder(tmp_path)
    written(predictor, [photos], tmp_path / "out", box_format="yolo")
    assert (tmp_path / "out/classes.txt").read_text() == "cell\nplate\n"
    lines = (tmp_path / "out/labels/a b/ü.txt").read_text().splitlines()
    rows = np.array([[float(number) for number in line.split()] for line in lines])
    expected = [[0, 0.25, 0.35, 0.3, 0.3, 0.9], [1, 0.75, 0.75, 0.5, 0.5, 0.6]]
    assert np.allclose(rows[:2], expected, atol=1e-4)
    assert len(rows) == 3
    assert not (tmp_path / "out/detections.jsonl").exists()


def test_csv_files(predictor, tmp_path):
    photos = folder(tmp_path)
    written(predictor, [photos], tmp_path / "out", box_format="csv")
    with (tmp_path / "out/detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a b/ü.jpg"] * 3 + ["x.png"] * 3
    assert [row["class"] for row in rows[:3]] == ["cell", "plate", "cell"]
    assert float(rows[3]["score"]) == pytest.approx(0.9)
    edges = [float(rows[3][name]) for name in ("x1", "y1", "x2", "y2")]
    assert edges == pytest.approx([6, 8, 24, 20], abs=1e-3)


@pytest.mark.parametrize("box_format", ["jsonl", "coco", "csv"])
def test_an_older_file_of_any_format_stays_until_all_is_done(predictor, tmp_path, box_format):
    photos = folder(tmp_path)
    out = tmp_path / "out"
    written(predictor, [photos], out, box_format=box_format)
    (path,) = out.glob("detections.*")
    path.write_text("older")
    results = predictor.write(find_images([photos]), out, box_format=box_format)
    next(results)
    results.close()
    assert path.read_text() == "older"
    assert sorted(p.name for p in out.iterdir()) == [path.name, "pictures"]


def test_inputs_are_never_overwritten(predictor, tmp_path):
    """Images in `photos/pictures`, results into `photos`; directly, or through a link."""
    pictures = tmp_path / "photos/pictures"
    pictures.mkdir(parents=True)
    path = save(pictures / "x.jpg", noise(20, 30))
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for out in (tmp_path / "photos", tmp_path / "link"):
        with pytest.raises(UserError, match=r"those of .* would overwrite .*x\.jpg"):
            predictor.write(find_images([pictures]), out)
    assert path.read_bytes() == before
    # The second time, the results of the first are not among the images.
    inside = tmp_path / "photos/out"
    for _ in range(2):
        assert written(predictor, [tmp_path / "photos"], inside) == [None]


def test_labels_of_a_data_set_are_never_overwritten(predictor, tmp_path):
    """Also after results with pictures alone; results of an earlier run are replaced."""
    (tmp_path / "images").mkdir()
    image = save(tmp_path / "images/x.jpg", noise(20, 30))
    label, classes = tmp_path / "labels/x.txt", tmp_path / "classes.txt"
    label.parent.mkdir()
    assert written(predictor, [image.parent], tmp_path) == [None]
    for content in ("0 0.5 0.5 0.1 0.1\n", "0 0.1 0.1 0.9 0.1 0.9 0.9\n"):
        label.write_text(content)
        with pytest.raises(UserError, match=r"x\.txt, which is not one of them"):
            written(predictor, [image.parent], tmp_path, box_format="yolo")
        assert label.read_text() == content
    label.unlink()
    classes.write_text("background\ncell\n")
    with pytest.raises(UserError, match=r"classes\.txt: expected the classes of this network"):
        written(predictor, [image.parent], tmp_path, box_format="yolo")
    assert classes.read_text() == "background\ncell\n"
    assert not label.exists()
    classes.unlink()
    for _ in range(2):
        assert written(predictor, [image.parent], tmp_path, box_format="yolo") == [None]


def test_masks_of_a_data_set_are_never_overwritten(tmp_path):
    for folder in ("images", "labels", "overlays"):
        (tmp_path / folder).mkdir()
    save(tmp_path / "images/x.jpg", noise(20, 30))
    files, folders = find_images([tmp_path / "images"]), SegmentationPredictor.folders
    require_apart(files, tmp_path, folders, "jsonl")
    save(tmp_path / "labels/x.png", noise(20, 30))
    with pytest.raises(UserError, match=r"x\.png, which is not one of them"):
        require_apart(files, tmp_path, folders, "jsonl")
    save(tmp_path / "overlays/x.jpg", noise(20, 30))  # then both are results
    require_apart(files, tmp_path, folders, "jsonl")
    assert list(folders) == ["overlays", "labels"]  # in the order in which they are written


def test_names_of_the_maximum_length_and_of_other_encodings(predictor, tmp_path):
    long = save(tmp_path / f"{'x' * 251}.png", noise(20, 30))
    odd = save(tmp_path / os.fsdecode(b"\xff.png"), noise(20, 30))
    good = save(tmp_path / "good.png", noise(20, 30))
    for box_format, path in (("jsonl", "detections.jsonl"), ("csv", "detections.csv")):
        problems = written(predictor, [long, odd, good], tmp_path / "out", box_format=box_format)
        assert problems == [None, None, None]
        assert b"good.png" in (tmp_path / "out" / path).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out/detections.jsonl").open()]
    assert [line["image"] for line in lines] == [long.name, "\udcff.png", "good.png"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("could not create a primitive"),  # oneDNN
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
)
def test_images_beyond_the_memory_cost_themselves(error, predictor, tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{k}.png", noise(20, 30 + k)) for k in range(3)]
    features = predictor.model.features

    def limited(images):
        if images.shape[3] == round(40 * 31 / 20):
            raise error
        return features(images)

    monkeypatch.setattr(predictor.model, "features", limited)
    problems = written(predictor, paths, tmp_path / "out")
    assert problems == [None, f"{paths[1]}: too large for the memory of this machine", None]
    monkeypatch.setattr(predictor.model, "features", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # our own faults are not the image's
        written(predictor, paths, tmp_path / "out")


def test_images_too_long_for_jpeg_cost_themselves(predictor, tmp_path):
    paths = [save(tmp_path / "a.png", noise(1, 66000)), save(tmp_path / "b.png", noise(20, 30))]
    problems = written(predictor, paths, tmp_path / "out")
    assert problems[0].startswith(f"{paths[0]}: cannot write a picture of it (")
    assert problems[1] is None


def test_pipes_are_not_read(predictor, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    problems = written(predictor, [tmp_path / "pipe.jpg"], tmp_path / "out")
    assert problems == [
        f"{tmp_path / 'pipe.jpg'}: expected an image file, but got a folder, a pipe or a device"
    ]


class Decoder:
    """A reader of videos: three frames in torchcodec's form."""

    def __init__(self, path, dimension_order):
        assert dimension_order == "NCHW"
        self.damaged = b"damaged" in Path(path).read_bytes()

    def __iter__(self):
        yield noise(20, 30)
        if self.damaged:
            raise RuntimeError("Could not decode\nmore")
        yield from (noise(20, 31), noise(20, 32))


@pytest.fixture
def torchcodec(monkeypatch):
    module = types.SimpleNamespace(VideoDecoder=Decoder)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_videos(predictor, tmp_path, torchcodec):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.MP4").touch()
    (tmp_path / "in/b.mov").write_text("damaged")
    save(tmp_path / "in/c.png", noise(20, 30))
    problems = written(predictor, [tmp_path / "in"], tmp_path / "out")
    damaged = f"{tmp_path / 'in/b.mov'}: not a readable video (Could not decode)"
    assert problems == [None, None, None, None, damaged, None]
    lines = [json.loads(line) for line in (tmp_path / "out/detections.jsonl").open()]
    assert [line["image"] for line in lines] == [
        *("a.MP4/000000", "a.MP4/000001", "a.MP4/000002", "b.mov/000000", "c.png"),
    ]
    assert (tmp_path / "out/pictures/a.MP4/000002.jpg").is_file()
    assert [file.name for file in find_images([tmp_path / "in"])] == ["c.png"]


def test_large_frames(tmp_path, torchcodec, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 599)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match="frames of at most 599 pixels, but got 30x20"):
        list(read_frames(tmp_path / "a.mp4"))


def test_videos_without_a_reader(tmp_path, monkeypatch):
    for name in ("torchcodec", "torchcodec.decoders", "av", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.mp4").touch()
    message = "none of torchcodec, PyAV and OpenCV is installed; run `pip install av`"
    with pytest.raises(UserError, match=message):
        find_images([tmp_path], videos=True)


@pytest.mark.parametrize("reader", ["av", "cv2"])
def test_frames_of_installed_readers(tmp_path, monkeypatch, reader):
    av = pytest.importorskip("av")
    pytest.importorskip(reader)
    for name in {"torchcodec", "torchcodec.decoders", "av", "cv2"} - {reader}:
        monkeypatch.setitem(sys.modules, name, None)
    images = [torch.full((3, 32, 48), 60 * k, dtype=torch.uint8) for k in range(4)]
    images[3][0] = 0  # cyan: the order of the channels
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for image in images:
            array = image.permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    frames = list(read_frames(tmp_path / "a.mp4"))
    assert len(frames) == 4
    for frame, image in zip(frames, images, strict=True):
        assert frame.shape == image.shape
        assert (frame.int() - image.int()).abs().float().mean() < 12
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text\.mp4: not a readable video \("):
        list(read_frames(tmp_path / "text.mp4"))
