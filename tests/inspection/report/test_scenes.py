"""What is taken for an object, and which units are looked at."""

import math

import numpy as np
import torch
from torchvision import tv_tensors

from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations
from deformnet.inference import Prepared
from deformnet.inspection.report.contents import object_classes, of_boxes, of_label_map
from deformnet.inspection.report.scenes import Grid, choose_scenes, units_of

CLASSES = ("background", "disc", "star")
SIZE = (100, 120)


def over(height, width, *, stride=16, resized=None):
    """The grid over an image that the network sees at another size."""
    input = torch.zeros(1, 3, *(resized or (height, width)))
    return Grid.over(Prepared.whole(input, torch.zeros(3, height, width)), stride)


def label_map(*objects):
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    for label, rows, columns in objects:
        labels[rows, columns] = label
    return labels


def contents(*objects):
    return of_label_map(label_map(*objects), CLASSES, CLASSES[1:]), over(*SIZE)


SMALL, LARGE = (2, slice(14, 20), slice(44, 52)), (1, slice(40, 100), slice(60, 120))


def test_units_lie_on_what_they_are_named_after():
    images = [
        contents(),
        contents((IGNORE, slice(0, 9), slice(0, 9))),
        contents(LARGE),
        contents(SMALL),
        contents((2, slice(1, 7), slice(1, 7)), LARGE),  # its small object holds no unit
        contents(SMALL, LARGE),
    ]
    scenes = choose_scenes(images, 2)
    assert [scene.index for scene in scenes] == [5, 2]
    background, star, disc = scenes[0].units
    assert (star.what, star.row, star.column) == ("small star", 1, 3)
    # The middle (69.5, 89.5) lies nearest to (64, 96).
    assert (disc.what, disc.row, disc.column) == ("large disc", 4, 6)
    # The farthest from both that is not at the border is (64, 16), 44 pixels from the disc.
    assert (background.what, background.row, background.column) == ("background", 4, 1)


def test_no_more_images_are_read_than_needed():
    images = iter([contents(SMALL, LARGE), contents()])
    choose_scenes(images, 1)
    assert next(images)


def test_there_may_be_no_object_to_look_at():
    assert choose_scenes([contents()], 2) == []
    (unit,) = units_of(*contents())
    assert unit.kind == "background"


def test_void_is_neither_object_nor_background():
    found, grid = contents((IGNORE, slice(0, 100), slice(0, 90)))
    assert found.things == []
    (unit,) = units_of(found, grid)
    assert grid.columns[unit.column] >= 90


def test_objects_are_the_connected_regions_of_the_named_classes():
    labels = label_map(SMALL, LARGE, (2, slice(70, 80), slice(70, 80)), (1, 99, 0))
    every = of_label_map(labels, CLASSES, CLASSES[1:])
    assert sorted(thing.area for thing in every.things) == [1, 48, 100, 3500]
    assert every.boxes().tolist() == [
        [44, 14, 52, 20],
        [60, 40, 120, 100],
        [70, 70, 80, 80],
        [0, 99, 1, 100],
    ]
    np.testing.assert_array_equal(every.background, labels == 0)
    stars = of_label_map(labels, CLASSES, ("star",))
    assert {thing.name for thing in stars.things} == {"star"}
    np.testing.assert_array_equal(stars.background, labels != 2)


def test_boxes_are_objects_that_fill_them():
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[10.5, 20, 30.5, 40], [0, 0, 120, 100]]), format="XYXY", canvas_size=SIZE
    )
    found = of_boxes(
        BoxAnnotations(boxes, torch.tensor([1, 0]), torch.zeros(2, dtype=torch.bool)),
        CLASSES[1:],
        SIZE,
    )
    assert [thing.name for thing in found.things] == ["star", "disc"]
    assert found.boxes().tolist() == boxes.tolist()
    assert found.things[0].area == 20 * 21
    assert not found.background.any()


def test_the_likes_of_sky_are_no_objects():
    assert object_classes(("background", "Sky", "Road", "Car", "Pole")) == ("Car", "Pole")


def test_units_lie_on_pixels_of_the_image_and_not_of_the_networks_input():
    # Twice as large for the network: its pixel 16 is in the middle of pixels 7 and 8.
    grid = over(48, 64, resized=(96, 128))
    np.testing.assert_allclose(grid.rows, [-0.25, 7.75, 15.75, 23.75, 31.75, 39.75])
    assert len(grid.columns) == math.ceil(128 / 16)
