"""Label maps drawn from polygons and run lengths."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image

from deformnet.data import open_segmentation
from deformnet.data.check import check_data
from deformnet.data.coco_masks import COCOSegmentation
from deformnet.data.polygons import Region, Stamp, draw, pack, unpack, with_background
from detection_sets import coco_content, write_coco
from small_sets import one_line


def square(x1, y1, x2, y2):
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], float)


def test_later_regions_over_earlier_ones_and_all_over_void():
    regions = [
        Region(1, [square(0, 0, 4, 4)]),
        Region(2, [square(2, 2, 6, 6)]),
        Region(255, [square(0, 0, 8, 3)]),
    ]
    labels = draw((8, 8), regions)
    assert labels.dtype == torch.uint8
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[:3] = 255
    expected[:4, :4] = 1
    expected[2:6, 2:6] = 2
    assert labels.equal(expected)


def test_polygons_are_drawn_as_by_pycocotools():
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = generator.integers(1, 40, 2).tolist()
        points = generator.uniform(0, (width, height), (generator.integers(3, 9), 2))
        expected = rle.decode(rle.merge(rle.frPyObjects([points.ravel().tolist()], height, width)))
        labels = draw((height, width), [Region(3, [points])]).numpy()
        assert np.array_equal(labels, 3 * expected)


@pytest.mark.parametrize(
    "points",
    [
        square(-1e30, -1e30, 1e30, 1e30),
        square(-50, -50, 2e9, 2e9),
        square(-3, -2, 20, 30),
    ],
)
def test_polygons_around_the_image(points):
    assert (draw((12, 16), [Region(1, [points])]) == 1).all()


@pytest.mark.parametrize(
    "points",
    [
        *(square(*box) for box in ((-9, -9, -1, -1), (40, 40, 50, 50), (1e30, 0, 1e31, 5))),
        np.ones((2, 2)),
    ],
)
def test_polygons_outside_or_without_area(points):
    assert not draw((12, 16), [Region(1, [points])]).any()


@pytest.mark.parametrize(("x", "y"), [(-1, -1), (14, 10), (3, 3), (-9, 0), (30, 0)])
def test_stamps_are_clipped(x, y):
    labels = draw((12, 16), [Region(1, stamps=[Stamp(x, y, np.ones((4, 4), bool))])])
    expected = torch.zeros(12, 16, dtype=torch.uint8)
    expected[max(0, y) : max(0, y + 4), max(0, x) : max(0, x + 4)] = 1
    assert labels.equal(expected)


def test_run_lengths():
    generator = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        mask = np.asfortranarray(generator.random((30, 40)) < density, np.uint8)
        coded = rle.encode(mask)
        text = coded["counts"].decode() if isinstance(coded["counts"], bytes) else coded["counts"]
        flat = mask.ravel(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *ends, flat.size]).tolist()
        counts = [0, *counts] if flat[0] else counts
        for value in (text, counts):
            packed = pack({"size": [30, 40], "counts": value})
            region = unpack(packed, 7, (30, 40))
            assert np.array_equal(draw((30, 40), [region]).numpy(), 7 * mask)
        assert unpack(packed, 7, (40, 30)) is None


def test_masks_are_decoded_one_by_one():
    """Masks of hundreds of objects in a photograph take gigabytes."""
    packed = pack({"size": [3000, 3000], "counts": [3000 * 2999, 3000]})
    regions = [unpack(packed, 7, (3000, 3000)) for _ in range(1000)]
    assert draw((3000, 3000), regions[:3])[:, -1].eq(7).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        3,
        "a",
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4, 5, 10**400]],
        [[1, 2, 3, 4, 5, 1e300]],
        {"size": [2, 2]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": [-1, 5]},
        {"size": [2, 2], "counts": [1.5, 2.5]},
        {"size": [2, 2], "counts": "\x00"},
        {"size": [2, 2], "counts": "o" * 50},
        {"size": [2**40, 2**40], "counts": [2**80]},
        {"size": "22", "counts": [4]},
    ],
)
def test_malformed_segmentations(segmentation):
    assert pack(segmentation) is None


def test_background():
    assert with_background(("a", "b"), "x") == ("background", "a", "b")
    assert with_background(("background", "b"), "x") == ("background", "b")
    with one_line(ValueError, "x", "at most 254"):
        with_background(tuple(map(str, range(255))), "x")


# COCO


@pytest.fixture
def content():
    return coco_content()


def test_label_maps_of_coco(tmp_path, content):
    write_coco(tmp_path, content)
    images = open_segmentation(tmp_path, "train")
    assert type(images) is COCOSegmentation
    assert images.classes == ("background", "one", "two")
    assert [images.name(i) for i in range(3)] == ["0007", "0003", "0005"]
    image, mask = images[0]
    assert image.shape == (3, 12, 16)
    assert mask.shape == (12, 16)
    assert set(mask.unique().tolist()) == {0, 1, 255}
    assert (mask[:, 1] == 255).all()  # the crowd
    assert mask[2, 8] == 1
    assert not images[1][1].any()
    assert set(images[2][1].unique().tolist()) == {0, 2}


def test_several_rings_are_one_region(tmp_path, content):
    rings = [[0, 0, 4, 0, 4, 4, 0, 4], [8, 8, 12, 8, 12, 12, 8, 12]]
    content["annotations"] = [content["annotations"][0] | {"segmentation": rings}]
    write_coco(tmp_path, content)
    mask = open_segmentation(tmp_path, "train")[0][1]
    assert (mask[:4, :4] == 1).all()
    assert (mask[8:, 8:12] == 1).all()
    assert mask.sum() == 32


@pytest.mark.parametrize("segmentation", [[], None, [[1, 2, 3]], {"size": [1, 1], "counts": [2]}])
def test_segmentations_of_coco_that_are_malformed(tmp_path, content, segmentation):
    content["annotations"][1]["segmentation"] = segmentation
    path = write_coco(tmp_path, content)
    with one_line(ValueError, path, "annotation 2", "segmentation to be polygons"):
        open_segmentation(tmp_path, "train")
    report = check_data(tmp_path, record=tmp_path / "record", workers=0, progress=False)
    (problem,) = report.problems
    assert "annotation 2: expected segmentation" in problem


def test_run_lengths_of_another_size(tmp_path, content):
    content["annotations"][2]["segmentation"] = {"size": [2, 2], "counts": [4]}
    path = write_coco(tmp_path, content)
    with one_line(ValueError, path, "image 0007", "16x12", "another size"):
        open_segmentation(tmp_path, "train")[0]


def test_coco_with_boxes_alone(tmp_path, content):
    for entry in content["annotations"]:
        entry["segmentation"] = []
    write_coco(tmp_path, content)
    with one_line(FileNotFoundError, tmp_path, "expected a data set"):
        open_segmentation(tmp_path, "train")


def test_union_of_coco(tmp_path, content):
    write_coco(tmp_path, content)
    for entry in content["images"]:
        entry["id"] += 100
        entry["file_name"] = f"{entry['id']:04d}.jpg"
    for entry in content["annotations"]:
        entry["image_id"] += 100
    write_coco(tmp_path, content, "val", "val")
    images = open_segmentation(tmp_path, "train+val")
    assert len(images) == 6
    assert images[3][1].equal(images[0][1])


def test_images_of_another_size_than_annotated_are_refused(tmp_path):
    write_coco(tmp_path, coco_content(), "train", "train")
    images = open_segmentation(tmp_path, "train")
    path = images.image_path(0)
    height, width = images[0][1].shape
    Image.new("RGB", (2 * width, height)).save(path)
    with one_line(ValueError, path, f"expected the annotated size {width}x{height}"):
        images[0]
