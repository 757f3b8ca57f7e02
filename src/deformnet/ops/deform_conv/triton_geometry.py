"""Arguments that the Triton kernels of deformable convolution share, and what follows from them.

Triton passes a NamedTuple as its fields, one by one: each integer is still compiled for being 1 or
divisible by 16, as an argument of its own would be. A NamedTuple that is a `tl.constexpr` is part
of what a kernel is compiled for; its fields are plain numbers, which Triton before 3.8 takes in a
shape only under a name of their own (`ROWS: tl.constexpr = TILE.rows`).

Letters, here and in the kernels: N C H W as in PyTorch, Ho Wo the output's height and width, P =
Ho*Wo positions of an image, M = N*P rows, K taps, G offset groups.
"""

# A tl.constexpr stands for its value, a NamedTuple with these fields.
# pyright: reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """The call, in numbers.

    Quotients are among them, not left to the kernels: what the compiler sees divided may be odd,
    but of an argument it knows whether 16 divides it, and only then do loads and atomics of
    neighboring channels become vectors.
    """

    rows: int  # M
    positions: int  # P
    height: int  # H
    width: int  # W
    channels: int  # C
    out_w: int  # Wo
    group_channels: int  # input channels of a convolution group
    group_out: int  # output channels of a convolution group
    offset_groups: int  # G
    offset_group_channels: int  # input channels of an offset group
    offset_group_out: int  # output channels of an offset group, if it consists of whole groups
    taps: int  # K
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


class Segments(NamedTuple):
    """Runs of channels that lie within one convolution group and one offset group."""

    length: int
    number: int  # in the group, or offset group, that a program works on


class Strides(NamedTuple):
    """Steps in memory of [N, O, Ho, Wo], which may be contiguous or channels-last."""

    image: int
    channel: int
    position: int


class Options(NamedTuple):
    """What kernels are compiled for, in addition to tiles."""

    msra: bool  # the border "msra2017"
    wide: bool  # indices into tensors are int64
    narrow: bool  # see `triton_narrow`
    dtype: tl.dtype  # of positions, bilinear weights, and sums of products
    precision: str  # in which the matrix unit multiplies float32: "tf32" or "ieee"


class Tile(NamedTuple):
    """The block sizes of a kernel, all powers of two, and how it is launched."""

    rows: int
    out: int  # output channels
    channels: int  # input channels
    warps: int
    stages: int  # rounds of a loop whose loads are in flight at once


class Rows(NamedTuple):
    """The rows of a tile, [rows] each."""

    real: Any  # whether there are so many; rows beyond the last are those of the first
    image: Any  # int64 in wide kernels, and so is every index computed from it
    position: Any  # among the P of the image


@triton.jit
def rows_of(tile, sizes, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """The `Rows` of tile number `tile`."""
    row = tile * tl.full((), BLOCK, tl.int64 if OPTIONS.wide else tl.int32) + tl.arange(0, BLOCK)
    real = row < sizes.rows
    row = tl.where(real, row, 0)
    image = row // sizes.positions
    return Rows(real, image, row - image * sizes.positions)


@triton.jit
def positions_read(offset, rows, offset_group, tap, sizes, OPTIONS: tl.constexpr):
    """The position (y, x) that each row reads under a tap, in pixels of the map.

    offset is [N, G, K, 2, P], contiguous: neighboring rows read neighboring numbers.
    """
    channel = (rows.image * sizes.offset_groups + offset_group) * sizes.taps * 2 + 2 * tap
    y_offset = offset + channel * sizes.positions + rows.position
    x_offset = offset + (channel + 1) * sizes.positions + rows.position
    shift_y = tl.load(y_offset, mask=rows.real, other=0)
    shift_x = tl.load(x_offset, mask=rows.real, other=0)
    row, column = rows.position // sizes.out_w, rows.position % sizes.out_w
    y = row * sizes.stride_h - sizes.pad_h + (tap // sizes.kernel_w) * sizes.dilation_h
    x = column * sizes.stride_w - sizes.pad_w + (tap % sizes.kernel_w) * sizes.dilation_w
    return (
        y.to(OPTIONS.dtype) + shift_y.to(OPTIONS.dtype),
        x.to(OPTIONS.dtype) + shift_x.to(OPTIONS.dtype),
    )


@triton.jit
def mask_read(mask, rows, offset_group, tap, sizes, OPTIONS: tl.constexpr):
    """The factor of each row under a tap, from the mask [N, G, K, P]."""
    channel = (rows.image * sizes.offset_groups + offset_group) * sizes.taps + tap
    factor = mask + channel * sizes.positions + rows.position
    return tl.load(factor, mask=rows.real, other=0).to(OPTIONS.dtype)


@triton.jit
def outputs(tensor, rows, channel, strides, OPTIONS: tl.constexpr):
    """Pointers [rows, channels] into an output, or the gradient of one: [N, O, Ho, Wo]."""
    if OPTIONS.wide:
        channel = channel.to(tl.int64)
    first = tensor + (rows.image * strides.image + rows.position * strides.position)[:, None]
    return first + (channel * strides.channel)[None, :]
