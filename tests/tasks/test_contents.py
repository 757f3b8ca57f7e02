"""Objects and background of annotated images."""

import numpy as np
import torch

from deformnet.recipes import DeepLabRecipe
from deformnet.tasks import task_of
from deformnet.tasks.detection.data import Boxes
from deformnet.tasks.segmentation import LabelMap
from small_sets import save_image, save_labels, write_list

CLASSES = ("background", "disc", "star")
SIZE = (100, 120)


def test_objects_are_connected_regions_of_the_named_classes():
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    for label, rows, columns in (
        (2, slice(14, 20), slice(44, 52)),
        (1, slice(40, 100), slice(60, 120)),
        (2, slice(70, 80), slice(70, 80)),
        (1, 99, 0),
    ):
        labels[rows, columns] = label
    every = LabelMap(labels, CLASSES).contents(CLASSES[1:])
    assert sorted(thing.area for thing in every.things) == [1, 48, 100, 3500]
    assert every.boxes().tolist() == [
        [44, 14, 52, 20],
        [60, 40, 120, 100],
        [70, 70, 80, 80],
        [0, 99, 1, 100],
    ]
    np.testing.assert_array_equal(every.background, labels == 0)
    stars = LabelMap(labels, CLASSES).contents(("star",))
    assert {thing.name for thing in stars.things} == {"star"}
    np.testing.assert_array_equal(stars.background, labels != 2)


def test_boxes_are_filled_by_their_objects():
    boxes = torch.tensor([[10.5, 20, 30.5, 40], [0, 0, 120, 100]])
    contents = Boxes(boxes, torch.tensor([1, 0]), CLASSES[1:], SIZE).contents(CLASSES)
    assert [thing.name for thing in contents.things] == ["star", "disc"]
    assert contents.boxes().tolist() == boxes.tolist()
    assert contents.things[0].area == 20 * 21
    assert not contents.background.any()


def test_stuff_is_not_countable(tmp_path):
    write_list(tmp_path / "classes.txt", ["background", "Sky", "Road", "Car", "Pole"])
    save_image(tmp_path / "JPEGImages/one.jpg")
    save_labels(tmp_path / "SegmentationClass/one.png", 0)
    write_list(tmp_path / "ImageSets/Segmentation/val.txt", ["one"])
    images = task_of(DeepLabRecipe()).annotated(tmp_path, "val")
    assert images.countable == ("Car", "Pole")
