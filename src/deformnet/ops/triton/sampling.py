"""Bilinear reads of a channels-last map, for kernels whose rows are positions.

A tile is [rows, channels]: each row has one position (y, x), shared by all channels of the tile.
Neighboring channels are neighbors in memory, so that a row reads each of its four pixels as a
vector. `sizes` stands for any NamedTuple with the `height`, `width` and `channels` of the map.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Cell(NamedTuple):
    """The 2x2 pixels that a position is interpolated between; every field is [rows]."""

    top: Any  # int32, the first pixel's row and column
    left: Any
    down: Any  # distance from it in pixels, in [0, 1)
    right: Any
    within: Any  # whether anything is read: not outside the map, not NaN
    undefined: Any  # whether the position is NaN


class Corners(NamedTuple):
    """Values of the four pixels, [rows, channels] each: by row (0 is the top), then column."""

    v00: Any
    v01: Any
    v10: Any
    v11: Any


@triton.jit
def cell(y, x, real, sizes, MSRA: tl.constexpr):
    """The cell of each position (y, x); rows that are not `real` read nothing.

    Outside the map means outside (-1, H) x (-1, W), or with MSRA outside [0, H) x [0, W). This is
    decided on the floating-point position, before it becomes an integer: infinities and numbers
    beyond int32 never reach an address. A NaN fails every comparison, so that it reads nothing
    either; `mix` gives NaN for it.
    """
    first = 0.0 if MSRA else -1.0
    undefined = (y != y) | (x != x)
    within = (y >= first) & (y < sizes.height) & (x >= first) & (x < sizes.width)
    # From here on all positions are finite and small.
    y, x = tl.where(within, y, 0.0), tl.where(within, x, 0.0)
    if MSRA:
        # Beyond the last row or column the value stays what it is there.
        y, x = tl.minimum(y, sizes.height - 1), tl.minimum(x, sizes.width - 1)
    top, left = tl.floor(y), tl.floor(x)
    return Cell(
        top.to(tl.int32), left.to(tl.int32), y - top, x - left, within & real, undefined & real
    )


@triton.jit
def corner(image, y, x, within, channel, real_channel, sizes):
    """Index of the pixel (y, x) in the map, [rows, channels], and whether the map has it."""
    inside = within & (y >= 0) & (y < sizes.height) & (x >= 0) & (x < sizes.width)
    # `image` is int64 where indices do not fit into int32.
    pixel = image * sizes.height * sizes.width
    pixel += tl.where(inside, y.to(image.dtype) * sizes.width + x, 0)
    index = (pixel * sizes.channels)[:, None] + channel[None, :]
    return index, inside[:, None] & real_channel[None, :]


@triton.jit
def corners(input, image, at, channel, real_channel, sizes, DTYPE: tl.constexpr):
    """The four pixels of each row's cell `at`; zero outside the map."""
    top, left, within = at.top, at.left, at.within
    p00, m00 = corner(image, top, left, within, channel, real_channel, sizes)
    p01, m01 = corner(image, top, left + 1, within, channel, real_channel, sizes)
    p10, m10 = corner(image, top + 1, left, within, channel, real_channel, sizes)
    p11, m11 = corner(image, top + 1, left + 1, within, channel, real_channel, sizes)
    # Masked loads, not products with zero: the map may hold infinities and NaN.
    v00 = tl.load(input + p00, mask=m00, other=0).to(DTYPE)
    v01 = tl.load(input + p01, mask=m01, other=0).to(DTYPE)
    v10 = tl.load(input + p10, mask=m10, other=0).to(DTYPE)
    v11 = tl.load(input + p11, mask=m11, other=0).to(DTYPE)
    return Corners(v00, v01, v10, v11)


@triton.jit
def mix(values, at):
    """The bilinear value between the `Corners` of each row; NaN where the position is NaN."""
    up, before = 1 - at.down, 1 - at.right
    value = (
        values.v00 * (up * before)[:, None]
        + values.v01 * (up * at.right)[:, None]
        + values.v10 * (at.down * before)[:, None]
        + values.v11 * (at.down * at.right)[:, None]
    )
    return tl.where(at.undefined[:, None], float("nan"), value)
