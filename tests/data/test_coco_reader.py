"""Boxes in the COCO layout: content, memory of workers, and messages about bad input."""

import gc
import json
import logging
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from PIL import Image
from torchvision import tv_tensors

from deformnet.data import BoxAnnotations, COCODetection, detection_splits
from detection_sets import coco_content, write_coco
from small_sets import one_line


@pytest.fixture
def content():
    return coco_content()


@pytest.fixture
def coco(tmp_path, content):
    write_coco(tmp_path / "set", content)
    return tmp_path / "set"


@pytest.fixture
def file(coco):
    return coco / "annotations/instances_train.json"


def test_reads_images_and_objects(coco):
    images = COCODetection(coco, "train")
    assert len(images) == 3
    assert images.classes == ("one", "two")  # in the order of their ids, 4 and 90
    assert images.category_ids == (4, 90)
    assert images.image_ids.tolist() == [7, 3, 5]
    assert images.annotation_files == (coco / "annotations/instances_train.json",)
    assert [images.name(i) for i in range(3)] == ["0007", "0003", "0005"]
    assert images.image_path(2) == coco / "train/0005.jpg"
    assert images.size(0) == (12, 16)
    assert images.dropped == 0

    image, annotations = images[0]
    assert isinstance(image, tv_tensors.Image)
    expected = np.asarray(Image.open(coco / "train/0007.jpg"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert isinstance(annotations, BoxAnnotations)
    assert isinstance(annotations.boxes, tv_tensors.BoundingBoxes)
    assert annotations.boxes.dtype == torch.float32
    assert annotations.boxes.tolist() == [[2, 1, 9, 10], [1, 0, 3, 12], [0.5, 1.25, 4, 1.75]]
    assert annotations.labels.tolist() == [0, 1, 0]
    assert annotations.ignored.tolist() == [False, True, False]
    assert images.annotations(1).boxes.shape == (0, 4)
    assert images.annotations(2).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("split", "folder"),
    [("train_small", "train"), ("a_b_c", "a_b"), ("train", ""), ("train", "images")],
)
def test_image_folders(tmp_path, content, split, folder):
    write_coco(tmp_path, content, split, folder)
    assert COCODetection(tmp_path, split).image_path(0) == tmp_path / folder / "0007.jpg"


def test_file_names_with_folders(tmp_path, content):
    for entry, name in zip(content["images"], ("x/1.jpg", "y/1.jpg", "y/2.jpg"), strict=True):
        entry["file_name"] = name
    write_coco(tmp_path, content)
    images = COCODetection(tmp_path, "train")
    assert images.image_path(1) == tmp_path / "train/y/1.jpg"
    assert [images.name(i) for i in range(3)] == ["7", "3", "5"]  # two are called 1


def test_names_beyond_ascii(tmp_path, content):
    content["images"][0]["file_name"] = "Äpfel ©.jpg"
    content["categories"][0]["name"] = "größer"
    write_coco(tmp_path, content)
    images = COCODetection(tmp_path, "train")
    assert images.name(0) == "Äpfel ©"
    assert images[0][0].shape == (3, 12, 16)
    assert images.classes == ("one", "größer")


def test_size_from_the_image_where_the_file_lacks_it(tmp_path, content):
    del content["images"][0]["height"]
    content["images"][1]["width"] = 0
    write_coco(tmp_path, content)
    images = COCODetection(tmp_path, "train")
    assert [images.size(i) for i in range(3)] == [(12, 16)] * 3


def test_set_without_annotations(tmp_path, content):
    content["annotations"] = []
    write_coco(tmp_path, content)
    images = COCODetection(tmp_path, "train")
    assert [len(images.annotations(i).labels) for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    "box",
    [
        [3, 3, 0, 4],
        [3, 3, 4, -2],
        [16, 0, 5, 5],
        [-5, -5, 5, 5],
        [1e300, 1, 1e308, 1e308],
    ],
)
def test_boxes_without_area_are_dropped(tmp_path, content, box, caplog):
    content["annotations"][0]["bbox"] = box
    write_coco(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        images = COCODetection(tmp_path, "train")
    assert images.dropped == 1
    assert images.annotations(0).labels.tolist() == [1, 0]
    (record,) = caplog.records
    assert "1 of 4 boxes" in record.getMessage()
    assert record.getMessage().endswith("0007")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_have(tmp_path, content, number):
    content["annotations"][0]["bbox"] = [number, 1, 5, 5]
    path = write_coco(tmp_path, content)
    with one_line(ValueError, path, "expected finite numbers"):
        COCODetection(tmp_path, "train")


def test_boxes_are_clipped(tmp_path, content):
    content["annotations"][0]["bbox"] = [-3, 2, 100, 100]
    write_coco(tmp_path, content)
    images = COCODetection(tmp_path, "train")
    assert images.annotations(0).boxes[0].tolist() == [0, 2, 16, 12]
    assert images.dropped == 0


# Memory in worker processes.


def repeated(path, content, times):
    """The data set with many more images and objects, all of one file."""
    images, objects = content["images"], content["annotations"]
    for number in range(100, 100 + times):
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 16})
        (path / f"train/{number}.jpg").touch()
        objects.append({**objects[1], "id": number, "image_id": number})
    write = path / "annotations/instances_large.json"
    write.write_text(json.dumps(content))
    (path / "large").symlink_to("train")
    return COCODetection(path, "large")


