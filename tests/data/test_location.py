"""Images and annotations that lie apart, in every layout of annotations."""

import json
from pathlib import Path

import numpy as np
import pytest

from deformnet.data import DataFiles, detection_splits, open_detection, open_segmentation
from detection_sets import coco_content, voc_object, voc_xml
from small_sets import one_line, save_image, save_labels


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images 0007 and 0003, and 0005 in a subfolder."""
    for name in ("0007.jpg", "0003.jpg", "more/0005.jpg"):
        save_image(tmp_path / "photos" / name)
    return tmp_path / "photos"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_coco(folder: Path) -> Path:
    content = coco_content()
    content["images"][2]["file_name"] = "more/0005.jpg"
    write(folder / "boxes.json", json.dumps(content))
    return folder / "boxes.json"


def write_xml(folder: Path) -> Path:
    for name in ("0007", "0003", "more/0005"):
        write(folder / f"{name}.xml", voc_xml(voc_object((3, 2, 9, 10), "one")))
    return folder


def write_yolo(folder: Path, line: str = "0 0.5 0.5 0.25 0.5") -> Path:
    for name in ("0007", "0003", "more/0005"):
        write(folder / f"{name}.txt", f"{line}\n")
    write(folder / "classes.txt", "one\n")
    return folder


def write_labelme(folder: Path) -> Path:
    shape = {"label": "one", "points": [[2, 1], [9, 10]], "shape_type": "rectangle"}
    for name in ("0007", "0003"):
        content = {"shapes": [shape], "imagePath": f"{name}.jpg", "imageHeight": 12}
        write(folder / f"{name}.json", json.dumps({**content, "imageWidth": 16}))
    return folder


def write_masks(folder: Path) -> Path:
    for name in ("0007", "0003", "more/0005"):
        save_labels(folder / f"{name}.png", np.eye(12, 16), mode="L")
    write(folder / "classes.txt", "background\none\n")
    return folder


def write_polygons(folder: Path) -> Path:
    return write_yolo(folder, "0 0.1 0.1 0.9 0.1 0.5 0.9")


@pytest.mark.parametrize(
    ("writer", "count"), [(write_coco, 3), (write_xml, 3), (write_yolo, 3), (write_labelme, 2)]
)
def test_boxes(photos, tmp_path, writer, count):
    files = DataFiles(str(photos), str(writer(tmp_path / "elsewhere")))
    assert detection_splits(files) == ["train"]
    images = open_detection(files, "train")
    assert len(images) == count
    assert images.classes[0] == "one"
    assert {images.image_path(i).parent.name for i in range(count)} <= {"photos", "more"}
    assert sum(len(images[i][1].labels) for i in range(count)) >= count
    halves = [open_detection(files, f"train[{kind}=0.34]") for kind in ("held-out", "without")]
    assert sum(map(len, halves)) == count
    assert min(map(len, halves)) == 1
    with one_line(FileNotFoundError, "splits", "train"):
        open_detection(files, "val")


@pytest.mark.parametrize(
    ("writer", "count"),
    [(write_coco, 3), (write_polygons, 3), (write_labelme, 2), (write_masks, 3)],
)
def test_masks(photos, tmp_path, writer, count):
    images = open_segmentation(DataFiles(photos, writer(tmp_path / "elsewhere")), "train")
    assert len(images) == count
    assert images.classes[:2] == ("background", "one")
    for i in range(count):
        image, mask = images[i]
        assert image.shape[1:] == mask.shape == (12, 16)
    part = (
        open_segmentation(
            DataFiles(photos, tmp_path / "elsewhere/boxes.json"), "train[without=0.34]"
        )
        if writer is write_coco
        else images
    )
    for i in range(len(part)):
        whole = [images.name(k) for k in range(count)].index(part.name(i))
        assert (part[i][1] == images[whole][1]).all()


def test_what_is_there_instead(photos, tmp_path):
    boxes, masks = write_xml(tmp_path / "boxes"), write_masks(tmp_path / "masks")
    with one_line(
        FileNotFoundError, "expected masks, but found boxes; train rfcn or another detector"
    ):
        open_segmentation(DataFiles(photos, boxes), "train")
    with one_line(FileNotFoundError, "expected boxes, but found masks; train deeplab"):
        open_detection(DataFiles(photos, masks), "train")
    write(tmp_path / "notes/a.csv", "1,2")
    with one_line(FileNotFoundError, "expected boxes", "COCO", "found 1 tables"):
        open_detection(DataFiles(photos, tmp_path / "notes"), "train")
    for place in (DataFiles(tmp_path / "no", boxes), DataFiles(photos, tmp_path / "no")):
        with one_line(FileNotFoundError, tmp_path / "no"):
            open_detection(place, "train")


def test_several_files_of_coco(photos, tmp_path):
    path = write_coco(tmp_path / "elsewhere")
    (path.parent / "other.json").write_text(path.read_text())
    with one_line(ValueError, "elsewhere", "one COCO JSON file", "boxes.json, other.json"):
        open_detection(DataFiles(photos, path.parent), "train")
