"""Objects of an image, and the units that are shown."""

import math

import numpy as np
import torch

from deformnet.data.base import IGNORE
from deformnet.inspection.report.scenes import Grid, choose_scenes, units_of
from deformnet.tasks.predictor import Prepared
from deformnet.tasks.segmentation import LabelMap

CLASSES = ("background", "disc", "star")
SIZE = (100, 120)


def over(height, width, *, stride=16, resized=None):
    """Return the grid over an image that the network sees at another size."""
    h, w = resized or (height, width)
    return Grid.over(Prepared(torch.zeros(1, 3, h, w), (h / height, w / width)), stride)


def label_map(*objects):
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    for label, rows, columns in objects:
        labels[rows, columns] = label
    return labels


def contents(*objects):
    return LabelMap(label_map(*objects), CLASSES).contents(CLASSES[1:]), over(*SIZE)


SMALL, LARGE = (2, slice(14, 20), slice(44, 52)), (1, slice(40, 100), slice(60, 120))


def test_units_are_on_their_objects():
    images = [
        contents(),
        contents((IGNORE, slice(0, 9), slice(0, 9))),
        contents(LARGE),
        contents(SMALL),
        contents((2, slice(1, 7), slice(1, 7)), LARGE),  # its small object has no unit inside
        contents(SMALL, LARGE),
    ]
    scenes = choose_scenes(images, 2)
    assert [scene.index for scene in scenes] == [5, 2]
    background, star, disc = scenes[0].units
    assert (star.title, star.row, star.column) == ("small star", 1, 3)
    # (64, 96) is nearest to the center (69.5, 89.5).
    assert (disc.title, disc.row, disc.column) == ("large disc", 4, 6)
    # The farthest from both off the border is (64, 16), 44 pixels from the disc.
    assert (background.title, background.row, background.column) == ("background", 4, 1)


def test_only_needed_images_are_read():
    images = iter([contents(SMALL, LARGE), contents()])
    choose_scenes(images, 1)
    assert next(images)


def test_images_without_objects():
    assert choose_scenes([contents()], 2) == []
    (unit,) = units_of(*contents())
    assert unit.kind == "background"


def test_void_is_neither_object_nor_background():
    found, grid = contents((IGNORE, slice(0, 100), slice(0, 90)))
    assert found.things == []
    (unit,) = units_of(found, grid)
    assert grid.columns[unit.column] >= 90


def test_units_are_in_pixels_of_the_image():
    # At twice the size for the network, its pixel 16 is between pixels 7 and 8.
    grid = over(48, 64, resized=(96, 128))
    np.testing.assert_allclose(grid.rows, [-0.25, 7.75, 15.75, 23.75, 31.75, 39.75])
    assert len(grid.columns) == math.ceil(128 / 16)
