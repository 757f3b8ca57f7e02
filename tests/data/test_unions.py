"""Unions of splits: years of VOC, files of COCO, folders of Cityscapes; and invalid unions."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from deformnet.data import detection_splits, open_detection, open_segmentation, segmentation_splits
from detection_sets import coco_content, voc_object, write_coco, write_voc, write_voc_images
from small_sets import one_line, save_city, save_image, save_labels, write_list

UNION = "VOC2007/trainval+VOC2012/train"


@pytest.fixture
def years(tmp_path) -> Path:
    """VOC2012 as of `write_voc`, and VOC2007 with x, y (10 x 14) in trainval, z in test."""
    root = write_voc(tmp_path / "years")
    year = root / "VOCdevkit/VOC2007"
    contents = {name: [voc_object((2, 3, 4 + i, 5), "two")] for i, name in enumerate("xyz")}
    write_voc_images(year, contents, 10, 14, seed=10)
    write_list(year / "ImageSets/Main/trainval.txt", "xy")
    write_list(year / "ImageSets/Main/test.txt", "z")
    return root


def test_two_years_of_boxes(years):
    images = open_detection(years, UNION)
    assert [images.name(i) for i in range(len(images))] == ["x", "y", "a", "b"]
    assert images.image_path(1) == years / "VOCdevkit/VOC2007/JPEGImages/y.jpg"
    assert images.image_path(2) == years / "VOCdevkit/VOC2012/JPEGImages/a.jpg"
    assert [images.size(i) for i in range(4)] == [(10, 14)] * 2 + [(12, 16)] * 2
    assert images.classes == ("one", "two")
    assert images.has_ground_truth
    assert [images.annotations(i).labels.tolist() for i in range(4)] == [[1], [1], [0, 1], []]
    assert images.annotations(1).boxes.tolist() == [[1, 2, 5, 5]]
    assert images.annotations(2).boxes.tolist() == [[2, 1, 9, 10], [0, 0, 16, 12]]
    # Each sample is that of the part alone.
    for split, start in (("VOC2007/trainval", 0), ("VOC2012/train", 2)):
        alone = open_detection(years, split)
        for i in range(len(alone)):
            assert torch.equal(alone[i][0], images[start + i][0])
            for one, other in zip(alone[i][1], images[start + i][1], strict=True):
                assert torch.equal(one, other)


def test_default_year_is_the_last(years):
    images = open_detection(years, "val+VOC2007/test")
    assert [images.name(i) for i in range(len(images))] == ["c", "z"]
    assert len(open_detection(years, "VOC2012/train")) == len(open_detection(years, "train")) == 2


@pytest.mark.parametrize("root", [".", "VOC2012"])
def test_folder_of_a_year_as_root(years, root, monkeypatch):
    monkeypatch.chdir(years / "VOCdevkit" / ("VOC2012" if root == "." else ""))
    images = open_detection(root, "VOC2012/train+val")
    assert [images[i][0].shape[1:] for i in range(3)] == [(12, 16)] * 3
    with one_line(FileNotFoundError, "no year 'VOC2007'", "years are: VOC2012"):
        open_detection(root, "VOC2007/trainval")


def test_splits_of_several_years(years, voc):
    last, named = ["train", "val"], ["VOC2012/train", "VOC2012/val"]
    assert detection_splits(years) == [*last, "VOC2007/test", "VOC2007/trainval", *named]
    for split in detection_splits(years):
        assert len(open_detection(years, split)) > 0
    assert segmentation_splits(str(voc)) == last
    write_list(voc / "VOCdevkit/VOC2007/ImageSets/Segmentation/test.txt", "a")
    assert segmentation_splits(voc) == [*last, "VOC2007/test", *named]


def test_missing_list_names_the_splits_of_all_years(years):
    with one_line(FileNotFoundError, "VOC2007/ImageSets/Main/val.txt", "val, VOC2007/test"):
        open_detection(years, "VOC2007/val")


def test_parts_with_different_classes(years):
    (years / "VOCdevkit/VOC2007/classes.txt").write_text("two\none\n")
    with one_line(ValueError, "VOC2007", "VOC2012", "two, one", "one, two"):
        open_detection(years, UNION)


def test_parts_that_share_an_image(years):
    write_list(years / "VOCdevkit/VOC2012/ImageSets/Main/both.txt", "bc")
    with one_line(ValueError, "both.txt", "image b", "train.txt"):
        open_detection(years, "train+both")
    with one_line(ValueError, "both.txt", "image c", "val.txt"):
        open_detection(years, "val+VOC2007/test+both")


@pytest.mark.parametrize(
    "split", ["train+train", "VOC2007/trainval+train+VOC2007/trainval", "train+VOC2012/train"]
)
def test_repeated_part(years, split):
    with one_line(ValueError, split, "train", "more than once"):
        open_detection(years, split)


@pytest.mark.parametrize("split", ["", "+", "train+", "+train", "train++val"])
def test_empty_name_of_a_part(years, cityscapes, split):
    for call in (open_detection, open_segmentation):
        with one_line(ValueError, repr(split), "joined by +"):
            call(years if call is open_detection else cityscapes, split)


def unchanged(samples):
    return samples


def test_workers_share_all_that_grows(years):
    """Workers receive tensors by reference, so nothing sent to them grows with the data set."""
    folder = years / "VOCdevkit/VOC2007"
    names = [f"{number:06d}" for number in range(400)]
    for name in names:
        (folder / f"JPEGImages/{name}.jpg").hardlink_to(folder / "JPEGImages/x.jpg")
        (folder / f"Annotations/{name}.xml").hardlink_to(folder / "Annotations/x.xml")
    (folder / "ImageSets/Main/many.txt").write_text("\n".join(names))
    small, large = (
        open_detection(years, f"{split}+VOC2012/train")
        for split in ("VOC2007/trainval", "VOC2007/many")
    )
    assert len(large) == 402

    def attributes(images):
        return {name: type(value) for name, value in vars(images).items()}

    assert attributes(small) == attributes(large)
    lists = [value for value in vars(large).values() if isinstance(value, list | dict | tuple)]
    assert max(len(value) for value in lists) < 10


# Masks.


def add_2007(root: Path, names: str) -> None:
    folder = root / "VOCdevkit/VOC2007"
    for name in names:
        save_image(folder / f"JPEGImages/{name}.jpg", 10, 14)
        save_labels(folder / f"SegmentationClass/{name}.png", np.full((10, 14), 1))
    write_list(folder / "ImageSets/Segmentation/trainval.txt", names)


def test_two_years_of_masks(voc):
    add_2007(voc, "xy")
    images = open_segmentation(voc, "VOC2007/trainval+train+val")
    assert [images.name(i) for i in range(len(images))] == ["x", "y", "a", "b", "c"]
    assert [tuple(images[i][1].shape) for i in (0, 2)] == [(10, 14), (12, 16)]
    assert [int(images[i][1].max()) for i in range(5)] == [1, 1, 0, 1, 2]
    assert len(pickle.loads(pickle.dumps(images))) == 5


def test_invalid_unions_of_masks(voc):
    add_2007(voc, "xa")
    with one_line(ValueError, "train.txt", "image a", "VOC2007"):
        open_segmentation(voc, "VOC2007/trainval+train")
    (voc / "VOCdevkit/VOC2007/classes.txt").write_text("background\none\n")
    with one_line(ValueError, "VOC2007", "VOC2012", "background, one, two"):
        open_segmentation(voc, "VOC2007/trainval+train")
    with one_line(ValueError, "train+train", "more than once"):
        open_segmentation(voc, "train+train")


def test_folders_of_cityscapes(cityscapes):
    images = open_segmentation(cityscapes, "train+val")
    assert len(images) == 4
    assert [images.name(i)[:5] for i in range(4)] == ["aache", "aache", "bochu", "bonn_"]
    with one_line(ValueError, "train+train", "more than once"):
        open_segmentation(cityscapes, "train+train")
    save_city(cityscapes, "val", "bochum_000000_000000", 7)
    with one_line(ValueError, "leftImg8bit/val", "bochum_000000_000000", "leftImg8bit/train"):
        open_segmentation(cityscapes, "train+val")


# COCO.


def shifted(content: dict, by: int) -> dict:
    """The same objects in images of other names and ids."""
    for entry in content["images"]:
        entry["id"] += by
        entry["file_name"] = f"{entry['id']:04d}.jpg"
    for entry in content["annotations"]:
        entry["image_id"] += by
    return content


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    write_coco(root, coco_content(), "train2014", "train2014")
    write_coco(root, shifted(coco_content(), 100), "val2014", "val2014")
    return root


def test_two_files_of_coco(coco):
    images = open_detection(coco, "train2014+val2014")
    assert [images.name(i) for i in range(6)] == ["0007", "0003", "0005", "0107", "0103", "0105"]
    assert images.image_ids.tolist() == [7, 3, 5, 107, 103, 105]
    assert images.image_path(3) == coco / "val2014/0107.jpg"
    assert images.annotation_files == tuple(
        coco / f"annotations/instances_{split}.json" for split in ("train2014", "val2014")
    )
    alone = open_detection(coco, "val2014")
    for i in range(3):
        assert torch.equal(images[3 + i][0], alone[i][0])
        for one, other in zip(images.annotations(3 + i), alone.annotations(i), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"two"', '"three"', ["train2014.json", "one, three", "one, two"]),  # classes
        ("90", "91", ["other ids", "train2014.json"]),  # of a class
        ('"id": 103', '"id": 7', ["one id to several images"]),
    ],
)
def test_files_of_coco_that_disagree(coco, old, new, parts):
    path = coco / "annotations/instances_val2014.json"
    path.write_text(path.read_text().replace(old, new))
    with one_line(ValueError, "val2014.json", *parts):
        open_detection(coco, "train2014+val2014")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(years, coco, context):
    images = ConcatDataset(
        (open_detection(years, UNION), open_detection(coco, "train2014+val2014"))
    )
    loader = DataLoader(
        images, num_workers=2, multiprocessing_context=context, collate_fn=unchanged
    )
    for i, ((image, annotations),) in enumerate(loader):
        assert torch.equal(image, images[i][0])
        for value, expected in zip(annotations, images[i][1], strict=True):
            assert torch.equal(value, expected)


# Images without published annotations.


@pytest.fixture
def without_annotations(coco) -> Path:
    content = coco_content()
    del content["annotations"]
    write_coco(coco, content, "unused", "test2017")
    path = coco / "annotations/instances_unused.json"
    path.rename(coco / "annotations/image_info_test-dev2017.json")
    return coco


def test_images_without_annotations(without_annotations):
    assert detection_splits(without_annotations) == ["test-dev2017", "train2014", "val2014"]
    images = open_detection(without_annotations, "test-dev2017")
    assert not images.has_ground_truth
    assert open_detection(without_annotations, "train2014").has_ground_truth
    assert len(images) == 3
    assert images.classes == ("one", "two")
    assert images.category_ids == (4, 90)
    assert images.image_path(0) == without_annotations / "test2017/0007.jpg"
    image, annotations = images[0]
    assert image.shape == (3, 12, 16)
    assert annotations.boxes.shape == (0, 4)
    assert not images.annotations(2).labels.numel()


def test_folder_with_only_images_without_annotations(without_annotations):
    for split in ("train2014", "val2014"):
        (without_annotations / f"annotations/instances_{split}.json").unlink()
    assert len(open_detection(without_annotations, "test-dev2017")) == 3


def test_annotations_take_precedence(without_annotations):
    write_coco(without_annotations, coco_content(), "test-dev2017", "test2017")
    assert open_detection(without_annotations, "test-dev2017").has_ground_truth


def test_images_without_annotations_are_not_joined_with_others(without_annotations):
    path = without_annotations / "annotations/image_info_test-dev2017.json"
    content = shifted({**json.loads(path.read_text()), "annotations": []}, 200)
    path.write_text(json.dumps(content))
    for image in content["images"]:
        save_image(without_annotations / "test2017" / image["file_name"])
    for split in ("train2014+test-dev2017", "test-dev2017+train2014"):
        with one_line(ValueError, "image_info_test-dev2017.json", "no annotations"):
            open_detection(without_annotations, split)


def test_real_unions(real_data):
    root = real_data / "voc2012_mini"
    images = open_detection(root, "train+VOC2012/val")
    trainval = open_detection(root, "trainval")
    both = {trainval.name(i): len(trainval.annotations(i).labels) for i in range(100)}
    assert {images.name(i): len(images.annotations(i).labels) for i in range(100)} == both
    images = open_detection(real_data / "coco_tiny", "train2017+val2017")
    assert len(images) == 228
    assert sum(len(images.annotations(i).labels) for i in range(228)) == 939 + 852
    assert images[200][0].shape[1:] == images.size(200)
    assert len(open_segmentation(real_data / "camvid_cityscapes", "train+val+test")) == 22
