"""Boxes in the VOC layout: content, and messages about bad input."""

import logging
import os
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from deformnet.data import (
    BoxAnnotations,
    Shapes,
    VOCDetection,
    detection_splits,
    open_detection,
    write_shapes,
)
from deformnet.data.files import log_once
from deformnet.data.synthetic import scene
from deformnet.data.voc_files import VOC_CLASSES
from detection_sets import voc_object, voc_xml, write_voc
from small_sets import one_line, save_image

YEAR = "VOCdevkit/VOC2012"
YEAR_2007 = "VOCdevkit/VOC2007"


@pytest.fixture
def boxes(tmp_path):
    return write_voc(tmp_path / "set")


def annotate(root, name, *objects, **size):
    (root / YEAR / f"Annotations/{name}.xml").write_text(voc_xml(*objects, **size))


def test_reads_image_and_objects(boxes):
    images = VOCDetection(boxes, "train")
    assert len(images) == 2
    assert images.classes == ("one", "two")
    assert images.dropped == 0
    assert [images.name(i) for i in range(2)] == ["a", "b"]
    assert images.image_path(1) == boxes / YEAR / "JPEGImages/b.jpg"
    assert images.size(0) == (12, 16)

    image, annotations = images[0]
    assert isinstance(image, tv_tensors.Image)
    expected = np.asarray(Image.open(boxes / YEAR / "JPEGImages/a.jpg"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert isinstance(annotations, BoxAnnotations)
    assert isinstance(annotations.boxes, tv_tensors.BoundingBoxes)
    assert annotations.boxes.canvas_size == (12, 16)
    assert annotations.boxes.dtype == torch.float32
    # Pixels 3 to 9 counted from 1: edges 2 to 9. The whole image is 0 to 16.
    assert annotations.boxes.tolist() == [[2, 1, 9, 10], [0, 0, 16, 12]]
    assert annotations.labels.dtype == torch.int64
    assert annotations.labels.tolist() == [0, 1]
    assert annotations.ignored.dtype == torch.bool
    assert annotations.ignored.tolist() == [False, False]


def test_image_without_objects(boxes):
    _, annotations = VOCDetection(boxes, "train")[1]
    assert annotations.boxes.shape == (0, 4)
    assert annotations.labels.shape == annotations.ignored.shape == (0,)
    annotate(boxes, "a")  # now no image has objects
    images = VOCDetection(boxes, "train")
    assert [len(images.annotations(i).labels) for i in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), (" 1\n", True), ("0", False), ("Unspecified", False), (None, False)],
)
def test_difficult_objects_are_ignored(boxes, text, expected):
    item = voc_object((1, 1, 5, 5), difficult=text)
    annotate(boxes, "c", item.replace("<difficult>None</difficult>", ""))
    assert VOCDetection(boxes, "val").annotations(0).ignored.tolist() == [expected]


def test_parts_are_not_objects(boxes):
    part = voc_object((5, 5, 6, 6), "head").replace("object>", "part>")
    whole = voc_object((1, 1, 5, 5)).replace("</object>", f"{part}</object>")
    annotate(boxes, "c", whole.replace("<bndbox>", f"{part}<bndbox>", 1))
    assert VOCDetection(boxes, "val").annotations(0).boxes.tolist() == [[0, 0, 5, 5]]


def test_negative_indices(boxes):
    images = VOCDetection(boxes, "train")
    assert images.name(-2) == "a"
    assert len(images.annotations(-2).labels) == 2
    with pytest.raises(IndexError):
        images[2]


def test_annotations_are_copies(boxes):
    images = VOCDetection(boxes, "train")
    for values in images.annotations(0):
        values.zero_()
    assert images.annotations(0).boxes.tolist() == [[2, 1, 9, 10], [0, 0, 16, 12]]
    assert images.annotations(0).labels.tolist() == [0, 1]


def test_default_classes_are_those_of_voc(boxes):
    (boxes / "classes.txt").unlink()
    for name in "abc":
        annotate(boxes, name, voc_object((1, 1, 4, 4), "tvmonitor"))
    images = VOCDetection(boxes, "train")
    assert images.classes == VOC_CLASSES[1:]
    assert images.annotations(0).labels.tolist() == [19]