def objects_in(dataset):
    """Number of Python objects of the data set, without classes and modules."""
    seen, todo = set(), [vars(dataset)]
    while todo:
        item = todo.pop()
        if id(item) not in seen and not isinstance(item, type):
            seen.add(id(item))
            todo += gc.get_referents(item) if isinstance(item, dict | list | tuple | set) else []
            todo += [vars(item)] if hasattr(item, "__dict__") else []
    return len(seen)


def test_no_python_object_per_image(coco, content):
    small = COCODetection(coco, "train")
    large = repeated(coco, content, 3000)
    assert len(large) == 3003
    assert objects_in(large) == objects_in(small) < 200
    sent = [len(bytes(ForkingPickler.dumps(images))) for images in (small, large)]
    assert sent[1] < 4000
    assert sent[1] - sent[0] < 100
    assert large.name(3002) == "3099"
    assert large.annotations(3002).boxes.tolist() == [[0, 0, 16, 12]]
    assert large.annotations(0).labels.tolist() == [0, 1, 0]


# Bad input. Everything but the pixels is checked at construction.


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100000, b'{"a": 1,}', 0.1, 0.5, 0.99]
)
def test_broken_or_truncated_json(coco, file, text):
    whole = file.read_bytes()
    file.write_bytes(text if isinstance(text, bytes) else whole[: int(text * len(whole))])
    with one_line(ValueError, file, "not readable as JSON"):
        COCODetection(coco, "train")


def test_byte_order_mark(coco, file):
    file.write_text("\ufeff" + file.read_text())
    assert len(COCODetection(coco, "train")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({key: value}, f"list of objects under '{key}'")
            for key in ("images", "annotations", "categories")
            for value in (None, {}, [1])
        ),
        ({"images": []}, "entries under 'images', but the list is empty"),
        ({"categories": []}, "entries under 'categories', but the list is empty"),
        (None, "list of objects under 'images'"),  # results instead of annotations
    ],
)
def test_invalid_lists(coco, file, content, change, message):
    file.write_text(json.dumps(content["annotations"] if change is None else content | change))
    with one_line(ValueError, file, message):
        COCODetection(coco, "train")


def test_images_in_no_folder(coco):
    for path in (coco / "train").iterdir():
        path.unlink()
    with one_line(FileNotFoundError, "instances_train.json", "needs 0007.jpg", coco / "train"):
        COCODetection(coco, "train")


