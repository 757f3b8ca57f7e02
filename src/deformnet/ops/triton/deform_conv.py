"""Deformable convolution on a GPU: a product of matrices whose left side is sampled on the way.

One row of the left matrix is an output position, one column a channel under one tap of the kernel.
A tile of it is read from the map into registers and multiplied at once, so that it never lies in
memory. The backward pass samples again.

Letters: M = N*P rows, P = Ho*Wo output positions of an image, C channels, O output channels of a
group, K taps. A segment is a run of channels within one group and one offset group.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deformnet.ops.triton.sums import Sums, add, deterministic, largest_finite

Pair = tuple[int, int]

# Numbers in a buffer for the sums of a gradient that is not summed in place.
_MOST_SUMS = 2**26
# Numbers in the partial sums of the gradient of the weight.
_MOST_PARTIAL = 2**24
# Beyond this a place in a tensor is counted in 64 bits.
_NARROW = 2**31


@triton.jit
def _rows(tile, count, positions, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of the rows of a tile: whether there are so many, their images, positions within them."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    real = row < count
    if WIDE:
        row = row.to(tl.int64)
    row = tl.where(real, row, 0)
    image = row // positions
    return real, image, row - image * positions


@triton.jit
def _where(
    offset, image, position, real, group, tap,
    offset_groups, taps, kernel_w, positions, out_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The positions (y, x) that a tap reads, in pixels."""
    channel = (image * offset_groups + group) * taps * 2 + 2 * tap
    shift_y = tl.load(offset + channel * positions + position, mask=real, other=0)
    shift_x = tl.load(offset + (channel + 1) * positions + position, mask=real, other=0)
    row, column = position // out_w, position % out_w
    y = row * stride_h - pad_h + (tap // kernel_w) * dilation_h
    x = column * stride_w - pad_w + (tap % kernel_w) * dilation_w
    return y.to(DTYPE) + shift_y.to(DTYPE), x.to(DTYPE) + shift_x.to(DTYPE)


@triton.jit
def _cell(y, x, height, width, MSRA: tl.constexpr):
    """The four pixels around (y, x), how far it lies from the first, and what may be read.

    Returns:
        The pixel (top, left) and the fractions (down, right); whether anything is read there;
        whether the position is not a number.
    """
    first = 0.0 if MSRA else -1.0
    undefined = (y != y) | (x != x)
    within = (y >= first) & (y < height) & (x >= first) & (x < width)
    # From here on all positions are finite and small.
    y, x = tl.where(within, y, 0.0), tl.where(within, x, 0.0)
    if MSRA:
        # Beyond the last row or column the value stays what it is there.
        y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    top, left = tl.floor(y), tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, within, undefined


@triton.jit
def _corner(image, y, x, within, channel, real_channel, height, width, channels):
    """Places of the pixel (y, x) in the map, [rows, channels], and whether it has them."""
    inside = within & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = image * (height * width) + tl.where(inside, y * width + x, 0)
    return (pixel * channels)[:, None] + channel[None, :], inside[:, None] & real_channel[None, :]


@triton.jit
def _corners(
    input, image, top, left, within, channel, real_channel, height, width, channels,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The four pixels around each row's position, [rows, channels]: zero outside the map."""
    p00, m00 = _corner(image, top, left, within, channel, real_channel, height, width, channels)
    p01, m01 = _corner(image, top, left + 1, within, channel, real_channel, height, width, channels)
    p10, m10 = _corner(image, top + 1, left, within, channel, real_channel, height, width, channels)
    p11, m11 = _corner(
        image, top + 1, left + 1, within, channel, real_channel, height, width, channels
    )
    # Not a product with zero: the map may hold infinities and NaN.
    v00 = tl.load(input + p00, mask=m00, other=0).to(DTYPE)
    v01 = tl.load(input + p01, mask=m01, other=0).to(DTYPE)
    v10 = tl.load(input + p10, mask=m10, other=0).to(DTYPE)
    v11 = tl.load(input + p11, mask=m11, other=0).to(DTYPE)
    return v00, v01, v10, v11


@triton.jit
def _mix(v00, v01, v10, v11, down, right, undefined):
    """The bilinear value between four corners."""
    up, before = 1 - down, 1 - right
    value = (
        v00 * (up * before)[:, None]
        + v01 * (up * right)[:, None]
        + v10 * (down * before)[:, None]
        + v11 * (down * right)[:, None]
    )
    return tl.where(undefined[:, None], float("nan"), value)


@triton.jit
def _forward(
    input, offset, mask, weight, bias, output,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, segment, segments, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    output_image, output_channel, output_position,
    MODULATED: tl.constexpr, BIAS: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Neighbours share the rows, and so what they read of the map.
    tiles = tl.cdiv(group_out, BLOCK_O)
    program = tl.program_id(0)
    out_tile = program % tiles
    group = tl.program_id(1)
    real, image, position = _rows(program // tiles, count, positions, BLOCK_M, WIDE)
    out = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    real_out = out < group_out
    lane = tl.arange(0, BLOCK_C)

    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=DTYPE)
    for tap in range(taps):
        for part in range(segments):
            first = group * group_channels + part * segment
            offset_group = first // (channels // offset_groups)
            y, x = _where(
                offset, image, position, real, offset_group, tap,
                offset_groups, taps, kernel_w, positions, out_w,
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
            )  # fmt: skip
            top, left, down, right, within, undefined = _cell(y, x, height, width, MSRA)
            factor = y  # not read without a mask
            if MODULATED:
                factor = tl.load(
                    mask + ((image * offset_groups + offset_group) * taps + tap) * positions
                    + position, mask=real, other=0,
                ).to(DTYPE)  # fmt: skip
            for start in range(0, segment, BLOCK_C):
                within_segment = start + lane
                real_channel = within_segment < segment
                v00, v01, v10, v11 = _corners(
                    input, image, top, left, within & real, first + within_segment, real_channel,
                    height, width, channels, DTYPE,
                )  # fmt: skip
                value = _mix(v00, v01, v10, v11, down, right, undefined & real)
                if MODULATED:
                    value = value * factor[:, None]
                # A NaN would otherwise meet the zeros of weights that are not there.
                value = tl.where(real_channel[None, :], value, 0)
                row_of_weight = (group * taps + tap) * group_channels + part * segment
                filters = tl.load(
                    weight + (row_of_weight + within_segment)[:, None] * group_out + out[None, :],
                    mask=real_channel[:, None] & real_out[None, :],
                    other=0,
                )
                sums = tl.dot(
                    value.to(filters.dtype), filters, sums,
                    input_precision=PRECISION, out_dtype=DTYPE,
                )  # fmt: skip
    channel = group * group_out + out
    if BIAS:
        sums += tl.load(bias + channel, mask=real_out, other=0).to(DTYPE)[None, :]
    if WIDE:
        channel = channel.to(tl.int64)
    place = (image * output_image + position * output_position)[:, None]
    tl.store(
        output + place + (channel * output_channel)[None, :],
        sums.to(output.dtype.element_ty),
        mask=real[:, None] & real_out[None, :],
    )


@triton.jit
def _backward_positions(
    grad_output, input, offset, mask, weight, grad_offset, grad_mask, floats, integers, scale,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, segment, segments, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    output_image, output_channel, output_position,
    MODULATED: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    BY_INPUT: tl.constexpr, BY_POSITION: tl.constexpr, FIXED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients by input, offset and mask: of one tap, in one offset group of `segments`."""
    program = tl.program_id(0)
    tap = program % taps
    offset_group = tl.program_id(1)
    real, image, position = _rows(program // taps, count, positions, BLOCK_M, WIDE)
    lane, out_lane = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    y, x = _where(
        offset, image, position, real, offset_group, tap,
        offset_groups, taps, kernel_w, positions, out_w,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
    )  # fmt: skip
    top, left, down, right, within, undefined = _cell(y, x, height, width, MSRA)
    within, undefined = within & real, undefined & real
    up, before = 1 - down, 1 - right
    place = (image * offset_groups + offset_group) * taps + tap
    factor = y  # not read without a mask
    if MODULATED:
        factor = tl.load(mask + place * positions + position, mask=real, other=0).to(DTYPE)

    by_y = tl.zeros((BLOCK_M,), dtype=DTYPE)
    by_x = tl.zeros((BLOCK_M,), dtype=DTYPE)
    by_mask = tl.zeros((BLOCK_M,), dtype=DTYPE)
    scale_of_sums = tl.load(scale) if FIXED else 1.0
    for part in range(segments):
        first = offset_group * (channels // offset_groups) + part * segment
        group = first // group_channels
        for start in range(0, segment, BLOCK_C):
            within_segment = start + lane
            real_channel = within_segment < segment
            channel = first + within_segment
            # The gradient by what the tap has read, of this group's outputs.
            gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=DTYPE)
            row_of_weight = (group * taps + tap) * group_channels - group * group_channels
            for out_start in range(0, group_out, BLOCK_O):
                out = out_start + out_lane
                real_out = out < group_out
                out_channel = group * group_out + out
                if WIDE:
                    out_channel = out_channel.to(tl.int64)
                above = tl.load(
                    grad_output + (image * output_image + position * output_position)[:, None]
                    + (out_channel * output_channel)[None, :],
                    mask=real[:, None] & real_out[None, :],
                    other=0,
                )  # fmt: skip
                filters = tl.load(
                    weight + (row_of_weight + channel)[None, :] * group_out + out[:, None],
                    mask=real_channel[None, :] & real_out[:, None],
                    other=0,
                )
                gradient = tl.dot(
                    above, filters, gradient, input_precision=PRECISION, out_dtype=DTYPE
                )
            # Infinities times the zeros of channels that are not there.
            gradient = tl.where(real_channel[None, :], gradient, 0)

            if BY_POSITION:
                v00, v01, v10, v11 = _corners(
                    input, image, top, left, within, channel, real_channel,
                    height, width, channels, DTYPE,
                )  # fmt: skip
                value = _mix(v00, v01, v10, v11, down, right, undefined)
                value = tl.where(real_channel[None, :], value, 0)
                by_mask += tl.sum(gradient * value, axis=1)
                slope_y = (v10 - v00) * before[:, None] + (v11 - v01) * right[:, None]
                slope_x = (v01 - v00) * up[:, None] + (v11 - v10) * down[:, None]
                by_y += tl.sum(gradient * slope_y, axis=1)
                by_x += tl.sum(gradient * slope_x, axis=1)
            if BY_INPUT:
                if MODULATED:
                    gradient = gradient * factor[:, None]
                p00, m00 = _corner(
                    image, top, left, within, channel, real_channel,
                    height, width, channels,
                )  # fmt: skip
                p01, m01 = _corner(
                    image, top, left + 1, within, channel, real_channel,
                    height, width, channels,
                )  # fmt: skip
                p10, m10 = _corner(
                    image, top + 1, left, within, channel, real_channel,
                    height, width, channels,
                )  # fmt: skip
                p11, m11 = _corner(
                    image, top + 1, left + 1, within, channel, real_channel,
                    height, width, channels,
                )  # fmt: skip
                add(
                    floats, integers, scale_of_sums, p00,
                    gradient * (up * before)[:, None], m00, FIXED,
                )  # fmt: skip
                add(
                    floats, integers, scale_of_sums, p01,
                    gradient * (up * right)[:, None], m01, FIXED,
                )  # fmt: skip
                add(
                    floats, integers, scale_of_sums, p10,
                    gradient * (down * before)[:, None], m10, FIXED,
                )  # fmt: skip
                add(
                    floats, integers, scale_of_sums, p11,
                    gradient * (down * right)[:, None], m11, FIXED,
                )  # fmt: skip
    if BY_POSITION:
        if MODULATED:
            tl.store(
                grad_mask + place * positions + position,
                by_mask.to(grad_mask.dtype.element_ty),
                mask=real,
            )
            by_y, by_x = by_y * factor, by_x * factor
        # A value that stays the same has no slope, also where the gradient is not finite.
        varies_y, varies_x = within, within
        if MSRA:
            varies_y, varies_x = within & (y < height - 1), within & (x < width - 1)
        by_y, by_x = tl.where(varies_y, by_y, 0), tl.where(varies_x, by_x, 0)
        by_y = tl.where(undefined, float("nan"), by_y).to(grad_offset.dtype.element_ty)
        by_x = tl.where(undefined, float("nan"), by_x).to(grad_offset.dtype.element_ty)
        tl.store(grad_offset + 2 * place * positions + position, by_y, mask=real)
        tl.store(grad_offset + (2 * place + 1) * positions + position, by_x, mask=real)


@triton.jit
def _backward_weight(
    grad_output, input, offset, mask, partial,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, segment, segments, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    output_image, output_channel, output_position, groups, tiles_of_split,
    MODULATED: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient by the weight, summed over one split of the rows: [split, group, tap, C, O]."""
    out_tiles, channel_tiles = tl.cdiv(group_out, BLOCK_O), tl.cdiv(segment, BLOCK_C)
    program = tl.program_id(0)
    out = (program % out_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    program = program // out_tiles
    within_segment = (program % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // channel_tiles
    part = program % segments
    program = program // segments
    tap = program % taps
    group = program // taps
    split = tl.program_id(1)
    real_out, real_channel = out < group_out, within_segment < segment
    first = group * group_channels + part * segment
    offset_group = first // (channels // offset_groups)
    out_channel = group * group_out + out
    if WIDE:
        out_channel = out_channel.to(tl.int64)

    sums = tl.zeros((BLOCK_C, BLOCK_O), dtype=DTYPE)
    last = tl.minimum((split + 1) * tiles_of_split, tl.cdiv(count, BLOCK_M))
    for tile in range(split * tiles_of_split, last):
        real, image, position = _rows(tile, count, positions, BLOCK_M, WIDE)
        y, x = _where(
            offset, image, position, real, offset_group, tap,
            offset_groups, taps, kernel_w, positions, out_w,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
        )  # fmt: skip
        top, left, down, right, within, undefined = _cell(y, x, height, width, MSRA)
        v00, v01, v10, v11 = _corners(
            input, image, top, left, within & real, first + within_segment, real_channel,
            height, width, channels, DTYPE,
        )  # fmt: skip
        value = _mix(v00, v01, v10, v11, down, right, undefined & real)
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
        sums = tl.dot(
            tl.trans(value.to(above.dtype)), above, sums,
            input_precision=PRECISION, out_dtype=DTYPE,
        )  # fmt: skip
    place = ((split * groups + group) * taps + tap) * group_channels + part * segment
    tl.store(
        partial + (place + within_segment)[:, None] * group_out + out[None, :],
        sums,
        mask=real_channel[:, None] & real_out[None, :],
    )


class _Sizes(NamedTuple):
    """What all kernels take, in their order."""

    rows: int
    positions: int
    height: int
    width: int
    channels: int
    out_w: int
    group_channels: int
    group_out: int
    offset_groups: int
    segment: int
    segments: int
    taps: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


class _Tiles(NamedTuple):
    """Rows, output channels and channels of a tile, and the warps that work on it."""

    rows: int
    out: int
    channels: int
    warps: int


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> Tensor:
    """Forward pass; arguments are as `deformnet.ops.deform_conv2d` has checked them.

    Returns:
        [N, C_out, Ho, Wo], channels-last where `input` is.
    """
    output = torch.empty(
        (input.shape[0], weight.shape[0], *offset.shape[2:]),
        dtype=input.dtype,
        device=input.device,
        memory_format=_memory_format(input),
    )
    if output.numel() == 0:
        return output
    maps = input.contiguous(memory_format=torch.channels_last)
    offset = offset.contiguous()
    mask = None if mask is None else mask.contiguous()
    sizes = _sizes(input, offset, weight, stride, padding, dilation)
    sizes = sizes._replace(segments=sizes.group_channels // sizes.segment)
    tiles = _tiles(sizes, input.dtype)
    groups = sizes.channels // sizes.group_channels
    grid = (triton.cdiv(sizes.rows, tiles.rows) * triton.cdiv(sizes.group_out, tiles.out), groups)
    with torch.cuda.device_of(input):
        _forward[grid](
            *(maps, offset, offset if mask is None else mask, _packed(weight, groups)),
            *(offset if bias is None else bias.contiguous(), output),
            *sizes,
            *_strides(output),
            MODULATED=mask is not None,
            BIAS=bias is not None,
            MSRA=border == "msra2017",
            WIDE=_wide(maps, output, offset),
            DTYPE=_arithmetic(input.dtype),
            PRECISION=_precision(input.dtype),
            BLOCK_M=tiles.rows,
            BLOCK_O=tiles.out,
            BLOCK_C=tiles.channels,
            num_warps=tiles.warps,  # pyright: ignore[reportCallIssue]
        )
    return output


def deform_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by input, offset, weight, bias and mask, those that `needs` asks for."""
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = needs
    needs_positions = needs_offset or needs_mask
    grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
    # An empty batch runs no kernel: its gradients are zero.
    make = torch.zeros_like if grad_output.numel() == 0 else torch.empty_like
    grad_input = make(input, memory_format=_memory_format(input)) if needs_input else None
    offset, mask = offset.contiguous(), None if mask is None else mask.contiguous()
    grad_offset = make(offset) if needs_positions else None
    grad_mask = make(mask) if mask is not None and needs_positions else None
    grad_weight = make(weight, memory_format=torch.contiguous_format) if needs_weight else None
    if grad_output.numel() > 0:
        grad_output, maps = _dense(grad_output), input.contiguous(memory_format=torch.channels_last)
        sizes = _sizes(input, offset, weight, stride, padding, dilation)
        with torch.cuda.device_of(input):
            if needs_input or needs_positions:
                _by_input_and_positions(
                    *(grad_output, maps, offset, weight, mask, sizes, border),
                    *(grad_input, grad_offset, grad_mask),
                )
            if grad_weight is not None:
                _by_weight(grad_output, maps, offset, weight, mask, sizes, border, grad_weight)
    return (
        grad_input,
        grad_offset if needs_offset else None,
        grad_weight,
        grad_bias,
        grad_mask if needs_mask else None,
    )


def _by_input_and_positions(
    grad_output: Tensor,
    maps: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    sizes: _Sizes,
    border: str,
    grad_input: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
) -> None:
    groups = sizes.channels // sizes.group_channels
    packed = _packed(weight, groups)
    tiles = _tiles(sizes, maps.dtype)
    sizes = sizes._replace(segments=sizes.channels // sizes.offset_groups // sizes.segment)
    largest = None
    if grad_input is not None and deterministic():
        # A tap's gradient is a sum over the outputs of its group, of gradient times weight.
        largest = largest_finite(grad_output) * largest_finite(
            torch.where(weight.isfinite(), weight, 0).double().abs().sum(0)
        )
        if mask is not None:
            largest = largest * largest_finite(mask)

    batch, pixels = maps.shape[0], sizes.height * sizes.width
    dtype = torch.promote_types(maps.dtype, torch.float32)
    step = batch
    if grad_input is not None and (largest is not None or dtype != maps.dtype):
        step = min(batch, max(1, _MOST_SUMS // (pixels * sizes.channels)))
    for first in range(0, batch, step):
        some = slice(first, min(first + step, batch))
        number = some.stop - some.start
        sums = None
        if grad_input is not None:
            sums = Sums(
                (number, pixels, sizes.channels),
                dtype,
                maps.device,
                largest,
                # Each position reads a pixel at most once under each tap.
                sizes.taps * sizes.positions,
            )
        above = grad_output[some]
        count = number * sizes.positions
        grid = (triton.cdiv(count, tiles.rows) * sizes.taps, sizes.offset_groups)
        _backward_positions[grid](
            *(above, maps[some], offset[some], offset if mask is None else mask[some], packed),
            offset if grad_offset is None else grad_offset[some],
            offset if grad_mask is None else grad_mask[some],
            *((offset, offset, offset) if sums is None else sums.tensors),
            *sizes._replace(rows=count),
            *_strides(above),
            MODULATED=mask is not None,
            MSRA=border == "msra2017",
            WIDE=_wide(maps, grad_output, offset),
            BY_INPUT=sums is not None,
            BY_POSITION=grad_offset is not None,
            FIXED=sums is not None and sums.fixed,
            DTYPE=_arithmetic(maps.dtype),
            PRECISION=_precision(maps.dtype),
            BLOCK_M=tiles.rows,
            BLOCK_O=tiles.channels,
            BLOCK_C=tiles.channels,
            num_warps=tiles.warps,  # pyright: ignore[reportCallIssue]
        )
        if grad_input is not None and sums is not None:
            found = sums.result().view(number, sizes.height, sizes.width, sizes.channels)
            grad_input[some].copy_(found.permute(0, 3, 1, 2))


def _by_weight(
    grad_output: Tensor,
    maps: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    sizes: _Sizes,
    border: str,
    grad_weight: Tensor,
) -> None:
    groups = sizes.channels // sizes.group_channels
    sizes = sizes._replace(segments=sizes.group_channels // sizes.segment)
    tiles = _tiles(sizes, maps.dtype)
    row_tiles = triton.cdiv(sizes.rows, tiles.rows)
    programs = (
        *(groups, sizes.taps, sizes.segments),
        *(triton.cdiv(sizes.segment, tiles.channels), triton.cdiv(sizes.group_out, tiles.out)),
    )
    splits = max(1, min(row_tiles, 512 // math.prod(programs), _MOST_PARTIAL // weight.numel()))
    tiles_of_split = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, tiles_of_split)
    partial = torch.empty(
        (splits, groups, sizes.taps, sizes.group_channels, sizes.group_out),
        dtype=torch.promote_types(maps.dtype, torch.float32),
        device=maps.device,
    )
    _backward_weight[(math.prod(programs), splits)](
        *(grad_output, maps, offset, offset if mask is None else mask, partial),
        *sizes,
        *_strides(grad_output),
        *(groups, tiles_of_split),
        MODULATED=mask is not None,
        MSRA=border == "msra2017",
        WIDE=_wide(maps, grad_output, offset),
        DTYPE=_arithmetic(maps.dtype),
        PRECISION=_precision(maps.dtype),
        BLOCK_M=tiles.rows,
        BLOCK_O=tiles.out,
        BLOCK_C=tiles.channels,
        num_warps=tiles.warps,  # pyright: ignore[reportCallIssue]
    )
    # [group, tap, C, O] as [group, O, C, tap].
    found = partial.sum(0).permute(0, 3, 2, 1)
    grad_weight.copy_(found.reshape(grad_weight.shape))


def _sizes(
    input: Tensor, offset: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> _Sizes:
    """All sizes, with one segment; how many a kernel runs through depends on the kernel."""
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    _, offset_channels, out_h, out_w = offset.shape
    taps = kernel_h * kernel_w
    offset_groups = offset_channels // (2 * taps)
    return _Sizes(
        *(batch * out_h * out_w, out_h * out_w, height, width, channels, out_w),
        *(group_channels, out_channels // (channels // group_channels), offset_groups),
        *(math.gcd(group_channels, channels // offset_groups), 1, taps, kernel_w),
        *(*stride, *padding, *dilation),
    )


def _tiles(sizes: _Sizes, dtype: torch.dtype) -> _Tiles:
    """Tiles that fit the problem; tl.dot wants at least 16 of everything."""

    def fitting(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    if dtype == torch.float64:
        return _Tiles(32, fitting(sizes.group_out, 32), 16, 4)
    rows = fitting(sizes.rows, 64)
    if dtype == torch.float32:
        return _Tiles(rows, fitting(sizes.group_out, 128), fitting(sizes.segment, 32), 4)
    out = fitting(sizes.group_out, 256)
    return _Tiles(rows, out, fitting(sizes.segment, 64), 8 if out == 256 else 4)


def _packed(weight: Tensor, groups: int) -> Tensor:
    """The weight as [group, tap, C, O]."""
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    split = weight.reshape(groups, out_channels // groups, group_channels, kernel_h * kernel_w)
    return split.permute(0, 3, 2, 1).contiguous()


def _strides(output: Tensor) -> tuple[int, int, int]:
    """From an image, a channel and a position of [N, C, Ho, Wo] to the next."""
    _, channels, height, width = output.shape
    # Not the tensor's own, which mean nothing along an axis of one.
    if output.is_contiguous():
        return channels * height * width, height * width, 1
    return channels * height * width, 1, channels


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in one of the two memory formats."""
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if channels_last else tensor.contiguous()


def _memory_format(input: Tensor) -> torch.memory_format:
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.numel() >= _NARROW for tensor in tensors)


def _arithmetic(dtype: torch.dtype) -> tl.dtype:
    """What positions are computed and products summed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _convolutions_in_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own switch for convolutions says."""
    if dtype == torch.float32 and _convolutions_in_tf32():
        return "tf32"
    return "ieee"