def test_classes_of_all_splits_and_years_where_one_is_not_of_voc(boxes):
    (boxes / "classes.txt").unlink()
    annotate(boxes, "a", voc_object((1, 1, 4, 4), "raccoon"))
    annotate(boxes, "c", voc_object((1, 1, 4, 4), "person"))
    (boxes / YEAR_2007 / "ImageSets/Main").mkdir(parents=True)
    (boxes / YEAR_2007 / "Annotations").mkdir()
    (boxes / YEAR_2007 / "Annotations/old.xml").write_text(voc_xml(voc_object((1, 1, 4, 4), "fox")))
    for root in (boxes, boxes / "VOCdevkit", boxes / YEAR):
        for split in ("train", "val"):
            assert VOCDetection(root, split).classes == ("fox", "person", "raccoon")
    assert VOCDetection(boxes, "train").annotations(0).labels.tolist() == [2]


def test_background_is_not_an_object(boxes):
    (boxes / "classes.txt").write_text("background\none\ntwo\n")
    images = VOCDetection(boxes, "train")
    assert images.classes == ("one", "two")
    assert images.annotations(0).labels.tolist() == [0, 1]


def test_list_of_one_class(boxes):
    (boxes / YEAR / "ImageSets/Main/two_train.txt").write_text("a  1\nb -1\nc  0\n")
    assert len(VOCDetection(boxes, "two_train")) == 3


def test_splits_exclude_lists_of_one_class(boxes):
    lists = boxes / YEAR / "ImageSets/Main"
    (boxes / "classes.txt").write_text("one\ntwo\ntrain\n")
    for name in ("one_train", "two_val", "train_train"):
        (lists / f"{name}.txt").write_text("a  1\nb -1\n")
    for name in ("train_small", "small_train"):
        (lists / f"{name}.txt").write_text("a\n")
    assert detection_splits(boxes) == ["small_train", "train", "train_small", "val"]


def test_size_missing_from_the_annotation(boxes):
    annotate(boxes, "a", voc_object((1, 1, 99, 99)), height=0, width=0)
    (boxes / YEAR / "Annotations/b.xml").write_text("<annotation/>")
    images = VOCDetection(boxes, "train")
    assert [images.size(i) for i in range(2)] == [(12, 16), (12, 16)]
    assert images[0][1].boxes.tolist() == [[0, 0, 16, 12]]


# Invalid boxes. The image is 16 wide and 12 high.


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 5, 5), [0, 0, 5, 5]),  # written by tools that count from 0
        ((-7, 3, 40, 30), [0, 2, 16, 12]),
        ((4.5, 1, 8.25, 4), [3.5, 0, 8.25, 4]),
        ((4, 2, 4, 9), [3, 1, 4, 9]),  # one pixel wide
    ],
)
def test_clipped(boxes, box, expected):
    annotate(boxes, "c", voc_object(box))
    images = VOCDetection(boxes, "val")
    assert images.annotations(0).boxes.tolist() == [expected]
    assert images.dropped == 0


@pytest.mark.parametrize(
    "box",
    [
        (5, 5, 5, 5),
        (9, 2, 3, 8),
        (2, 9, 8, 3),
        (17, 1, 30, 12),
        (1, 13, 16, 20),
        (-9, -9, 0, 0),
        ("nan", 1, 5, 5),
        (1, 1, "NaN", 5),
        (1, 1, "inf", 5),
    ],
)
def test_dropped(boxes, box, caplog):
    annotate(boxes, "a", voc_object(box), voc_object((1, 1, 3, 3), "two"))
    with caplog.at_level(logging.WARNING):
        images = VOCDetection(boxes, "train")
    assert images.dropped == 1
    annotations = images.annotations(0)
    assert annotations.boxes.tolist() == [[0, 0, 3, 3]]
    assert annotations.labels.tolist() == [1]
    assert len(annotations.ignored) == 1
    VOCDetection(boxes, "train")  # as training does: it says so once
    (record,) = caplog.records
    assert "1 of 2 boxes" in record.getMessage()
    assert "in a" in record.getMessage()


