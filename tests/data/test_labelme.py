"""The layout of labelme."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from deformnet.data import (
    detection_splits,
    files,
    labelme,
    open_detection,
    open_segmentation,
)
from deformnet.data.check import check_data
from deformnet.data.labelme import LabelmeDetection, LabelmeSegmentation
from small_sets import one_line, save_image

RECTANGLE = ("dog", "rectangle", [[4, 3], [12, 9]])
TRIANGLE = ("cat", "polygon", [[0, 0], [8, 0], [8, 8]])


def shape(label, kind, points, **more):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, **more}


def write(path, *shapes, image=None, size=(12, 16), **more):
    """Writes a JSON file for an image of 12 x 16 (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": [one if isinstance(one, dict) else shape(*one) for one in shapes],
        "imagePath": image or f"{path.stem}.jpg",
        "imageData": "A" * 100,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    path.write_text(json.dumps(content | more))


@pytest.fixture
def one(tmp_path):
    root = tmp_path / "one"
    save_image(root / "a.jpg")
    write(root / "a.json", RECTANGLE, TRIANGLE)
    return root


def boxes(root, split="train"):
    return open_detection(root, split).annotations(0).boxes.tolist()


def test_boxes(one):
    images = open_detection(one, "train")
    assert type(images) is LabelmeDetection
    assert (images.classes, images.name(0), images.size(0)) == (("cat", "dog"), "a", (12, 16))
    image, annotations = images[0]
    assert image.shape == (3, 12, 16)
    assert annotations.boxes.tolist() == [[4, 3, 12, 9], [0, 0, 8, 8]]
    assert annotations.labels.tolist() == [1, 0]
    assert not annotations.ignored.any()


def test_a_size_that_no_image_has_is_that_of_the_image(one):
    write(one / "a.json", RECTANGLE, size=(2**63, 16))
    assert open_detection(one, "train").size(0) == (12, 16)


def test_masks(one):
    images = open_segmentation(one, "train")
    assert type(images) is LabelmeSegmentation
    assert images.classes == ("background", "cat", "dog")
    mask = images[0][1]
    assert mask.dtype == torch.uint8
    assert (mask[3:9, 8:12] == 2).all()
    assert mask[1, 6] == 1  # the triangle
    assert mask[5, 7] == 1  # over the rectangle, which comes first
    assert mask[8, 4] == 2
    assert mask[11, 15] == mask[6, 1] == 0


@pytest.mark.parametrize(
    ("path", "image"),
    [
        ("{}/a.json", "{}/a.JPG"),
        ("{}/annotations/a.json", "{}/images/a.png"),
        ("{}/json/a.json", "{}/a.jpg"),
        ("annotations/{}/a.json", "images/{}/a.bmp"),
        ("labels/{}/a b.json", "images/{}/a b.jpg"),
    ],
)
def test_places(tmp_path, path, image):
    for split in ("train", "val"):
        write(tmp_path / path.format(split), RECTANGLE)
        save_image(tmp_path / image.format(split))
    assert detection_splits(tmp_path) == ["train", "val"]
    for split in ("train", "val"):
        images = open_detection(tmp_path, split)
        assert images.image_path(0) == tmp_path / image.format(split)
        assert boxes(tmp_path, split) == [[4, 3, 12, 9]]


@pytest.mark.parametrize("folder", ["annotations", "labels"])
def test_annotations_beside_a_folder_of_images(tmp_path, folder):
    write(tmp_path / folder / "a.json", RECTANGLE)
    save_image(tmp_path / "images/a.jpg")
    assert boxes(tmp_path) == [[4, 3, 12, 9]]


def test_name_of_the_json_file_before_image_path(one):
    save_image(one / "old.jpg", 20, 20)
    write(one / "a.json", RECTANGLE, image="..\\photos\\old.jpg")
    assert open_detection(one, "train").image_path(0) == one / "a.jpg"
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    assert report.ok
    assert "imagePath is 'old.jpg'; readers use a.jpg" in " ".join(report.remarks)
    assert "1 images have no JSON file" in " ".join(report.remarks)
    (one / "a.jpg").unlink()
    assert open_detection(one, "train").image_path(0) == one / "old.jpg"


def test_image_of_two_files(one):
    write(one / "b.json", RECTANGLE, image="a.jpg")
    with one_line(ValueError, one / "b.json", "a.jpg is also annotated by a.json"):
        open_detection(one, "train")


def test_image_path_stays_in_the_folder(one):
    save_image(one.parent / "secret.jpg")
    write(one / "b.json", RECTANGLE, image="../secret.jpg")
    with one_line(FileNotFoundError, one, "needs b.jpg"):
        open_detection(one, "train")


@pytest.mark.parametrize(
    ("kind", "points", "box"),
    [
        ("rectangle", [[12, 9], [4, 3]], [4, 3, 12, 9]),
        ("rectangle", [[4, 3], [12, 3], [12, 9], [4, 9]], [4, 3, 12, 9]),
        ("circle", [[8, 6], [8, 10]], [4, 2, 12, 10]),
        ("rotation", [[8, 0], [12, 4], [8, 8], [4, 4]], [4, 0, 12, 8]),
        ("polygon", [[-4, 2], [30, 2], [30, 6]], [0, 2, 16, 6]),
    ],
)
def test_kinds_of_shapes(one, kind, points, box):
    write(one / "a.json", ("cat", kind, points))
    assert open_detection(one, "train").annotations(0).boxes.flatten().tolist() == pytest.approx(
        box
    )
    mask = open_segmentation(one, "train")[0][1]
    assert mask.any()
    if kind == "circle":
        assert mask.sum() == pytest.approx(np.pi * 16, rel=0.15)


def test_masks_of_shapes(one):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 1, 1], [0, 1, 0]], np.uint8) * 255).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    write(one / "a.json", shape("cat", "mask", [[14, 2], [17, 4]], mask=data))
    assert boxes(one) == [[15, 2, 16, 4]]
    assert open_segmentation(one, "train")[0][1].nonzero().tolist() == [[2, 15], [3, 15]]


