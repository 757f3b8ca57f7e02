"""Deformable convolution in groups too narrow for the matrix unit, depthwise above all.

`tl.dot` needs at least 16 input and 16 output channels; a group of one channel would sample 16
columns for one that counts. Here a tile has positions as rows and, as columns, output channels of
one offset group, each of which samples the channels of its convolution group on its own and
multiplies in registers. That is as much sampling as output channels times channels of a group, so
these kernels take groups of few products only (see `triton._NARROW_PRODUCTS`).

The map is channels-last, the weight [K, C of a group, O of all groups]: neighboring columns read
neighboring numbers of both. Letters are as in `triton_geometry`; arguments as in `triton`.
"""

# A tl.constexpr stands for its value, a NamedTuple with these fields.
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

from deformnet.ops.deform_conv.triton_geometry import (
    mask_read,
    outputs,
    positions_read,
    rows_of,
)
from deformnet.ops.triton.sampling import cell, corners, mix


@triton.jit
def forward(
    input, offset, mask, weight, bias, output, sizes, strides,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of the output, [TILE.rows, TILE.out], within one offset group.

    Grid: (tiles of rows x tiles of an offset group's output channels, G). Programs that differ in
    their channels alone come one after another and read the same offsets. Every program writes its
    tile once, with no atomics: the result is deterministic.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(sizes.offset_group_out, TILE.out)
    lane = (program % tiles) * TILE.out + tl.arange(0, TILE.out)
    offset_group = tl.program_id(1)
    out, real_out = offset_group * sizes.offset_group_out + lane, lane < sizes.offset_group_out
    rows = rows_of(program // tiles, sizes, OPTIONS, TILE.rows)

    ROWS: tl.constexpr = TILE.rows
    OUT: tl.constexpr = TILE.out
    sums = tl.zeros((ROWS, OUT), dtype=OPTIONS.dtype)
    for tap in range(sizes.taps):
        y, x = positions_read(offset, rows, offset_group, tap, sizes, OPTIONS)
        at = cell(y, x, rows.real, sizes, OPTIONS.msra)
        factor = y  # not read without a mask
        if mask is not None:
            factor = mask_read(mask, rows, offset_group, tap, sizes, OPTIONS)
        for k in range(sizes.group_channels):
            channel = out // sizes.group_out * sizes.group_channels + k
            values = corners(input, rows.image, at, channel, real_out, sizes, OPTIONS.dtype)
            value = mix(values, at)
            if mask is not None:
                value = value * factor[:, None]
            row_of_weight = (tap * sizes.group_channels + k) * (
                sizes.offset_groups * sizes.offset_group_out
            )
            filters = tl.load(weight + row_of_weight + out, mask=real_out, other=0)
            sums += value * filters.to(OPTIONS.dtype)[None, :]
    if bias is not None:
        sums += tl.load(bias + out, mask=real_out, other=0).to(OPTIONS.dtype)[None, :]
    tl.store(
        outputs(output, rows, out, strides, OPTIONS),
        sums.to(output.dtype.element_ty),
        mask=rows.real[:, None] & real_out[None, :],
    )


@triton.jit
def backward_sample(
    grad_output, weight, rows, channel, real_channel, tap, sizes, strides,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient by the value that each row has sampled under a tap, times its mask factor.

    Returns:
        [TILE.rows, TILE.channels]; each channel sums over the output channels of its group.
    """
    ROWS: tl.constexpr = TILE.rows
    CHANNELS: tl.constexpr = TILE.channels
    gradient = tl.zeros((ROWS, CHANNELS), dtype=OPTIONS.dtype)
    row_of_weight = tap * sizes.group_channels + channel % sizes.group_channels
    row_of_weight *= sizes.offset_groups * sizes.offset_group_out
    for k in range(sizes.group_out):
        out = channel // sizes.group_channels * sizes.group_out + k
        filters = tl.load(weight + row_of_weight + out, mask=real_channel, other=0)
        above = tl.load(
            outputs(grad_output, rows, out, strides, OPTIONS),
            mask=rows.real[:, None] & real_channel[None, :],
            other=0,
        )
        gradient += above.to(OPTIONS.dtype) * filters.to(OPTIONS.dtype)[None, :]
    return gradient


@triton.jit
def backward_weight(
    grad_output, input, offset, mask, partial, sizes, strides, tiles_of_split,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient by the weight, summed over one split of the rows.

    Grid: (G x K x C of a group x tiles of an offset group's output channels, splits). A program
    goes through `tiles_of_split` tiles of rows, keeps a sum for each of its [TILE.rows, TILE.out]
    products, adds up the rows at the end and writes its part of partial, [split, K, C of a group,
    O of all groups], once. No atomics; the splits are then summed by PyTorch: deterministic.
    """
    tiles = tl.cdiv(sizes.offset_group_out, TILE.out)
    program = tl.program_id(0)
    lane = (program % tiles) * TILE.out + tl.arange(0, TILE.out)
    program = program // tiles
    k = program % sizes.group_channels
    program = program // sizes.group_channels
    tap = program % sizes.taps
    offset_group = program // sizes.taps
    split = tl.program_id(1)
    out, real_out = offset_group * sizes.offset_group_out + lane, lane < sizes.offset_group_out
    channel = out // sizes.group_out * sizes.group_channels + k

    ROWS: tl.constexpr = TILE.rows
    OUT: tl.constexpr = TILE.out
    sums = tl.zeros((ROWS, OUT), dtype=OPTIONS.dtype)
    # Rounded up without overflow, even for the largest number of rows.
    row_tiles = (sizes.rows - 1) // TILE.rows + 1
    last = tl.minimum((split + 1) * tiles_of_split, row_tiles)
    for tile in range(split * tiles_of_split, last):
        rows = rows_of(tile, sizes, OPTIONS, TILE.rows)
        y, x = positions_read(offset, rows, offset_group, tap, sizes, OPTIONS)
        at = cell(y, x, rows.real, sizes, OPTIONS.msra)
        value = mix(corners(input, rows.image, at, channel, real_out, sizes, OPTIONS.dtype), at)
        if mask is not None:
            factor = mask_read(mask, rows, offset_group, tap, sizes, OPTIONS)
            value = value * factor[:, None]
        above = tl.load(
            outputs(grad_output, rows, out, strides, OPTIONS),
            mask=rows.real[:, None] & real_out[None, :],
            other=0,
        )
        sums += value * above.to(OPTIONS.dtype)
    place = ((split * sizes.taps + tap) * sizes.group_channels + k) * (
        sizes.offset_groups * sizes.offset_group_out
    )
    tl.store(partial + place + out, tl.sum(sums, axis=0), mask=real_out)
