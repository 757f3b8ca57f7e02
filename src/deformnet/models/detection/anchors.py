"""Anchors of region proposal networks.

There are two conventions. "msra2017" is the authors': anchors are centered on the cell of
stride x stride pixels that starts at the unit's pixel, their shapes are rounded to whole pixels
before they are scaled, and those that cross the image border do not train. "modern" anchors are
centered on the unit's pixel, are not rounded, and all train.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from deformnet.models.detection.detector import Size
from deformnet.ops._arguments import one_of, positive

Convention = Literal["modern", "msra2017"]

Corners = tuple[float, float, float, float]


def unit_anchors(
    sizes: Sequence[float], ratios: Sequence[float], stride: int, convention: Convention
) -> tuple[Corners, ...]:
    """Anchors of the unit at (0, 0).

    Args:
        sizes: Side of the square of the same area, in pixels of the image.
        ratios: Aspect ratios, height / width.
        stride: Stride of the feature map, in pixels of the image.
        convention: "modern" or "msra2017".

    Returns:
        len(ratios) * len(sizes) boxes (x1, y1, x2, y2), ordered by ratio, then by size.

    Raises:
        ValueError: If `sizes` or `ratios` is empty or not positive, `stride` is less than 1, or
            the convention is unknown.
    """
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not values or not all(0 < value < float("inf") for value in values):
            raise ValueError(f"expected {name} to be positive numbers, but got {tuple(values)}")
    positive("stride", stride)
    one_of("convention", convention, get_args(Convention))
    anchors: list[Corners] = []
    for ratio in ratios:
        for size in sizes:
            if convention == "msra2017":
                # The shape of a cell's area is rounded first, halves to even.
                width = round(stride / ratio**0.5)
                height = round(width * ratio)
                width, height = width * size / stride, height * size / stride
                center = stride / 2
            else:
                width, height = size / ratio**0.5, size * ratio**0.5
                center = 0.5  # center of the first pixel, whose edges are 0 and 1
            x, y = width / 2, height / 2
            anchors.append((center - x, center - y, center + x, center + y))
    return tuple(anchors)


def grid_anchors(
    anchors: Sequence[Corners], map_size: Size, stride: int, device: torch.device
) -> Tensor:
    """Anchors of all units of a feature map of this size and stride, float32 [H*W*A, 4].

    `anchors` are the A boxes of the unit at (0, 0), from `unit_anchors`. The result goes row by
    row, the anchors of a unit together.
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
    """Mask bool [H*W] of the units of a padded batch's map that an image of `size` would have."""
    rows = torch.arange(map_size[0], device=device) * stride < size[0]
    columns = torch.arange(map_size[1], device=device) * stride < size[1]
    return (rows[:, None] & columns).flatten()
