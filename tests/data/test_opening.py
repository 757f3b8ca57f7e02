"""Recognition of the layout of a data set; folders and splits that do not exist."""

import json
import os

import pytest

from deformnet.data import (
    CityscapesSegmentation,
    COCODetection,
    VOCDetection,
    VOCSegmentation,
    detection_splits,
    open_detection,
    open_segmentation,
)
from detection_sets import coco_content, write_coco, write_voc
from small_sets import one_line, save_image, write_list

READERS = {
    "voc": (VOCSegmentation, open_segmentation),
    "cityscapes": (CityscapesSegmentation, open_segmentation),
    "voc_boxes": (VOCDetection, open_detection),
    "coco": (COCODetection, open_detection),
}


@pytest.fixture
def voc_boxes(tmp_path):
    return write_voc(tmp_path / "voc_boxes")


@pytest.fixture
def coco(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", coco_content(), split, split)
    return tmp_path / "coco"


@pytest.fixture
def yolo(tmp_path):
    for split in ("train", "val"):
        save_image(tmp_path / f"yolo/{split}/images/a.jpg")
        write_list(tmp_path / f"yolo/{split}/labels/a.txt", ["1 0.5 0.5 0.25 0.5"])
    write_list(tmp_path / "yolo/classes.txt", ["one", "two"])
    return tmp_path / "yolo"


@pytest.fixture
def labelme(tmp_path):
    for split in ("train", "val"):
        save_image(tmp_path / f"labelme/{split}/images/a.jpg")
        shape = {"label": "one", "shape_type": "rectangle", "points": [[4, 3], [12, 9]]}
        content = {"shapes": [shape], "imagePath": "../images/a.jpg"}
        write_list(tmp_path / f"labelme/{split}/json/a.json", [json.dumps(content)])
    return tmp_path / "labelme"


@pytest.mark.parametrize("kind", READERS)
def test_layout_is_recognized(kind, request):
    root, (reader, open_any) = request.getfixturevalue(kind), READERS[kind]
    assert type(open_any(root, "train")) is reader
    assert len(open_any(str(root), "train")) == len(reader(root, "train"))
    assert open_any(root, "val", lambda image, annotations: "transformed")[0] == "transformed"


@pytest.mark.parametrize("kind", READERS)
def test_missing_folder_or_split(kind, request, tmp_path):
    root = request.getfixturevalue(kind)
    for call in READERS[kind]:
        with one_line(FileNotFoundError, "other", "are: train, val"):
            call(root, "other")
        with one_line(FileNotFoundError, tmp_path / "nowhere", "no such folder"):
            call(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("kind", [*READERS, "yolo", "labelme"])
def test_folders_that_cannot_be_listed(kind, request, monkeypatch):
    """The same samples as before, or an error that names the folder: it does not look empty."""
    root, closed = request.getfixturevalue(kind), set()
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    open_any = READERS.get(kind, (None, open_detection))[1]

    def samples():
        images = open_any(root, "train")
        return [str(images[index]) for index in range(len(images))]

    def unless_closed(call):
        def checked(path="."):
            if str(path) in closed:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path)

        return checked

    before = samples()
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, unless_closed(getattr(os, name)))
    named = 0
    for folder in folders:
        closed = {str(folder)}
        try:
            assert samples() == before
        except PermissionError as error:
            named += 1
            assert folder == type(folder)(error.filename)  # noqa: PT017
    assert named


def test_splits(voc_boxes, coco):
    assert detection_splits(str(voc_boxes)) == detection_splits(coco) == ["train", "val"]
    with one_line(FileNotFoundError, "nowhere", "no such folder"):
        detection_splits(coco / "nowhere")


def test_year_as_root(voc_boxes):
    assert type(open_detection(voc_boxes / "VOCdevkit/VOC2012", "train")) is VOCDetection


def test_unknown_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    parts = (tmp_path, "found no images", "VOCdevkit", "contains photos")
    with one_line(FileNotFoundError, *parts, "leftImg8bit"):
        open_segmentation(tmp_path, "train")
    with one_line(FileNotFoundError, *parts, "annotations/instances_<split>.json"):
        open_detection(tmp_path, "train")
    with one_line(FileNotFoundError, *parts, "annotations/instances_<split>.json"):
        detection_splits(tmp_path)


def test_segmentation_data_set_without_boxes(voc):
    assert detection_splits(voc) == []
    with one_line(FileNotFoundError, "expected boxes, but found masks; train deeplab"):
        open_detection(voc, "train")
