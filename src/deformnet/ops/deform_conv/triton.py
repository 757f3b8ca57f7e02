"""Deformable convolution on a GPU: a product of matrices whose left side is sampled on the way.

One row of the left matrix is an output position, one column a channel under one tap of the kernel.
A tile of it is read from the map into registers and multiplied at once, so that it never lies in
memory. The backward pass samples again.

Letters: M = N*P rows, P = Ho*Wo output positions of an image, C channels, O output channels of a
group, K taps. A segment is a run of channels within one group and one offset group.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deformnet.ops.deform_conv import triton_narrow as narrow
from deformnet.ops.triton.sampling import cell, corner, corners, mix, positions_read, rows
from deformnet.ops.triton.sums import Sums, add, deterministic, largest_finite

Pair = tuple[int, int]

# Numbers in a buffer for the sums of a gradient that is not summed in place.
_MOST_SUMS = 2**26
# Numbers in the partial sums of the gradient of the weight.
_MOST_PARTIAL = 2**24
# From this size on a place in a tensor is counted in 64 bits.
_LEAST_WIDE = 2**31
# Programs among which the gradient of the weight is split: a few for each multiprocessor.
_PROGRAMS = 512


@triton.jit
def _forward(
    input, offset, mask, weight, bias, output,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    segment, segments, output_image, output_channel, output_position,
    MODULATED: tl.constexpr, BIAS: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Neighbours share the rows, and so what they read of the map.
    tiles = tl.cdiv(group_out, BLOCK_O)
    program = tl.program_id(0)
    out_tile = program % tiles
    group = tl.program_id(1)
    real, image, position = rows(program // tiles, count, positions, BLOCK_M, WIDE)
    out = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    real_out = out < group_out
    lane = tl.arange(0, BLOCK_C)

    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=DTYPE)
    for tap in range(taps):
        for part in range(segments):
            first = group * group_channels + part * segment
            offset_group = first // (channels // offset_groups)
            y, x = positions_read(
                offset, image, position, real, offset_group, tap,
                offset_groups, taps, kernel_w, positions, out_w,
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
            )  # fmt: skip
            top, left, down, right, within, undefined = cell(y, x, height, width, MSRA)
            factor = y  # not read without a mask
            if MODULATED:
                factor = tl.load(
                    mask + ((image * offset_groups + offset_group) * taps + tap) * positions
                    + position, mask=real, other=0,
                ).to(DTYPE)  # fmt: skip
            for start in range(0, segment, BLOCK_C):
                within_segment = start + lane
                real_channel = within_segment < segment
                v00, v01, v10, v11 = corners(
                    input, image, top, left, within & real, first + within_segment, real_channel,
                    height, width, channels, DTYPE,
                )  # fmt: skip
                value = mix(v00, v01, v10, v11, down, right, undefined & real)
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
def _backward_sample(
    grad_output, weight, image, position, real, channel, real_channel, tap,
    group, taps, group_channels, group_out, output_image, output_channel, output_position,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient by what the tap has read, times its mask, through one group: [rows, channels]."""
    gradient = tl.zeros((BLOCK_M, BLOCK_C), dtype=DTYPE)
    row_of_weight = (group * taps + tap) * group_channels + (channel - group * group_channels)
    for start in range(0, group_out, BLOCK_O):
        out = start + tl.arange(0, BLOCK_O)
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
            weight + row_of_weight[None, :] * group_out + out[:, None],
            mask=real_channel[None, :] & real_out[:, None],
            other=0,
        )
        gradient = tl.dot(above, filters, gradient, input_precision=PRECISION, out_dtype=DTYPE)
    return gradient


