"""Deformable convolution in groups too narrow for the matrix unit, depthwise above all.

A tile has output positions as rows and, as columns, output channels that share their offsets; a
group has so few channels that each of its outputs reads them on its own. Weights, here [tap, C of a
group, O of all groups], and neighbouring channels of the map are then read as vectors.

Letters: C channels and O output channels of a group.
"""

import triton
import triton.language as tl

from deformnet.ops.triton.sampling import cell, corners, mix, positions_read, rows


@triton.jit
def forward(
    input, offset, mask, weight, bias, output,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    output_image, output_channel, output_position,
    MODULATED: tl.constexpr, BIAS: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of the output, of channels that share an offset group."""
    shared = channels // offset_groups // group_channels * group_out
    program = tl.program_id(0)
    tiles = tl.cdiv(shared, BLOCK_O)
    lane = (program % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    offset_group = tl.program_id(1)
    out, real_out = offset_group * shared + lane, lane < shared
    real, image, position = rows(program // tiles, count, positions, BLOCK_M, WIDE)

    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=DTYPE)
    for tap in range(taps):
        y, x = positions_read(
            offset, image, position, real, offset_group, tap,
            offset_groups, taps, kernel_w, positions, out_w,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
        )  # fmt: skip
        top, left, down, right, within, undefined = cell(y, x, height, width, MSRA)
        factor = y  # not read without a mask
        if MODULATED:
            place = (image * offset_groups + offset_group) * taps + tap
            factor = tl.load(mask + place * positions + position, mask=real, other=0).to(DTYPE)
        for k in range(group_channels):
            v00, v01, v10, v11 = corners(
                input, image, top, left, within & real, out // group_out * group_channels + k,
                real_out, height, width, channels, DTYPE,
            )  # fmt: skip
            value = mix(v00, v01, v10, v11, down, right, undefined & real)
            if MODULATED:
                value = value * factor[:, None]
            row_of_weight = (tap * group_channels + k) * (offset_groups * shared)
            filters = tl.load(weight + row_of_weight + out, mask=real_out, other=0)
            sums += value * filters.to(DTYPE)[None, :]
    if BIAS:
        sums += tl.load(bias + out, mask=real_out, other=0).to(DTYPE)[None, :]
    if WIDE:
        out = out.to(tl.int64)
    tl.store(
        output + (image * output_image + position * output_position)[:, None]
        + (out * output_channel)[None, :],
        sums.to(output.dtype.element_ty),
        mask=real[:, None] & real_out[None, :],
    )  # fmt: skip


@triton.jit
def backward_sample(
    grad_output, weight, image, position, real, channel, real_channel, tap,
    channels, group_channels, group_out, output_image, output_channel, output_position,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient by what the tap has read, times its mask: [rows, channels]."""
    gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=DTYPE)
    row_of_weight = tap * group_channels + channel % group_channels
    row_of_weight *= channels // group_channels * group_out
    for k in range(group_out):
        out = channel // group_channels * group_out + k
        filters = tl.load(weight + row_of_weight + out, mask=real_channel, other=0)
        if WIDE:
            out = out.to(tl.int64)
        above = tl.load(
            grad_output + (image * output_image + position * output_position)[:, None]
            + (out * output_channel)[None, :],
            mask=real[:, None] & real_channel[None, :],
            other=0,
        )  # fmt: skip
        gradient += above.to(DTYPE) * filters.to(DTYPE)[None, :]
    return gradient


@triton.jit
def backward_weight(
    grad_output, input, offset, mask, partial,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    output_image, output_channel, output_position, tiles_of_split,
    MODULATED: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Gradient by the weight, summed over one split of the rows: [split, tap, C, all O]."""
    shared = channels // offset_groups // group_channels * group_out
    tiles = tl.cdiv(shared, BLOCK_O)
    program = tl.program_id(0)
    lane = (program % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // tiles
    k = program % group_channels
    program = program // group_channels
    tap = program % taps
    offset_group = program // taps
    split = tl.program_id(1)
    out, real_out = offset_group * shared + lane, lane < shared
    out_channel = out.to(tl.int64) if WIDE else out

    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=DTYPE)
    last = tl.minimum((split + 1) * tiles_of_split, tl.cdiv(count, BLOCK_M))
    for tile in range(split * tiles_of_split, last):
        real, image, position = rows(tile, count, positions, BLOCK_M, WIDE)
        y, x = positions_read(
            offset, image, position, real, offset_group, tap,
            offset_groups, taps, kernel_w, positions, out_w,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
        )  # fmt: skip
        top, left, down, right, within, undefined = cell(y, x, height, width, MSRA)
        v00, v01, v10, v11 = corners(
            input, image, top, left, within & real, out // group_out * group_channels + k,
            real_out, height, width, channels, DTYPE,
        )  # fmt: skip
        value = mix(v00, v01, v10, v11, down, right, undefined & real)
        if MODULATED:
            place = (image * offset_groups + offset_group) * taps + tap
            factor = tl.load(mask + place * positions + position, mask=real, other=0)
            value = value * factor.to(DTYPE)[:, None]
        above = tl.load(
            grad_output + (image * output_image + position * output_position)[:, None]
            + (out_channel * output_channel)[None, :],
            mask=real[:, None] & real_out[None, :],
            other=0,
        )  # fmt: skip
        sums += value * above.to(DTYPE)
    place = ((split * taps + tap) * group_channels + k) * (offset_groups * shared)
    tl.store(partial + place + out, tl.sum(sums, axis=0), mask=real_out)