def test_masks_of_gigabytes(one, monkeypatch):
    """A few bytes of JSON can declare masks of any size and number."""
    file = io.BytesIO()
    Image.new("1", (40, 25)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    write(one / "a.json", *[shape("cat", "mask", [[0, 0], [1, 1]], mask=data)] * 3)
    for most, message in ((2999, "shape 3: expected at most 2999"), (999, "shape 1: mask: ")):
        monkeypatch.setattr(labelme, "MAX_PIXELS", most)
        monkeypatch.setattr(files, "MAX_PIXELS", most)
        with one_line(ValueError, one / "a.json", message):
            open_segmentation(one, "train")


def test_groups_are_one_object(one):
    parts = [shape("dog", "rectangle", [[x, 2], [x + 2, 4]], group_id=7) for x in (1, 8)]
    write(one / "a.json", *parts, RECTANGLE)
    assert boxes(one) == [[1, 2, 10, 4], [4, 3, 12, 9]]


def test_ignored_shapes(one):
    points = [[0, 0], [4, 4]]
    shapes = [
        shape("dog", "rectangle", points, difficult=True),
        shape("__ignore__", "rectangle", [[8, 8], [12, 12]]),
        shape("_background_", "rectangle", [[1, 1], [2, 2]]),
        shape("nose", "point", [[3, 3]]),
    ]
    write(one / "a.json", *shapes)
    images = open_detection(one, "train")
    assert images.classes == ("dog",)
    assert images.annotations(0).ignored.tolist() == [True]
    mask = open_segmentation(one, "train")[0][1]
    assert (mask[2:4, 2:4] == 255).all()
    assert (mask[8:, 8:12] == 255).all()
    assert mask[1, 1] == 0
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    assert "1 points or lines" in " ".join(report.remarks)


@pytest.mark.parametrize(("name", "first"), [("classes.txt", ""), ("labels.txt", "__ignore__\n")])
def test_list_of_classes(one, name, first):
    (one / name).write_text(f"{first}_background_\ndog\nbird\ncat\n")
    assert open_detection(one, "train").classes == ("dog", "bird", "cat")
    write(one / "a.json", ("cow", *TRIANGLE[1:]))
    with one_line(ValueError, one / "a.json", "shape 1", name, "dog, bird, cat", "'cow'"):
        open_detection(one, "train")


def test_classes_of_all_splits(tmp_path):
    for split, one in (("train", RECTANGLE), ("val", TRIANGLE)):
        write(tmp_path / split / "a.json", one)
        save_image(tmp_path / split / "a.jpg")
    assert open_detection(tmp_path, "val").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["not readable as JSON"]),
        ("[" * 100000, ["not readable as JSON"]),
        ('{"shapes": [{"points": NaN}]}', ["but got NaN"]),
        ('{"shapes": 3}', ["list of shapes"]),
        ('{"shapes": [4]}', ["shape 1", "with a label"]),
        ('{"shapes": [{"label": 3}]}', ["shape 1", "with a label"]),
        ('{"shapes": [{"label": "a", "points": [[1, 2], [3]]}]}', ["points", "list of [x, y]"]),
        ('{"shapes": [{"label": "a", "points": [[1, 1e400], [3, 3], [1, 3]]}]}', ["1e400"]),
        ('{"shapes": [{"label": "a", "points": [[1, 2], [3, 4]]}]}', ["polygon", "2 points"]),
        (
            '{"shapes": [{"label": "a", "shape_type": "star", "points": [[1, 2]]}]}',
            ["rectangle, polygon", "'star'"],
        ),
        (
            '{"shapes": [{"label": "a", "shape_type": "mask", "points": [[1, 2]], "mask": "?"}]}',
            ["PNG in base64"],
        ),
    ],
)
def test_malformed_files(one, content, parts):
    save_image(one / "b.jpg")
    (one / "b.json").write_text(content)
    for open_any in (open_detection, open_segmentation):
        with one_line(ValueError, one / "b.json", *parts):
            open_any(one, "train")
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    (problem,) = report.problems
    assert all(part in problem for part in ["b.json", *parts])


def test_other_size(one):
    write(one / "a.json", RECTANGLE, size=(24, 32))
    with one_line(ValueError, one / "a.jpg", "32x24", "16x12"):
        open_detection(one, "train")[0]


def test_missing_split(one):
    with one_line(FileNotFoundError, "no split 'val'", "are: train"):
        open_detection(one, "val")