def test_no_warning_if_no_box_is_dropped(boxes, caplog):
    VOCDetection(boxes, "train")
    assert not caplog.records


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ((0.2, 0.1, 0.7, 0.9), "all 1 boxes are within 0 to 1"),
        ((5, 5, 100, 9), "1 of 1 boxes extend far outside their image"),
        ((-30, 5, 9, 9), "far outside their image and are clipped; the first one is in a"),
    ],
)
def test_boxes_that_are_not_in_pixels_of_their_image(boxes, caplog, box, text):
    annotate(boxes, "a", voc_object(box))
    VOCDetection(boxes, "train")
    (record,) = caplog.records
    assert text in record.getMessage()


def test_counts(boxes):
    assert VOCDetection(boxes, "train").counts().tolist() == [1, 1]
    assert VOCDetection(boxes, "val").counts().tolist() == [0, 0]  # a difficult one


@pytest.mark.parametrize("number", ["9" * 400, "-1e300", "1" + "0" * 40])
def test_large_numbers(boxes, number):
    annotate(boxes, "a", voc_object((1, 1, 5, number)))
    with one_line(ValueError, "a.xml", "below 1e38", number[:20]):
        VOCDetection(boxes, "train")
    annotate(boxes, "a", voc_object((1, 1, 5, 5)), width="9" * 400)
    assert VOCDetection(boxes, "train").size(0) == (12, 16)


# Names of images.


@pytest.mark.parametrize("suffix", [".JPG", ".Png", ".jpeg", ".webp", ".tif", ".BMP"])
def test_every_suffix_in_any_case(boxes, suffix):
    path = boxes / YEAR / "JPEGImages/b.jpg"
    path.rename(path.with_suffix(suffix))
    images = VOCDetection(boxes, "train")
    assert images.image_path(1) == path.with_suffix(suffix)
    assert images[1][0].shape == (3, 12, 16)


@pytest.mark.parametrize("name", ["cat 1", "a.b", "x/cat 1", "b c.d e"])
def test_whole_lines_are_names_first(boxes, name):
    """`cat 1` may be the image `cat 1`, or `cat` of a list of one class."""
    folder = boxes / YEAR
    for one in ("cat", name):
        save_image(folder / f"JPEGImages/{one}.jpg")
        xml = folder / f"Annotations/{one}.xml"
        xml.parent.mkdir(exist_ok=True)
        xml.write_text(voc_xml(voc_object((1, 1, 4, 4), "one" if one == "cat" else "two")))
    for line in (name, f"{name}.jpg"):
        (folder / "ImageSets/Main/train.txt").write_text(f"{line}\n")
        images = VOCDetection(boxes, "train")
        assert images.image_path(0) == folder / f"JPEGImages/{name}.jpg"
        assert images.name(0) == name.replace("/", "__")
        assert images.annotations(0).labels.tolist() == [1]
    (folder / "ImageSets/Main/one_train.txt").write_text("cat  1\n")
    assert VOCDetection(boxes, "one_train").annotations(0).labels.tolist() == [0]


@pytest.mark.parametrize("line", ["../../secret", "/etc/passwd", "C:\\secret", "a/../../b 1"])
def test_lines_that_leave_the_data_set(boxes, line):
    (boxes / YEAR / "ImageSets/Main/train.txt").write_text(f"{line}\n")
    with one_line(ValueError, "train.txt", "inside the data folder"):
        VOCDetection(boxes, "train")


# Entities.


BOMB = """<!DOCTYPE bomb [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><folder>&b;</folder></annotation>"""


@pytest.mark.parametrize(
    "content",
    [
        BOMB.encode(),
        BOMB.encode("utf-16"),
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        b"<!DOCTYPE annotation><annotation/>",
    ],
)
def test_entities_are_refused(boxes, content):
    path = boxes / YEAR / "Annotations/a.xml"
    path.write_bytes(content)
    with one_line(ValueError, path, "without DOCTYPE and entities"):
        VOCDetection(boxes, "train")


def test_utf_16_and_pipes(boxes):
    path = boxes / YEAR / "Annotations/a.xml"
    path.write_bytes(voc_xml(voc_object((1, 1, 4, 4))).encode("utf-16"))
    assert VOCDetection(boxes, "train").annotations(0).labels.tolist() == [0]
    path.unlink()
    os.mkfifo(path)
    with one_line(ValueError, path, "got a pipe"):
        VOCDetection(boxes, "train")


