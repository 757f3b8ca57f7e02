import math

import pytest
import torch

from deformnet.models.detection.anchors import grid_anchors, inside_image, unit_anchors

# The authors' nine anchors of the unit at (0, 0), as first and last pixel.
MSRA = [
    [-84, -40, 99, 55],
    [-176, -88, 191, 103],
    [-360, -184, 375, 199],
    [-56, -56, 71, 71],
    [-120, -120, 135, 135],
    [-248, -248, 263, 263],
    [-36, -80, 51, 95],
    [-80, -168, 95, 183],
    [-168, -344, 183, 359],
]


def test_the_authors_anchors():
    anchors = unit_anchors((128, 256, 512), (0.5, 1, 2), 16, "msra2017")
    assert [[x1, y1, x2 - 1, y2 - 1] for x1, y1, x2, y2 in anchors] == MSRA


def test_modern_anchors_have_their_size_and_shape_and_are_centered_on_a_pixel():
    sizes, ratios = (20, 64.5), (0.3, 1, 2)
    anchors = unit_anchors(sizes, ratios, 16, "modern")
    assert len(anchors) == 6
    for i, (x1, y1, x2, y2) in enumerate(anchors):
        ratio, size = ratios[i // 2], sizes[i % 2]
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio)
        assert math.sqrt((y2 - y1) * (x2 - x1)) == pytest.approx(size)
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((0.5, 0.5))


def test_anchors_of_a_map_follow_row_by_row():
    anchors = [(-1.5, -2.0, 3.0, 4.0), (0.0, 0.0, 8.0, 2.0)]
    expected = [
        [x1 + 8 * j, y1 + 8 * i, x2 + 8 * j, y2 + 8 * i]
        for i in range(3)
        for j in range(4)
        for x1, y1, x2, y2 in anchors
    ]
    found = grid_anchors(anchors, (3, 4), 8, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    assert grid_anchors(anchors, (0, 4), 8, torch.device("cpu")).shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (16, 17), (48, 64), (33, 31)], ids=str)
def test_an_image_has_the_units_that_its_own_map_would_have(size):
    inside = inside_image((3, 4), size, 16, torch.device("cpu"))
    rows, columns = math.ceil(size[0] / 16), math.ceil(size[1] / 16)
    assert inside.tolist() == [i < rows and j < columns for i in range(3) for j in range(4)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": ()}, r"sizes to be positive numbers, but got \(\)"),
        ({"sizes": (32, 0)}, r"sizes to be positive numbers, but got \(32, 0\)"),
        ({"ratios": (math.nan,)}, r"ratios to be positive numbers, but got \(nan,\)"),
        ({"ratios": (1, math.inf)}, r"ratios to be positive numbers, but got \(1, inf\)"),
        ({"stride": 0}, "stride to be at least 1, but got 0"),
        ({"convention": "caffe"}, r"convention to be one of .*'msra2017'\), but got 'caffe'"),
    ],
)
def test_wrong_arguments(changed, message):
    arguments = {"sizes": (32,), "ratios": (1,), "stride": 16, "convention": "modern"}
    with pytest.raises(ValueError, match=f"expected {message}"):
        unit_anchors(**(arguments | changed))