@pytest.mark.parametrize(
    ("names", "parts"), [("5", ["needs 0005.jpg"]), ("35", ["needs 0003.jpg", "and 1 more"])]
)
def test_missing_images(coco, names, parts):
    for name in names:
        (coco / f"train/000{name}.jpg").unlink()
    with one_line(FileNotFoundError, *parts, "not in", coco / "train"):
        COCODetection(coco, "train")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("image_id", 8, ["but got image 8"]),
        ("image_id", None, ["but got image None"]),
        ("image_id", [7], ["but got image [7]"]),
        ("category_id", 1, ["but got category 1"]),
        ("category_id", "4", ["but got category '4'"]),
        ("bbox", [1, 2, 3], ["bbox", "[1, 2, 3]"]),
        ("bbox", None, ["bbox", "None"]),
        ("bbox", [1, 2, "3", 4], ["bbox", "'3'"]),
        ("bbox", [1, 2, 10**300, 4], ["bbox"]),
        ("iscrowd", 2, ["iscrowd", "0 or 1, but got 2"]),
    ],
)
def test_bad_annotations(tmp_path, content, key, value, parts):
    content["annotations"][1][key] = value
    write_coco(tmp_path, content)
    with one_line(ValueError, "instances_train.json", "annotation 2:", *parts):
        COCODetection(tmp_path, "train")


@pytest.mark.parametrize(
    ("key", "change", "parts"),
    [
        ("images", {"id": "3"}, ["'images'", "integer 'id'", "'3'"]),
        ("images", {"id": 7}, ["'images'", "id 7 occurs more than once"]),
        ("categories", {"id": 90}, ["'categories'", "id 90 occurs more than once"]),
        ("images", {"file_name": "0007.jpg"}, ["'images'", "'0007.jpg' occurs more than once"]),
        ("categories", {"name": "two"}, ["'categories'", "'two' occurs more than once"]),
        ("categories", {"name": None}, ["'categories'", "'name'", "None"]),
    ],
)
def test_bad_entries(coco, file, content, key, change, parts):
    content[key][1].update(change)
    file.write_text(json.dumps(content))
    with one_line(ValueError, file, *parts):
        COCODetection(coco, "train")


# Real data sets.


def test_coco_tiny(real_data):
    root = real_data / "coco_tiny"
    assert detection_splits(root) == ["train2017", "val2017"]
    for split, sizes in {"train2017": (128, 939, 10, 2), "val2017": (100, 852, 10, 3)}.items():
        images = COCODetection(root, split)
        annotations = [images.annotations(i) for i in range(len(images))]
        assert sizes == (
            len(images),
            sum(len(one.labels) for one in annotations),
            sum(int(one.ignored.sum()) for one in annotations),
            sum(len(one.labels) == 0 for one in annotations),
        )
        assert (len(images.classes), images.dropped) == (80, 0)
        assert images.classes[:2] == ("person", "bicycle")
        assert images.category_ids[-1] == 90
    images = COCODetection(root, "train2017")
    gray = [i for i in range(128) if Image.open(images.image_path(i)).mode == "L"]
    assert len(gray) == 1
    for i in [*range(0, 128, 25), *gray]:
        assert images[i][0].shape == (3, *images.size(i))


def test_nuclei(real_data):
    root = real_data / "nuclei_coco"
    expected = {"train": (498, 21650), "train_small": (397, 11784)}
    expected |= {"val": (166, 7336), "val_small": (133, 3924)}
    assert detection_splits(root) == list(expected)
    for split, (count, objects) in expected.items():
        images = COCODetection(root, split)
        assert len(images) == count
        assert sum(len(images.annotations(i).labels) for i in range(count)) == objects
        assert images.classes == ("nucleus",)


def test_boxes_bound_the_masks(real_data):
    images = COCODetection(real_data / "nuclei_coco", "val_small")
    content = json.loads(images.annotation_files[0].read_text())
    for i in range(0, len(images), 40):
        number = int(images.image_ids[i])
        objects = [item for item in content["annotations"] if item["image_id"] == number]
        assert len(objects) > 0
        masks = rle.decode([item["segmentation"] for item in objects])
        for k, box in enumerate(images.annotations(i).boxes.tolist()):
            rows = np.flatnonzero(masks[:, :, k].any(1))
            columns = np.flatnonzero(masks[:, :, k].any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
