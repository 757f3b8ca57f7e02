"""Where files and images of COCO may be, what they are called; sizes and EXIF orientation."""

import json
from pathlib import Path

import pytest
from PIL import Image

from deformnet.data import COCODetection, detection_splits, open_detection, open_segmentation
from detection_sets import coco_content
from small_sets import one_line, save_image


def write(root: Path, file: str, images: str, content: dict | None = None) -> None:
    content = content or coco_content()
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for entry in content["images"]:
        save_image(root / images / entry["file_name"], seed=entry["id"])


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instances_{}.json", "{}/images"),
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("annotations/{}.json", "{}"),
        ("annotations/{}_annotations.json", "data/{}"),
        ("Annotations/coco_{}.json", "{}"),
        ("{}.json", "images/{}"),
        ("{}.json", "{}"),
        ("instances_{}.json", "{}"),
        ("{}/_annotations.coco.json", "{}"),  # Roboflow
        ("{}/annotations.json", "{}/images"),
        ("{}/labels.json", "{}/data"),  # FiftyOne
    ],
)
def test_files_of_splits(tmp_path, file, images):
    for split, start in (("train", 0), ("valid", 100)):
        content = coco_content()
        for entry in content["images"]:
            entry["file_name"] = f"{start}_{entry['file_name']}"
        write(tmp_path, file.format(split), images.format(split), content)
    assert detection_splits(tmp_path) == ["train", "valid"]
    found = open_detection(tmp_path, "val")
    assert type(found) is COCODetection
    assert found.image_path(0) == tmp_path / images.format("valid") / "100_0007.jpg"
    assert found[0][1].labels.tolist() == [0, 1, 0]
    assert found.counts().tolist() == [2, 1]  # without the crowd
    masks = open_segmentation(tmp_path, "val")
    assert masks.classes == ("background", "one", "two")
    assert masks[0][1].unique().tolist()[:2] == [0, 1]


@pytest.mark.parametrize(
    "file",
    [
        "annotations/instances_default.json",  # CVAT
        "annotations/instances_train.json",
        "annotations.json",
        "_annotations.coco.json",
        "result.json",  # Label Studio
        "coco/labels.json",
    ],
)
@pytest.mark.parametrize("images", ["", "images", "images/default", "data", "some/where/else"])
def test_one_file_is_train(tmp_path, file, images):
    if file.startswith("coco/"):
        file = file.removeprefix("coco/")
    write(tmp_path, file, images)
    assert detection_splits(tmp_path) == ["train"]
    found = open_detection(tmp_path, "train")
    assert found.image_path(1) == tmp_path / images / "0003.jpg"


def test_any_name_is_the_train_of_a_single_file(tmp_path):
    write(tmp_path, "annotations/instances_own.json", "images")
    assert detection_splits(tmp_path) == ["own"]
    assert len(open_detection(tmp_path, "train")) == 3
    with one_line(FileNotFoundError, "instances_val.json", "splits", "own"):
        open_detection(tmp_path, "val")


def test_folder_in_a_folder(tmp_path):
    write(tmp_path / "set/set", "train.json", "train")
    assert len(open_detection(tmp_path, "train")) == 3


def test_captions_and_other_json_are_no_splits(tmp_path):
    write(tmp_path, "annotations/instances_val2017.json", "val2017")
    write(tmp_path, "annotations/captions_val2017.json", "val2017")
    write(tmp_path, "annotations/person_keypoints_val2017.json", "val2017")
    (tmp_path / "annotations/notes.json").write_text("{}")
    assert detection_splits(tmp_path) == ["val2017"]


def test_folders_and_backslashes_in_names(tmp_path):
    content = coco_content()
    content["images"][0]["file_name"] = "a b\\c.d.JPG"
    write(tmp_path, "train.json", "train", content)
    (tmp_path / "train/a b\\c.d.JPG").unlink()
    save_image(tmp_path / "train/a b/c.d.JPG")
    images = open_detection(tmp_path, "train")
    assert images.image_path(0) == tmp_path / "train/a b/c.d.JPG"
    assert images[0][0].shape == (3, 12, 16)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/secret.jpg", "C:\\secret.jpg", "a/../../b"]
)
def test_names_that_leave_the_data_set(tmp_path, name):
    content = coco_content()
    write(tmp_path, "train.json", "train", content)
    content["images"][1]["file_name"] = name
    (tmp_path / "train.json").write_text(json.dumps(content))
    for call in (open_detection, open_segmentation):
        with one_line(ValueError, "train.json", "file_name", "inside the data folder"):
            call(tmp_path, "train")


def test_category_above_the_others_is_no_class(tmp_path):
    content = coco_content()
    for category in content["categories"]:
        category["supercategory"] = "things"
    content["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    write(tmp_path, "train/_annotations.coco.json", "train", content)
    assert open_detection(tmp_path, "train").classes == ("one", "two")
    content["annotations"][0]["category_id"] = 0
    (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
    assert open_detection(tmp_path, "train").classes == ("things", "one", "two")


def test_missing_images_name_the_folders_that_exist(tmp_path):
    write(tmp_path, "train.json", "photos")
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    save_image(tmp_path / "images/other.jpg")
    with one_line(FileNotFoundError, "train.json", "needs 0007.jpg", tmp_path / "images"):
        open_detection(tmp_path, "train")


def save_rotated(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), "red").save(path, exif=exif)


@pytest.mark.parametrize(
    ("annotated", "orientation", "expected"),
    [
        ((12, 16), "auto", (12, 16)),  # by a tool that ignores EXIF
        ((16, 12), "auto", (16, 12)),  # by one that shows it upright
        (None, "auto", (16, 12)),
        (None, "upright", (16, 12)),
        (None, "stored", (12, 16)),
        ((12, 16), "stored", (12, 16)),
        ((16, 12), "upright", (16, 12)),
    ],
)
def test_orientation(tmp_path, annotated, orientation, expected):
    content = coco_content()
    write(tmp_path, "train.json", "train", content)
    entry = content["images"][0]
    save_rotated(tmp_path / "train" / entry["file_name"], 6)
    entry["height"], entry["width"] = annotated or (0, 0)
    (tmp_path / "train.json").write_text(json.dumps(content))
    images = open_detection(tmp_path, "train", orientation=orientation)
    assert images.size(0) == expected
    image, annotations = images[0]
    assert image.shape[1:] == expected
    assert annotations.boxes.canvas_size == expected


@pytest.mark.parametrize(
    ("annotated", "orientation"), [((16, 12), "stored"), ((12, 16), "upright")]
)
def test_size_error_names_exif(tmp_path, annotated, orientation):
    content = coco_content()
    write(tmp_path, "train.json", "train", content)
    entry = content["images"][0]
    save_rotated(tmp_path / "train" / entry["file_name"], 6)
    entry["height"], entry["width"] = annotated
    (tmp_path / "train.json").write_text(json.dumps(content))
    images = open_detection(tmp_path, "train", orientation=orientation)
    with one_line(ValueError, "0007.jpg", "annotated size", "EXIF"):
        images[0]
