"""What is said about folders that no layout fits."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from deformnet.data import open_classification, open_detection, open_segmentation
from deformnet.data.survey import survey
from detection_sets import coco_content, voc_object, voc_xml, write_coco
from small_sets import one_line, save_image, save_labels


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_images_alone(tmp_path):
    for number in range(3):
        save_image(tmp_path / f"photos/{number}.JPG")
    for call in (open_detection, open_segmentation):
        with one_line(FileNotFoundError, tmp_path, "found 3 images", "add annotations"):
            call(tmp_path, "train")


def test_empty_folder(tmp_path):
    with one_line(FileNotFoundError, "found no images or annotations", "contains none"):
        open_detection(tmp_path, "train")


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("a.csv", "a,1,2", ["1 tables (.csv)", "convert the tables to COCO"]),
        ("a.zip", "", ["1 archives", "unpack the archives"]),
        ("a.mp4", "", ["1 videos", "save frames"]),
        ("a.heic", "", ["1 photos", "as JPEG"]),
        ("a.tfrecord", "", ["1 TFRecord files"]),
        ("a.xml", "<annotations><version>1.1</version>", ["CVAT XML files", "export"]),
        ("via.json", '{"a": {"filename": "a", "regions": []}}', ["VIA JSON files", "export"]),
        ("b.json", "[]", ["1 other JSON files"]),
        ("a.txt", "0 0.5 0.5 0.1 0.1\n", ["1 YOLO label files", "classes.txt"]),
    ],
)
def test_files_of_other_programs(tmp_path, file, text, parts):
    save_image(tmp_path / "photos/a.png")
    write(tmp_path / "photos" / file, text)
    with one_line(FileNotFoundError, "1 images", *parts, "expected a data set with"):
        open_detection(tmp_path, "train")


def test_boxes_instead_of_masks_and_so_on(tmp_path):
    content = coco_content()
    for entry in content["annotations"]:
        entry["segmentation"] = []
    write_coco(tmp_path / "boxes", content)
    save_image(tmp_path / "masks/images/a.jpg")
    save_labels(tmp_path / "masks/masks/a.png", np.eye(12, 16))
    for name in ("cat/1.jpg", "dog/1.jpg"):
        save_image(tmp_path / "classes" / name)
    with one_line(
        FileNotFoundError, "expected masks, but found boxes; train rfcn or another detector"
    ):
        open_segmentation(tmp_path / "boxes", "train")
    with one_line(FileNotFoundError, "expected boxes, but found masks; train deeplab"):
        open_detection(tmp_path / "masks", "train")
    with one_line(
        FileNotFoundError, "expected boxes, but found folders of classes; train a classifier"
    ):
        open_detection(tmp_path / "classes", "train")
    with one_line(FileNotFoundError, "expected folders of classes, but found boxes"):
        open_classification(tmp_path / "boxes", "train")


def test_data_set_in_a_subfolder(tmp_path):
    write_coco(tmp_path / "first", coco_content())
    write_coco(tmp_path / "second", coco_content())
    with one_line(FileNotFoundError, f"the data set is in {tmp_path / 'first'}; pass that folder"):
        open_detection(tmp_path, "train")


def test_counts_of_kinds(tmp_path):
    for number in range(40):
        write(tmp_path / f"{number}.json", json.dumps({"shapes": [], "imagePath": "a"}))
        write(tmp_path / f"{number}.xml", voc_xml(voc_object((1, 1, 2, 2))))
    found = survey(tmp_path)
    assert found.counts == {"labelme JSON files": 40, "VOC XML files": 40}
    assert found.is_complete


def test_time_is_bounded(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    start = time.monotonic()
    found = survey(tmp_path)
    assert time.monotonic() - start < 5
    assert not found.is_complete
    assert "at least" in str(found)
    assert found.counts["images"] <= 2000


def test_links_in_a_circle_and_unreadable_folders(tmp_path):
    save_image(tmp_path / "a/b/c.jpg")
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "lost+found").mkdir(mode=0)
    assert survey(tmp_path).counts == {"images": 1}