# EXIF.


@pytest.mark.parametrize(
    ("annotated", "expected"), [((12, 16), (12, 16)), ((16, 12), (16, 12)), ((0, 0), (16, 12))]
)
def test_orientation_is_that_of_the_annotation(boxes, annotated, expected):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = boxes / YEAR / "JPEGImages/a.jpg"
    Image.new("RGB", (16, 12), "red").save(path, exif=exif)
    height, width = annotated
    annotate(boxes, "a", voc_object((2, 2, 11, 11)), height=height, width=width)
    image, annotations = open_detection(boxes, "train")[0]
    assert image.shape[1:] == annotations.boxes.canvas_size == expected
    other = "upright" if expected == (12, 16) else "stored"
    if any(annotated):
        with one_line(ValueError, path, "EXIF"):
            open_detection(boxes, "train", orientation=other)[0]
    else:
        assert open_detection(boxes, "train", orientation=other)[0][0].shape[1:] == (12, 16)


# Bad input. Everything but the pixels is checked at construction.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 2\n", "'a 2'"),
        ("a b\n", "'a b'"),
        ("a 1 1\n", "'a 1 1'"),
        ("a\nb\na\n", "a more than once"),
        ("\n", "empty"),
    ],
)
def test_bad_list(boxes, content, message):
    (boxes / YEAR / "ImageSets/Main/train.txt").write_text(content)
    with one_line(ValueError, "train.txt", message):
        VOCDetection(boxes, "train")


@pytest.mark.parametrize("file", ["JPEGImages/b.jpg", "Annotations/b.xml"])
def test_missing_file(boxes, file):
    (boxes / YEAR / file).unlink()
    folder, name = file.split("/")
    with one_line(FileNotFoundError, "train.txt", f"needs {name}", folder):
        VOCDetection(boxes, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((fraction, "not readable as XML") for fraction in (0, 0.1, 0.5, 0.95)),
        (b"\xff\xfe\x01", "not readable as XML"),
        (b"<?xml version='1.0' encoding='klingon'?><annotation/>", "not readable as XML"),
        (b"<html><body/></html>", "expected <annotation> at the top, but got <html>"),
    ],
)
def test_truncated_xml_or_another_kind(boxes, content, message):
    path = boxes / YEAR / "Annotations/a.xml"
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    with one_line(ValueError, path, message):
        VOCDetection(boxes, "train")


def test_unknown_class(boxes):
    annotate(boxes, "a", voc_object((1, 1, 3, 3), "three"))
    parts = ["'three'", "one, two", "add the class to that file", boxes / "classes.txt"]
    with one_line(ValueError, "a.xml", *parts):
        VOCDetection(boxes, "train")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("<name>one</name>", "", ["class ''"]),
        ("<xmax>3</xmax>", "<xmax></xmax>", ["bndbox", "''"]),
        ("<xmax>3</xmax>", "<xmax>three</xmax>", ["bndbox", "'three'"]),
        ("<xmax>3</xmax>", "<xmax>1,5</xmax>", ["bndbox", "'1,5'"]),
        ("bndbox", "polygon", ["bndbox", "xmin, ymin, xmax, ymax"]),
        ("<difficult>0", "<difficult>2", ["difficult", "'2'"]),
    ],
)
def test_malformed_objects(boxes, old, new, parts):
    annotate(boxes, "a", voc_object((1, 1, 3, 3)).replace(old, new))
    with one_line(ValueError, "a.xml", *parts):
        VOCDetection(boxes, "train")


def test_no_class_but_the_background(boxes):
    (boxes / "classes.txt").write_text("background\n")
    with one_line(ValueError, "classes.txt", "but found only the background"):
        VOCDetection(boxes, "train")


def test_image_of_another_size(boxes):
    annotate(boxes, "a", height=16, width=12)
    images = VOCDetection(boxes, "train")
    with one_line(ValueError, "a.jpg", "annotated size 12x16", "got 16x12"):
        images[0]


