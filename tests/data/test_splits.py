"""Names of splits, and parts held out of them."""

import hashlib

import numpy as np
import pytest
import torch

from deformnet.data import (
    COCODetection,
    open_classification,
    open_detection,
    open_segmentation,
)
from deformnet.data.splits import PartOfSplit, parse_part, resolve
from detection_sets import coco_content, write_coco
from small_sets import one_line, save_image


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        ("train val valid", "val", "val"),
        ("train valid test", "val", "valid"),
        ("train validation dev", "val", "validation"),
        ("train dev test", "val", "dev"),
        ("train test", "val", "test"),
        ("training test", "train", "training"),
        ("Train VAL", "val", "VAL"),
        ("Train Valid", "train", "Train"),
        ("val", "train", "train"),
        ("train", "val", "val"),
        ("train val", "test", "test"),
        ("train valid", "valid", "valid"),
        ("own", "train", "own"),
        ("own", "val", "val"),
        ("own other", "train", "train"),
        ("val2017", "train", "train"),
    ],
)
def test_usual_names(names, wanted, found):
    assert resolve(names.split(), wanted) == found


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train", PartOfSplit("train")),
        ("VOC2007/trainval", PartOfSplit("VOC2007/trainval")),
        ("train[held-out=0.2]", PartOfSplit("train", 0.2, True)),
        ("a b[without=.25,seed=7]", PartOfSplit("a b", 0.25, False, 7)),
        ("train[held-out=1e-1]", PartOfSplit("train", 0.1, True)),
    ],
)
def test_parts_of_splits(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "expected NAME, NAME[held-out=F]")
            for text in ("a[", "a]", "[held-out=0.2]", "a[0.2]", "a[heldout=0.2]", "a[held-out]")
        ),
        *((f"a[without=0.2,{it}]", "expected NAME") for it in ("", "seed", "seed=x", "seed=-1")),
        *(
            (f"a[held-out={fraction}]", "fraction between 0 and 1")
            for fraction in ("0", "1", "1.5", "-0.2", "e", "1e-999")
        ),
    ],
)
def test_malformed_parts(text, message):
    with one_line(ValueError, repr(text), message):
        parse_part(text)


def test_choice_is_by_names_and_seed():
    names = [f"image {number}" for number in range(50)]
    held_out = PartOfSplit("a", 0.2, True).choose(names)
    rest = PartOfSplit("a", 0.2, False).choose(names)
    assert len(held_out) == 10
    assert sorted(held_out + rest) == list(range(50))
    digests = {name: hashlib.sha256(f"0/{name}".encode()).hexdigest() for name in names}
    assert {names[i] for i in held_out} == set(sorted(names, key=digests.__getitem__)[:10])
    # The order of the images does not matter.
    reverse = PartOfSplit("a", 0.2, True).choose(names[::-1])
    assert {names[::-1][i] for i in reverse} == {names[i] for i in held_out}
    assert PartOfSplit("a", 0.2, True, seed=1).choose(names) != held_out
    # A larger fraction includes a smaller one.
    assert set(held_out) < set(PartOfSplit("a", 0.5, True).choose(names))


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 1), (0.01, 10), (0.99, 10)])
def test_each_side_has_an_image(fraction, count):
    for is_held_out in (True, False):
        with one_line(ValueError, "'a'", f"{fraction:g} of its {count} images"):
            PartOfSplit("a", fraction, is_held_out).choose([str(i) for i in range(count)])


@pytest.fixture
def coco(tmp_path):
    content = coco_content()
    for number in range(20, 40):
        image = {"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 16}
        content["images"].append(image)
        copied = {"id": number, "image_id": number}
        content["annotations"].append({**content["annotations"][number % 3], **copied})
    write_coco(tmp_path / "coco", content)
    return tmp_path / "coco"


def test_boxes_of_a_part(coco):
    whole = open_detection(coco, "train")
    assert isinstance(whole, COCODetection)
    places = {whole.name(i): i for i in range(len(whole))}
    seen = []
    for kind in ("held-out", "without"):
        part = open_detection(coco, f"train[{kind}=0.3]", lambda *pair: pair)
        assert isinstance(part, COCODetection)
        assert part.split == f"train[{kind}=0.3]"
        for i in range(len(part)):
            place = places[part.name(i)]
            seen.append(place)
            assert part.image_ids[i] == whole.image_ids[place]
            assert part.image_path(i) == whole.image_path(place)
            assert part.size(i) == whole.size(place)
            assert torch.equal(part[i][0], whole[place][0])
            for one, other in zip(part.annotations(i), whole.annotations(place), strict=True):
                assert torch.equal(one, other)
    assert sorted(seen) == list(range(23))
    assert part.annotation_files == whole.annotation_files


def test_label_maps_of_a_part(coco):
    whole = open_segmentation(coco, "train")
    part = open_segmentation(coco, "train[without=0.3]")
    places = {whole.name(i): i for i in range(len(whole))}
    assert len(part) == 16
    for i in range(len(part)):
        np.testing.assert_array_equal(part[i][1], whole[places[part.name(i)]][1])


def test_parts_in_a_union(coco, voc):
    content = coco_content()
    for entry in content["images"]:
        entry.update(id=entry["id"] + 100, file_name=f"v{entry['file_name']}")
    for entry in content["annotations"]:
        entry["image_id"] += 100
    write_coco(coco, content, "valid", "valid")
    images = open_detection(coco, "train[held-out=0.3]+val[without=0.34]")
    names = [images.name(i) for i in range(len(images))]
    assert [name.startswith("v") for name in names] == [False] * 7 + [True] * 2
    part = open_detection(coco, "train[held-out=0.3]")
    assert names[:7] == [part.name(i) for i in range(7)]
    with one_line(ValueError, "train", "more than once"):
        open_detection(coco, "train[held-out=0.3]+train[without=0.3]")
    masks = open_segmentation(voc, "train[held-out=0.5]+VOC2012/val")
    assert len(masks) == 2
    assert masks.name(1) == "c"


def test_classes_of_a_part(tmp_path):
    for number in range(10):
        save_image(tmp_path / f"train/{'cat' if number % 2 else 'dog'}/{number}.jpg")
    parts = [open_classification(tmp_path, f"train[{it}=0.4]") for it in ("held-out", "without")]
    assert [len(part) for part in parts] == [4, 6]
    assert all(part.classes == ("cat", "dog") for part in parts)
    for part in parts:
        for i in range(len(part)):
            assert part.classes[part[i][1]] == part.image_path(i).parent.name
