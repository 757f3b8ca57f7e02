"""The boxes that a region proposal network starts from: some of each size and shape at every unit.

Two conventions. "msra2017" is the authors': the boxes are centred on the cell of stride x stride
pixels that begins at the unit, their shapes are rounded to whole pixels before they are scaled to a
size, and those that leave the image do not train. "modern": the boxes are centred on the pixel that
the unit is centred on, nothing is rounded, and all of them train.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from deformnet.models.detection.detector import Size

Convention = Literal["modern", "msra2017"]

Corners = tuple[float, float, float, float]


def unit_anchors(
    sizes: Sequence[float], ratios: Sequence[float], stride: int, convention: Convention
) -> tuple[Corners, ...]:
    """The anchors of the unit at (0, 0).

    Args:
        sizes: side of the square whose area an anchor has, in pixels of the image.
        ratios: height / width.
        stride: pixels of the image between units.

    Returns:
        len(ratios) * len(sizes) boxes x1, y1, x2, y2, the sizes of one ratio together.

    Raises:
        ValueError: if there are no sizes or ratios, if one is not above 0, if `stride` is below 1
            or if there is no such convention.
    """
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not values or not all(0 < value < float("inf") for value in values):
            raise ValueError(f"{name}: wanted numbers above 0, got {tuple(values)}")
    if stride < 1:
        raise ValueError(f"stride: wanted at least 1, got {stride}")
    if convention not in get_args(Convention):
        raise ValueError(f"convention: wanted one of {get_args(Convention)}, got {convention!r}")
    anchors: list[Corners] = []
    for ratio in ratios:
        for size in sizes:
            if convention == "msra2017":
                # The shape first, in whole pixels at the size of the cell; halves go to even.
                width = round(stride / ratio**0.5)
                height = round(width * ratio)
                width, height = width * size / stride, height * size / stride
                centre = stride / 2
            else:
                width, height = size / ratio**0.5, size * ratio**0.5
                centre = 0.5  # the middle of the first pixel, whose edges are 0 and 1
            x, y = width / 2, height / 2
            anchors.append((centre - x, centre - y, centre + x, centre + y))
    return tuple(anchors)


def grid_anchors(
    anchors: Sequence[Corners], map_size: Size, stride: int, device: torch.device
) -> Tensor:
    """The anchors of all units of a map.

    Args:
        anchors: A boxes of the unit at (0, 0), as `unit_anchors` gives them.
        map_size: (H, W) of the feature map, in units.

    Returns:
        float32 [H*W*A, 4], row by row, the anchors of a unit together.
    """
    height, width = map_size
    y, x = torch.meshgrid(
        torch.arange(height, device=device) * stride,
        torch.arange(width, device=device) * stride,
        indexing="ij",
    )
    starts = torch.stack((x, y, x, y), dim=-1)
    return (starts[:, :, None] + torch.tensor(anchors, device=device)).flatten(0, 2)


def inside_image(map_size: Size, size: Size, stride: int, device: torch.device) -> Tensor:
    """Which units begin inside the image: those that its map would have outside a batch.

    Args:
        map_size: (H, W) of the batch's feature map, in units.
        size: of the image, in pixels.

    Returns:
        bool [H*W]
    """
    rows = torch.arange(map_size[0], device=device) * stride < size[0]
    columns = torch.arange(map_size[1], device=device) * stride < size[1]
    return (rows[:, None] & columns).flatten()
