"""Folders of images with VOC's XML: arrangements, classes, and messages about bad input."""

import logging
from pathlib import Path

import pytest

from deformnet.data import VOCFolderDetection, detection_splits, open_detection
from deformnet.data.files import IMAGE_SUFFIXES
from detection_sets import voc_object, voc_xml
from small_sets import one_line, save_image


def annotate(xml: Path, *objects: str, **size) -> None:
    xml.parent.mkdir(parents=True, exist_ok=True)
    xml.write_text(voc_xml(*objects, **size))


def add(image: Path, xml: Path | None = None, name: str = "raccoon") -> None:
    """An image with one object."""
    save_image(image)
    annotate(xml or image.with_suffix(".xml"), voc_object((3, 2, 9, 10), name))


def names(images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


@pytest.fixture
def flat(tmp_path) -> Path:
    """Images a and b of a raccoon and a fox, as labelImg leaves them."""
    add(tmp_path / "flat/b.jpg")
    add(tmp_path / "flat/a.jpg", name="fox")
    return tmp_path / "flat"


def test_flat_folder(flat):
    images = open_detection(flat, "train")
    assert type(images) is VOCFolderDetection
    assert detection_splits(flat) == ["train"]
    assert images.classes == ("fox", "raccoon")
    assert names(images) == ["a", "b"]
    assert [images.annotations(i).labels.tolist() for i in range(2)] == [[0], [1]]
    assert images.annotations(0).boxes.tolist() == [[2, 1, 9, 10]]
    assert images[1][0].shape == (3, 12, 16)
    assert images.counts().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("images", "xml"),
    [
        ("images", "annotations"),
        ("Images", "Annotations"),
        ("JPEGImages", "Annotations"),
        ("imgs", "labels"),
        ("", "xml"),
    ],
)
def test_two_folders(tmp_path, images, xml):
    add(tmp_path / images / "a.jpg", tmp_path / xml / "a.xml")
    found = open_detection(tmp_path, "train")
    assert found.classes == ("raccoon",)
    assert found.image_path(0) == tmp_path / images / "a.jpg"


@pytest.mark.parametrize(
    ("image", "xml"),
    [
        ("{}/a.jpg", "{}/a.xml"),  # Roboflow
        ("{}/images/a.jpg", "{}/annotations/a.xml"),
        ("images/{}/a.jpg", "annotations/{}/a.xml"),
    ],
)
def test_splits(tmp_path, image, xml):
    for split, name in (("train", "raccoon"), ("valid", "fox")):
        add(tmp_path / image.format(split), tmp_path / xml.format(split), name)
    assert detection_splits(tmp_path) == ["train", "valid"]
    images = open_detection(tmp_path, "val")
    assert images.classes == open_detection(tmp_path, "train").classes == ("fox", "raccoon")
    assert images.image_path(0) == tmp_path / image.format("valid")
    with one_line(FileNotFoundError, "no split 'other'", "train, valid"):
        open_detection(tmp_path, "other")


@pytest.mark.parametrize("suffix", [suffix.upper() for suffix in IMAGE_SUFFIXES] + [".jpeg"])
def test_every_suffix_in_any_case(tmp_path, suffix):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / f"a{suffix}")  # opened by its content
    annotate(tmp_path / "a.XML", voc_object((3, 2, 9, 10), "raccoon"))
    images = open_detection(tmp_path, "train")
    assert images[0][1].boxes.tolist() == [[2, 1, 9, 10]]


def test_names_with_blanks_and_dots_and_in_subfolders(tmp_path):
    files = ("cat 1.jpg", "cat.jpg", "a.b.c.jpg", "more/photos/x y.jpg", "more/cat.jpg")
    for file in files:
        add(tmp_path / file, name=file)
    images = open_detection(tmp_path, "train")
    assert len(images) == 5
    for i in range(5):
        (label,) = images.annotations(i).labels.tolist()
        file = images.image_path(i).relative_to(tmp_path)
        assert images.classes[label] == str(file)


def test_xml_finds_its_image_in_a_subfolder_or_by_its_whole_or_stored_name(tmp_path):
    add(tmp_path / "images/deep/a.jpg", tmp_path / "annotations/a.xml")
    add(tmp_path / "images/b.jpg", tmp_path / "annotations/b.jpg.xml")
    add(tmp_path / "images/c.jpg", tmp_path / "annotations/0001.xml")
    path = tmp_path / "annotations/0001.xml"
    stored = "<annotation><filename>C:\\photos\\c.jpg</filename>"
    path.write_text(path.read_text().replace("<annotation>", stored))
    images = open_detection(tmp_path, "train")
    assert sorted(names(images)) == ["a", "b", "c"]
    assert images.counts().tolist() == [3]


def test_image_without_xml_has_no_objects(flat, caplog):
    save_image(flat / "c.jpg")
    with caplog.at_level(logging.INFO):
        images = open_detection(flat, "train")
    assert names(images) == ["a", "b", "c"]
    assert images.size(2) == (12, 16)
    assert images.annotations(2).boxes.shape == (0, 4)
    assert "1 of 3 images have no XML file" in caplog.text


def test_xml_without_image(flat):
    (flat / "a.jpg").unlink()
    with one_line(FileNotFoundError, flat, "needs a.jpg"):
        open_detection(flat, "train")


def test_classes_of_voc_in_a_folder_of_ones_own_are_those_of_the_data(tmp_path):
    add(tmp_path / "a.jpg", name="person")
    assert open_detection(tmp_path, "train").classes == ("person",)


def test_classes_txt_decides(flat):
    (flat / "classes.txt").write_text("raccoon\nfox\nbear\n")
    assert open_detection(flat, "train").classes == ("raccoon", "fox", "bear")
    (flat / "classes.txt").write_text("raccoon\n")
    with one_line(ValueError, "a.xml", "'fox'", "raccoon", flat / "classes.txt"):
        open_detection(flat, "train")


def test_no_object_at_all(flat):
    for name in "ab":
        annotate(flat / f"{name}.xml")
    with one_line(ValueError, flat, "expected named objects"):
        open_detection(flat, "train")


def test_other_xml_is_no_annotation(tmp_path):
    save_image(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text("<project/>")
    with one_line(FileNotFoundError, tmp_path, "1 images, 1 other XML files"):
        open_detection(tmp_path, "train")


def test_union_and_held_out_images(tmp_path):
    for split in ("train", "valid"):
        for number in range(10):
            add(tmp_path / f"{split}/{split}{number}.jpg")
    whole = open_detection(tmp_path, "train+val")
    assert len(whole) == 20
    part = open_detection(tmp_path, "train[held-out=0.2]+val")
    rest = open_detection(tmp_path, "train[without=0.2]")
    assert len(part) == 12
    assert sorted(names(part)[:2] + names(rest)) == names(open_detection(tmp_path, "train"))


def test_symbolic_links_in_a_circle_end(flat):
    (flat / "again").symlink_to(flat)
    with one_line(ValueError, flat / "again", "link"):
        open_detection(flat, "train")