def test_truncated_image(boxes):
    path = boxes / YEAR / "JPEGImages/a.jpg"
    path.write_bytes(path.read_bytes()[:100])
    images = VOCDetection(boxes, "train")
    with one_line(ValueError, "a.jpg", "not a readable image"):
        images[0]


def test_size_of_an_unreadable_image(boxes):
    (boxes / YEAR / "Annotations/a.xml").write_text("<annotation/>")
    (boxes / YEAR / "JPEGImages/a.jpg").write_text("text")
    with one_line(ValueError, "a.jpg", "not a readable image"):
        VOCDetection(boxes, "train")


# The synthetic data set, and real ones.


def test_boxes_of_the_synthetic_data_set(tmp_path):
    options = Shapes(train=12, val=1, height=48, width=64)
    write_shapes(tmp_path / "shapes", options)
    images = VOCDetection(tmp_path / "shapes", "train")
    assert images.classes == VOCDetection(tmp_path / "shapes", "val").classes
    assert "background" not in images.classes
    count = 0
    for i in range(12):
        drawn = scene(options, "train", i)
        annotations = images.annotations(i)
        visible = [item for item in drawn.objects if item.area > 1]
        assert annotations.boxes.tolist() == [list(map(float, item.box)) for item in visible]
        assert annotations.labels.tolist() == [item.label - 1 for item in visible]
        count += len(visible)
    assert count > 12


def counts(images):
    labels = torch.cat([images.annotations(i).labels for i in range(len(images))])
    return torch.bincount(labels, minlength=len(images.classes)).tolist()


def test_bccd(real_data, caplog):
    log_once.cache_clear()
    root = real_data / "bccd_voc"
    splits = {split: VOCDetection(root, split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [205, 87, 72]
    assert [images.dropped for images in splits.values()] == [1, 1, 0]
    named = [record.getMessage().split()[-1] for record in caplog.records]
    assert named == ["BloodImage_00343", "BloodImage_00338"]
    assert splits["train"].classes == ("RBC", "WBC", "Platelets")
    total = np.sum([counts(images) for images in splits.values()], axis=0)
    assert total.tolist() == [4155 - 2, 372, 361]
    clean = [len(VOCDetection(root, f"{split}_clean")) for split in ("train", "val", "test")]
    assert clean == [195, 81, 68]
    assert "trainval_clean" in detection_splits(root)


def test_voc2012_mini(real_data):
    root = real_data / "voc2012_mini"
    images = VOCDetection(root, "trainval")
    assert detection_splits(root) == ["train", "trainval", "val"]
    assert (len(images), images.dropped) == (100, 0)
    assert images.classes == VOC_CLASSES[1:]
    ignored = torch.cat([images.annotations(i).ignored for i in range(100)])
    assert (len(ignored), int(ignored.sum())) == (273, 38)
    assert min(counts(images)) > 0
    for i in range(0, 100, 9):
        image, annotations = images[i]
        assert image.shape[1:] == images.size(i)
        path = root / YEAR / f"Annotations/{images.name(i)}.xml"
        texts = [item.findall("bndbox/*") for item in ElementTree.parse(path).iter("object")]
        stored = [{value.tag: float(value.text) for value in values} for values in texts]
        for box, value in zip(annotations.boxes.tolist(), stored, strict=True):
            assert box[2] - box[0] == value["xmax"] - value["xmin"] + 1
            assert box[3] - box[1] == value["ymax"] - value["ymin"] + 1
            assert (box[2], box[3]) == (value["xmax"], value["ymax"])


def test_pennfudan_boxes_hold_their_masks(real_data):
    """Boxes are the edges of the masks, so an error of one pixel would show."""
    root = real_data / "pennfudan_voc"
    images = VOCDetection(root, "trainval")
    assert (len(images), counts(images)) == (170, [423])
    exact = []
    for i in range(0, 170, 5):
        mask = np.asarray(Image.open(root / YEAR_2007 / f"SegmentationObject/{images.name(i)}.png"))
        for number, box in enumerate(images.annotations(i).boxes.tolist(), start=1):
            rows = np.flatnonzero((mask == number).any(1))
            columns = np.flatnonzero((mask == number).any(0))
            exact.append(box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.mean(exact) > 0.9  # a few were rounded otherwise when the images were shrunk