@triton.jit
def _backward_positions(
    grad_output, input, offset, mask, weight, grad_offset, grad_mask, floats, integers, scale,
    count, positions, height, width, channels, out_w,
    group_channels, group_out, offset_groups, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    segment, segments, output_image, output_channel, output_position,
    MODULATED: tl.constexpr, MSRA: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr, BY_INPUT: tl.constexpr, BY_POSITION: tl.constexpr, FIXED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients by input, offset and mask: of one tap, in one offset group of `segments`.

    NARROW: as in `narrow`, the weight being laid out as there, the whole offset group one segment.
    """
    program = tl.program_id(0)
    tap = program % taps
    offset_group = tl.program_id(1)
    real, image, position = rows(program // taps, count, positions, BLOCK_M, WIDE)
    lane = tl.arange(0, BLOCK_C)
    y, x = positions_read(
        offset, image, position, real, offset_group, tap,
        offset_groups, taps, kernel_w, positions, out_w,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
    )  # fmt: skip
    top, left, down, right, within, undefined = cell(y, x, height, width, MSRA)
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
        for start in range(0, segment, BLOCK_C):
            within_segment = start + lane
            real_channel = within_segment < segment
            channel = first + within_segment
            if NARROW:
                gradient = narrow.backward_sample(
                    grad_output, weight, image, position, real, channel, real_channel, tap,
                    channels, group_channels, group_out,
                    output_image, output_channel, output_position, WIDE, DTYPE, BLOCK_M, BLOCK_C,
                )  # fmt: skip
            else:
                gradient = _backward_sample(
                    grad_output, weight, image, position, real, channel, real_channel, tap,
                    first // group_channels, taps, group_channels, group_out,
                    output_image, output_channel, output_position, WIDE, DTYPE, PRECISION,
                    BLOCK_M, BLOCK_O, BLOCK_C,
                )  # fmt: skip
            # Infinities times the zeros of channels that are not there.
            gradient = tl.where(real_channel[None, :], gradient, 0)

            if BY_POSITION:
                v00, v01, v10, v11 = corners(
                    input, image, top, left, within, channel, real_channel,
                    height, width, channels, DTYPE,
                )  # fmt: skip
                value = mix(v00, v01, v10, v11, down, right, undefined)
                value = tl.where(real_channel[None, :], value, 0)
                by_mask += tl.sum(gradient * value, axis=1)
                slope_y = (v10 - v00) * before[:, None] + (v11 - v01) * right[:, None]
                slope_x = (v01 - v00) * up[:, None] + (v11 - v10) * down[:, None]
                by_y += tl.sum(gradient * slope_y, axis=1)
                by_x += tl.sum(gradient * slope_x, axis=1)
            if BY_INPUT:
                if MODULATED:
                    gradient = gradient * factor[:, None]
                for k in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
                    share_y = down if k >= 2 else up
                    share_x = right if k % 2 else before
                    to, inside = corner(
                        image, top + k // 2, left + k % 2, within, channel, real_channel,
                        height, width, channels,
                    )  # fmt: skip
                    share = gradient * (share_y * share_x)[:, None]
                    add(floats, integers, scale_of_sums, to, share, inside, FIXED)
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
    group_channels, group_out, offset_groups, taps, kernel_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    segment, segments, output_image, output_channel, output_position, groups, tiles_of_split,
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
        real, image, position = rows(tile, count, positions, BLOCK_M, WIDE)
        y, x = positions_read(
            offset, image, position, real, offset_group, tap,
            offset_groups, taps, kernel_w, positions, out_w,
            stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, DTYPE,
        )  # fmt: skip
        top, left, down, right, within, undefined = cell(y, x, height, width, MSRA)
        v00, v01, v10, v11 = corners(
            input, image, top, left, within & real, first + within_segment, real_channel,
            height, width, channels, DTYPE,
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
    taps: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int

    @property
    def groups(self) -> int:
        return self.channels // self.group_channels

    @property
    def offset_group_channels(self) -> int:
        return self.channels // self.offset_groups

    @property
    def offset_group_out(self) -> int:
        """Output channels of an offset group that is whole groups."""
        return self.offset_group_channels // self.group_channels * self.group_out

    @property
    def segment(self) -> int:
        return math.gcd(self.group_channels, self.offset_group_channels)


class Tiles(NamedTuple):
    """How a kernel that multiplies matrices is launched."""

    rows: int
    out: int  # output channels
    channels: int
    warps: int
    stages: int  # how many rounds of a loop are under way at once


# By kernel and the bytes of a number; smaller problems take smaller tiles. NOT measured on a GPU:
# chosen so that on every card since compute capability 8.0 they fit into shared memory and, by what
# ptxas reports, nearly into registers. `python -m benchmarks.gpu --tiles` times these and others.
TILES = {
    "forward": {
        8: Tiles(32, 32, 16, warps=4, stages=2),
        4: Tiles(64, 128, 32, warps=8, stages=2),
        2: Tiles(64, 256, 64, warps=8, stages=2),
    },
    "positions": {
        8: Tiles(32, 16, 16, warps=4, stages=2),
        4: Tiles(64, 32, 32, warps=8, stages=2),
        2: Tiles(64, 64, 32, warps=8, stages=2),
    },
    "weight": {
        8: Tiles(32, 32, 16, warps=4, stages=2),
        4: Tiles(64, 128, 32, warps=8, stages=2),
        2: Tiles(64, 256, 64, warps=8, stages=2),
    },
}
# Numbers in a tile of the kernels in `narrow`, and its channels at most; not measured either.
_NARROW_TILE, _NARROW_CHANNELS = 512, 64
# The matrix unit wants 16 of everything, and for a group of fewer channels samples as many all the
# same. Up to so many products of a group, sampling anew for each of them takes no more.
_NARROW_PRODUCTS = 16


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
    tensors = (
        *(maps, offset, offset if mask is None else mask, _packed(weight, sizes)),
        *(offset if bias is None else bias.contiguous(), output),
    )
    constants = _constants(mask, border, maps, output, offset) | {"BIAS": bias is not None}
    with torch.cuda.device_of(input):
        if _is_narrow(sizes):
            tile = _narrow_tiles(sizes.offset_group_out)
            tiles = triton.cdiv(sizes.offset_group_out, tile.out)
            tiles *= triton.cdiv(sizes.rows, tile.rows)
            narrow.forward[(tiles, sizes.offset_groups)](
                *tensors,
                *sizes,
                *_strides(output),
                **constants,
                BLOCK_M=tile.rows,
                BLOCK_O=tile.out,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
                num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
            )
        else:
            tile = _tiles("forward", sizes, input.dtype)
            tiles = triton.cdiv(sizes.rows, tile.rows) * triton.cdiv(sizes.group_out, tile.out)
            _forward[(tiles, sizes.groups)](
                *tensors,
                *sizes,
                *(sizes.segment, sizes.group_channels // sizes.segment, *_strides(output)),
                **constants,
                PRECISION=_precision(input.dtype),
                BLOCK_M=tile.rows,
                BLOCK_O=tile.out,
                BLOCK_C=tile.channels,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
                num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
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
    packed = _packed(weight, sizes)
    if _is_narrow(sizes):
        tile = _narrow_tiles(sizes.offset_group_channels)
        segment = sizes.offset_group_channels
    else:
        tile = _tiles("positions", sizes, maps.dtype)
        segment = sizes.segment
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
        grid = (triton.cdiv(count, tile.rows) * sizes.taps, sizes.offset_groups)
        _backward_positions[grid](
            *(above, maps[some], offset[some], offset if mask is None else mask[some], packed),
            offset if grad_offset is None else grad_offset[some],
            offset if grad_mask is None else grad_mask[some],
            *((offset, offset, offset) if sums is None else sums.tensors),
            *sizes._replace(rows=count),
            *(segment, sizes.offset_group_channels // segment, *_strides(above)),
            **_constants(mask, border, maps, grad_output, offset),
            NARROW=_is_narrow(sizes),
            BY_INPUT=sums is not None,
            BY_POSITION=grad_offset is not None,
            FIXED=sums is not None and sums.fixed,
            PRECISION=_precision(maps.dtype),
            BLOCK_M=tile.rows,
            BLOCK_O=tile.out,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
            num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
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
    narrowly = _is_narrow(sizes)
    if narrowly:
        tile = _narrow_tiles(sizes.offset_group_out)
        programs = sizes.offset_groups * sizes.taps * sizes.group_channels
        programs *= triton.cdiv(sizes.offset_group_out, tile.out)
    else:
        tile = _tiles("weight", sizes, maps.dtype)
        programs = sizes.groups * sizes.taps * (sizes.group_channels // sizes.segment)
        programs *= triton.cdiv(sizes.segment, tile.channels)
        programs *= triton.cdiv(sizes.group_out, tile.out)
    row_tiles = triton.cdiv(sizes.rows, tile.rows)
    splits = max(1, min(row_tiles, _PROGRAMS // programs, _MOST_PARTIAL // weight.numel()))
    tiles_of_split = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, tiles_of_split)
    # One weight after another, as `_packed` lays them out.
    partial = torch.empty(
        (splits, weight.numel()),
        dtype=torch.promote_types(maps.dtype, torch.float32),
        device=maps.device,
    )
    tensors = grad_output, maps, offset, offset if mask is None else mask, partial
    constants = _constants(mask, border, maps, grad_output, offset)
    if narrowly:
        narrow.backward_weight[(programs, splits)](
            *tensors,
            *sizes,
            *(*_strides(grad_output), tiles_of_split),
            **constants,
            BLOCK_M=tile.rows,
            BLOCK_O=tile.out,
            num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
            num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
        )
    else:
        _backward_weight[(programs, splits)](
            *tensors,
            *sizes,
            *(sizes.segment, sizes.group_channels // sizes.segment),
            *(*_strides(grad_output), sizes.groups, tiles_of_split),
            **constants,
            PRECISION=_precision(maps.dtype),
            BLOCK_M=tile.rows,
            BLOCK_O=tile.out,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
            num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
        )
    grad_weight.copy_(_unpacked(partial.sum(0), weight.shape, sizes))


def _sizes(
    input: Tensor, offset: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> _Sizes:
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    _, offset_channels, out_h, out_w = offset.shape
    taps = kernel_h * kernel_w
    return _Sizes(
        *(batch * out_h * out_w, out_h * out_w, height, width, channels, out_w),
        *(group_channels, out_channels // (channels // group_channels)),
        *(offset_channels // (2 * taps), taps, kernel_w, *stride, *padding, *dilation),
    )


def _is_narrow(sizes: _Sizes) -> bool:
    """Whether groups are too narrow for the matrix unit; each then has one offset group."""
    products = sizes.group_channels * sizes.group_out
    return products <= _NARROW_PRODUCTS and sizes.segment == sizes.group_channels


def _narrow_tiles(columns: int) -> Tiles:
    """Tiles of the kernels in `narrow`, whose columns are one kind of channels."""
    columns = min(_NARROW_CHANNELS, triton.next_power_of_2(columns))
    return Tiles(_NARROW_TILE // columns, columns, columns, warps=4, stages=2)


def _tiles(kernel: str, sizes: _Sizes, dtype: torch.dtype) -> Tiles:
    """Tiles that fit the problem; tl.dot wants at least 16 of everything."""

    def fitting(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    most = TILES[kernel][dtype.itemsize]
    return Tiles(
        fitting(sizes.rows, most.rows),
        fitting(sizes.group_out, most.out),
        fitting(sizes.segment, most.channels),
        most.warps,
        most.stages,
    )


def _packed(weight: Tensor, sizes: _Sizes) -> Tensor:
    """The weight as the kernels read it: [group, tap, C, O], or [tap, C, all O]."""
    weight = weight.flatten(2)
    if _is_narrow(sizes):
        return weight.permute(2, 1, 0).contiguous()
    return weight.unflatten(0, (sizes.groups, -1)).permute(0, 3, 2, 1).contiguous()


def _unpacked(packed: Tensor, shape: torch.Size, sizes: _Sizes) -> Tensor:
    """The inverse of `_packed`, for a weight of this shape."""
    taps, group_channels = sizes.taps, sizes.group_channels
    if _is_narrow(sizes):
        weight = packed.view(taps, group_channels, -1).permute(2, 1, 0)
    else:
        weight = packed.view(sizes.groups, taps, group_channels, -1).permute(0, 3, 2, 1)
    return weight.reshape(shape)


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


def _constants(mask: Tensor | None, border: str, maps: Tensor, *others: Tensor) -> dict[str, Any]:
    """What all kernels are compiled for, and how."""
    return {
        "MODULATED": mask is not None,
        "MSRA": border == "msra2017",
        "WIDE": any(tensor.numel() >= _LEAST_WIDE for tensor in (maps, *others)),
        # What positions are computed and products summed in.
        "DTYPE": tl.float64 if maps.dtype == torch.float64 else tl.float32,
        # Said, because Triton is about to turn its default.
        "enable_fp_fusion": True,
    }


def _convolutions_in_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own switch for convolutions says."""
    if dtype == torch.float32 and _convolutions_in_tf32():
        return "tf32"
    return "ieee"
