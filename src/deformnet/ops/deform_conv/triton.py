"""Deformable convolution on a GPU: a matrix product whose left side is sampled on the fly.

Row m of the left matrix [M, K*C] is an output position, column (k, c) the value that tap k of the
kernel samples from channel c there; the right matrix [K*C, O] is the weight. A tile of the left
matrix is sampled into registers and multiplied at once, so that it never exists in memory. The
backward pass samples again.

- `_forward`: output. A program sums over all taps and channels of a group for one tile [rows, O].
- `_backward_positions`: gradients by input, offset and mask. A program has one tap of some rows.
- `_backward_weight`: gradient by weight. A program has one tile [C, O] of a tap, over some rows.
- `triton_narrow` has counterparts of the first and last for groups of one or a few channels.

What all have in common:

- Memory order. The map is read channels-last (NCHW input is copied), so that the channels of a
  tile are one vector of each of the four pixels. The weight is repacked, offset and mask are
  contiguous; the output is contiguous or channels-last, by `Strides`, its gradient channels-last.
- Out of the map, NaN. `sampling.cell` decides on floating-point positions; every load is masked,
  none is multiplied with zero instead. A NaN position gives NaN in the outputs that it feeds and
  in its own gradients. Columns beyond the last channel are zeroed before each product: there a NaN
  row would meet the zeros of weights that do not exist.
- Determinism. Only the gradient by input is summed by atomics, see `ops.triton.sums`. Everything
  else is written once, by one program, and has the same bits in every run.

Letters: N C H W, O output channels of a group, K taps, G offset groups, P = Ho*Wo, M = N*P. A
segment is a run of channels within one group and one offset group.
"""

# A tl.constexpr stands for its value, a NamedTuple with these fields.
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deformnet.ops._arguments import MOST, check_most, check_sides
from deformnet.ops.deform_conv import triton_narrow as narrow
from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.deform_conv.triton_geometry import (
    Options,
    Segments,
    Sizes,
    Strides,
    Tile,
    mask_read,
    outputs,
    positions_read,
    rows_of,
)
from deformnet.ops.deform_conv.triton_tiles import candidates
from deformnet.ops.triton import MOST_PROGRAMS, MOST_SECOND_PROGRAMS, devices, tuning
from deformnet.ops.triton.sampling import cell, corner, corners, mix
from deformnet.ops.triton.sums import Sums, add, deterministic, largest_finite, scale_of

# Numbers in a buffer for the sums of a gradient that is not summed in place.
_MOST_SUMS = 2**26
# Numbers in the partial sums of the gradient of the weight.
_MOST_PARTIAL = 2**24
# From this size on an index into a tensor takes 64 bits.
_LEAST_WIDE = 2**31
# Programs among which the gradient of the weight is split: a few for each multiprocessor.
_PROGRAMS = 512


@triton.jit
def _forward(
    input, offset, mask, weight, bias, output, sizes, segments, strides,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of the output, [TILE.rows, TILE.out], of one group.

    Grid: (tiles of rows x tiles of O, groups). Programs that differ only in their tile of O are
    neighbors, so that they find offsets and pixels in the cache. Each of them samples on its own:
    TILE.out is large, up to a whole group, for the sake of sampling less often.

    For each tap and segment, positions are computed once for all channels; then TILE.channels
    columns at a time are sampled and multiplied, [rows, channels] x [channels, O]. weight is
    [groups, K, O, C], contiguous: tl.dot's right operand is a dense block of it, transposed.
    """
    tiles = tl.cdiv(sizes.group_out, TILE.out)
    program = tl.program_id(0)
    out_tile = program % tiles
    group = tl.program_id(1)
    rows = rows_of(program // tiles, sizes, OPTIONS, TILE.rows)
    out = out_tile * TILE.out + tl.arange(0, TILE.out)
    real_out = out < sizes.group_out
    lane = tl.arange(0, TILE.channels)

    ROWS: tl.constexpr = TILE.rows
    OUT: tl.constexpr = TILE.out
    sums = tl.zeros((ROWS, OUT), dtype=OPTIONS.dtype)
    for tap in range(sizes.taps):
        for part in range(segments.number):
            first = group * sizes.group_channels + part * segments.length
            offset_group = first // sizes.offset_group_channels
            y, x = positions_read(offset, rows, offset_group, tap, sizes, OPTIONS)
            at = cell(y, x, rows.real, sizes, OPTIONS.msra)
            factor = y  # not read without a mask
            if mask is not None:
                factor = mask_read(mask, rows, offset_group, tap, sizes, OPTIONS)
            for start in range(0, segments.length, TILE.channels):
                within_segment = start + lane
                real_channel = within_segment < segments.length
                channel = first + within_segment
                values = corners(input, rows.image, at, channel, real_channel, sizes, OPTIONS.dtype)
                value = mix(values, at)
                if mask is not None:
                    value = value * factor[:, None]
                value = tl.where(real_channel[None, :], value, 0)
                row_of_weight = (group * sizes.taps + tap) * sizes.group_out + out
                filters = tl.load(
                    weight
                    + row_of_weight[None, :] * sizes.group_channels
                    + (part * segments.length + within_segment)[:, None],
                    mask=real_channel[:, None] & real_out[None, :],
                    other=0,
                )
                sums = tl.dot(
                    value.to(filters.dtype), filters, sums,
                    input_precision=OPTIONS.precision, out_dtype=OPTIONS.dtype,
                )  # fmt: skip
    channel = group * sizes.group_out + out
    if bias is not None:
        sums += tl.load(bias + channel, mask=real_out, other=0).to(OPTIONS.dtype)[None, :]
    tl.store(
        outputs(output, rows, channel, strides, OPTIONS),
        sums.to(output.dtype.element_ty),
        mask=rows.real[:, None] & real_out[None, :],
    )


@triton.jit
def _backward_sample(
    grad_output, weight, rows, channel, real_channel, tap, group, sizes, strides,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient by the value that each row has sampled under a tap, times its mask factor.

    A product [rows, O] x [O, channels] of one group: rows of grad_output times the tap's weight
    transposed, TILE.out output channels at a time.

    Returns:
        [TILE.rows, TILE.channels].
    """
    ROWS: tl.constexpr = TILE.rows
    CHANNELS: tl.constexpr = TILE.channels
    gradient = tl.zeros((ROWS, CHANNELS), dtype=OPTIONS.dtype)
    row_of_weight = (group * sizes.taps + tap) * sizes.group_channels
    row_of_weight += channel - group * sizes.group_channels
    for start in range(0, sizes.group_out, TILE.out):
        out = start + tl.arange(0, TILE.out)
        real_out = out < sizes.group_out
        out_channel = group * sizes.group_out + out
        above = tl.load(
            outputs(grad_output, rows, out_channel, strides, OPTIONS),
            mask=rows.real[:, None] & real_out[None, :],
            other=0,
        )
        filters = tl.load(
            weight + row_of_weight[None, :] * sizes.group_out + out[:, None],
            mask=real_channel[None, :] & real_out[:, None],
            other=0,
        )
        gradient = tl.dot(
            above, filters, gradient,
            input_precision=OPTIONS.precision, out_dtype=OPTIONS.dtype,
        )  # fmt: skip
    return gradient


@triton.jit
def _backward_positions(
    grad_output, input, offset, mask, weight, grad_offset, grad_mask, target,
    sizes, segments, strides, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients by input, offset and mask: of one tap of TILE.rows rows, in one offset group.

    Grid: (tiles of rows x K, G). The taps of the same rows are neighbors: they read the same part
    of grad_output, and add to overlapping parts of the map. A program has all channels of its
    offset group, since these share its offsets: it alone writes grad_offset and grad_mask, once.
    TILE.channels of them are in registers at a time, as the gradient of what has been sampled
    [rows, channels], the four corners, and what goes back to them; hence small tiles.

    The gradient by input goes to up to four pixels of each row. Other positions, taps and rows of
    the same tile meet there, so that it is added by atomics to `target`, the `Target` of a `Sums`
    with the map's shape, channels-last.

    What is not asked for is None: `target`; grad_offset, and grad_mask with it. With
    OPTIONS.narrow the weight is as in `triton_narrow`, and the offset group is one segment.
    """
    program = tl.program_id(0)
    tap = program % sizes.taps
    offset_group = tl.program_id(1)
    rows = rows_of(program // sizes.taps, sizes, OPTIONS, TILE.rows)
    lane = tl.arange(0, TILE.channels)
    y, x = positions_read(offset, rows, offset_group, tap, sizes, OPTIONS)
    at = cell(y, x, rows.real, sizes, OPTIONS.msra)
    up, before = 1 - at.down, 1 - at.right
    place = (rows.image * sizes.offset_groups + offset_group) * sizes.taps + tap
    factor = y  # not read without a mask
    if mask is not None:
        factor = mask_read(mask, rows, offset_group, tap, sizes, OPTIONS)

    ROWS: tl.constexpr = TILE.rows
    by_y = tl.zeros((ROWS,), dtype=OPTIONS.dtype)
    by_x = tl.zeros((ROWS,), dtype=OPTIONS.dtype)
    by_mask = tl.zeros((ROWS,), dtype=OPTIONS.dtype)
    scale = 1.0
    if target is not None:
        scale = scale_of(target)
    for part in range(segments.number):
        first = offset_group * sizes.offset_group_channels + part * segments.length
        for start in range(0, segments.length, TILE.channels):
            within_segment = start + lane
            real_channel = within_segment < segments.length
            channel = first + within_segment
            if OPTIONS.narrow:
                gradient = narrow.backward_sample(
                    grad_output, weight, rows, channel, real_channel, tap, sizes, strides,
                    OPTIONS, TILE,
                )  # fmt: skip
            else:
                gradient = _backward_sample(
                    grad_output, weight, rows, channel, real_channel, tap,
                    first // sizes.group_channels, sizes, strides, OPTIONS, TILE,
                )  # fmt: skip
            # Infinities times the zeros of channels that do not exist.
            gradient = tl.where(real_channel[None, :], gradient, 0)

            if grad_offset is not None:
                v = corners(input, rows.image, at, channel, real_channel, sizes, OPTIONS.dtype)
                value = tl.where(real_channel[None, :], mix(v, at), 0)
                by_mask += tl.sum(gradient * value, axis=1)
                slope_y = (v.v10 - v.v00) * before[:, None] + (v.v11 - v.v01) * at.right[:, None]
                slope_x = (v.v01 - v.v00) * up[:, None] + (v.v11 - v.v10) * at.down[:, None]
                by_y += tl.sum(gradient * slope_y, axis=1)
                by_x += tl.sum(gradient * slope_x, axis=1)
            if target is not None:
                if mask is not None:
                    gradient = gradient * factor[:, None]
                for k in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
                    weight_y = at.down if k >= 2 else up
                    weight_x = at.right if k % 2 else before
                    to, inside = corner(
                        rows.image, at.top + k // 2, at.left + k % 2, at.within,
                        channel, real_channel, sizes,
                    )  # fmt: skip
                    part_of_it = gradient * (weight_y * weight_x)[:, None]
                    add(target, scale, to, part_of_it, inside)
    if grad_offset is not None:
        if mask is not None:
            tl.store(
                grad_mask + place * sizes.positions + rows.position,
                by_mask.to(grad_mask.dtype.element_ty),
                mask=rows.real,
            )
            by_y, by_x = by_y * factor, by_x * factor
        # A value that stays the same has no slope, also where the gradient is not finite.
        varies_y, varies_x = at.within, at.within
        if OPTIONS.msra:
            varies_y = at.within & (y < sizes.height - 1)
            varies_x = at.within & (x < sizes.width - 1)
        by_y, by_x = tl.where(varies_y, by_y, 0), tl.where(varies_x, by_x, 0)
        dtype = grad_offset.dtype.element_ty
        by_y = tl.where(at.undefined, float("nan"), by_y).to(dtype)
        by_x = tl.where(at.undefined, float("nan"), by_x).to(dtype)
        to_y = grad_offset + 2 * place * sizes.positions + rows.position
        to_x = grad_offset + (2 * place + 1) * sizes.positions + rows.position
        tl.store(to_y, by_y, mask=rows.real)
        tl.store(to_x, by_x, mask=rows.real)


@triton.jit
def _backward_weight(
    grad_output, input, offset, mask, partial, sizes, segments, strides, groups, tiles_of_split,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient by the weight: one tile [TILE.channels, TILE.out] of a tap, over one split of rows.

    Grid: (groups x K x segments x tiles of a segment x tiles of O, splits). A program goes through
    `tiles_of_split` tiles of rows and sums [channels, rows] x [rows, O] in registers: what it has
    sampled, transposed, times grad_output. There are few tiles of the weight and many rows, hence
    the splits. Each writes its own part of partial, [split, groups, K, C, O], and PyTorch sums
    over the splits: no atomics, deterministic.
    """
    out_tiles = tl.cdiv(sizes.group_out, TILE.out)
    channel_tiles = tl.cdiv(segments.length, TILE.channels)
    program = tl.program_id(0)
    out = (program % out_tiles) * TILE.out + tl.arange(0, TILE.out)
    program = program // out_tiles
    within_segment = (program % channel_tiles) * TILE.channels + tl.arange(0, TILE.channels)
    program = program // channel_tiles
    part = program % segments.number
    program = program // segments.number
    tap = program % sizes.taps
    group = program // sizes.taps
    split = tl.program_id(1)
    real_out, real_channel = out < sizes.group_out, within_segment < segments.length
    first = group * sizes.group_channels + part * segments.length
    offset_group = first // sizes.offset_group_channels
    channel, out_channel = first + within_segment, group * sizes.group_out + out

    CHANNELS: tl.constexpr = TILE.channels
    OUT: tl.constexpr = TILE.out
    sums = tl.zeros((CHANNELS, OUT), dtype=OPTIONS.dtype)
    # Rounded up without overflow, even for the largest number of rows.
    tiles = (sizes.rows - 1) // TILE.rows + 1
    last = tl.minimum((split + 1) * tiles_of_split, tiles)
    for tile in range(split * tiles_of_split, last):
        rows = rows_of(tile, sizes, OPTIONS, TILE.rows)
        y, x = positions_read(offset, rows, offset_group, tap, sizes, OPTIONS)
        at = cell(y, x, rows.real, sizes, OPTIONS.msra)
        value = mix(corners(input, rows.image, at, channel, real_channel, sizes, OPTIONS.dtype), at)
        if mask is not None:
            factor = mask_read(mask, rows, offset_group, tap, sizes, OPTIONS)
            value = value * factor[:, None]
        above = tl.load(
            outputs(grad_output, rows, out_channel, strides, OPTIONS),
            mask=rows.real[:, None] & real_out[None, :],
            other=0,
        )
        sums = tl.dot(
            tl.trans(value.to(above.dtype)), above, sums,
            input_precision=OPTIONS.precision, out_dtype=OPTIONS.dtype,
        )  # fmt: skip
    place = ((split * groups + group) * sizes.taps + tap) * sizes.group_channels
    place += part * segments.length
    tl.store(
        partial + (place + within_segment)[:, None] * sizes.group_out + out[None, :],
        sums,
        mask=real_channel[:, None] & real_out[None, :],
    )


# Numbers in a tile of the kernels in `triton_narrow`, and its maximum of channels; not measured.
_NARROW_TILE, _NARROW_CHANNELS = 512, 64
# Up to so many products of a group (input times output channels) sampling anew for each of them
# takes no more than filling the matrix unit, whose minimum is 16 channels.
_NARROW_PRODUCTS = 16


class _Call(NamedTuple):
    """One call: its tensors as the kernels read them, and what follows from their shapes."""

    maps: Tensor  # channels-last
    offset: Tensor  # contiguous
    mask: Tensor | None  # contiguous
    weight: Tensor
    sizes: Sizes
    narrow: bool
    msra: bool

    @classmethod
    def of(
        cls,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        geometry: Geometry,
    ) -> "_Call":
        sizes = _sizes(input, offset, weight, geometry)
        _check_sizes(input, weight, sizes)
        return cls(
            input.contiguous(memory_format=torch.channels_last),
            offset.contiguous(),
            None if mask is None else mask.contiguous(),
            weight,
            sizes,
            _is_narrow(sizes),
            geometry.border == "msra2017",
        )

    def images(self, some: slice) -> "_Call":
        """The call for some of the images."""
        maps, offset = self.maps[some], self.offset[some]
        mask = None if self.mask is None else self.mask[some]
        sizes = self.sizes._replace(rows=maps.shape[0] * self.sizes.positions)
        return self._replace(maps=maps, offset=offset, mask=mask, sizes=sizes)

    @property
    def tf32(self) -> bool:
        """Whether the matrix unit multiplies in tf32."""
        return self.maps.dtype == torch.float32 and devices.uses_tf32(*devices.target())

    @property
    def wide(self) -> bool:
        """Whether indices into tensors are int64."""
        outputs = self.sizes.rows * self.weight.shape[0]
        return max(self.maps.numel(), outputs, self.offset.numel()) >= _LEAST_WIDE

    def launch(self, kernel: Any, grid: tuple[int, int], tile: Tile, *arguments: Any) -> None:
        """Run a kernel."""
        check_most("offset", "tiles of positions", grid[0], MOST_PROGRAMS)
        dtype = self.maps.dtype
        kernel[grid](
            *arguments,
            OPTIONS=Options(
                msra=self.msra,
                wide=self.wide,
                narrow=self.narrow,
                dtype=tl.float64 if dtype == torch.float64 else tl.float32,
                precision="tf32" if self.tf32 else "ieee",
            ),
            TILE=tile,
            num_warps=tile.warps,
            num_stages=tile.stages,
            # Explicit, since Triton is about to change its default.
            enable_fp_fusion=True,
        )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Forward pass; the arguments are checked.

    Returns:
        [N, C_out, Ho, Wo], channels-last if `input` is.
    """
    output = torch.empty(
        (input.shape[0], weight.shape[0], *offset.shape[2:]),
        dtype=input.dtype,
        device=input.device,
        memory_format=_memory_format(input),
    )
    if output.numel() == 0:
        return output
    call = _Call.of(input, offset, weight, mask, geometry)
    sizes, strides = call.sizes, _strides(output)
    bias = None if bias is None else bias.contiguous()
    packed = _packed(call) if call.narrow else _packed_by_output(call)
    tensors = call.maps, call.offset, call.mask, packed, bias, output
    with devices.on_device_of(input):
        if call.narrow:
            tile = _narrow_tile(sizes.offset_group_out)
            tiles = triton.cdiv(sizes.offset_group_out, tile.out) * triton.cdiv(
                sizes.rows, tile.rows
            )
            grid = tiles, sizes.offset_groups
            call.launch(narrow.forward, grid, tile, *tensors, sizes, strides)
        else:
            segments = _segments(sizes, sizes.group_channels)

            def run(tile: Tile) -> None:
                tiles = triton.cdiv(sizes.rows, tile.rows) * triton.cdiv(sizes.group_out, tile.out)
                grid = tiles, _groups(sizes)
                call.launch(_forward, grid, tile, *tensors, sizes, segments, strides)

            run(_tile("forward", call, run))
    return output


def deform_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, offset, weight, bias and mask, as far as `needs` says True."""
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = needs
    needs_positions = needs_offset or needs_mask
    grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
    # An empty batch runs no kernel: its gradients are zero.
    make = torch.zeros_like if grad_output.numel() == 0 else torch.empty_like
    contiguous = torch.contiguous_format
    grad_input = make(input, memory_format=_memory_format(input)) if needs_input else None
    grad_offset = make(offset, memory_format=contiguous) if needs_positions else None
    grad_weight = make(weight, memory_format=contiguous) if needs_weight else None
    grad_mask = None
    if mask is not None and needs_positions:
        grad_mask = make(mask, memory_format=contiguous)
    if grad_output.numel() > 0:
        call = _Call.of(input, offset, weight, mask, geometry)
        # Read again for every tap, as [positions, channels]: one copy is cheaper.
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        with devices.on_device_of(input):
            if needs_input or needs_positions:
                _by_input_and_positions(call, grad_output, grad_input, grad_offset, grad_mask)
            if grad_weight is not None:
                grad_weight.copy_(_by_weight(call, grad_output))
    return (
        grad_input,
        grad_offset if needs_offset else None,
        grad_weight,
        grad_bias,
        grad_mask if needs_mask else None,
    )


def _by_input_and_positions(
    call: _Call,
    grad_output: Tensor,
    grad_input: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
) -> None:
    """Fills the gradients of input, offset and mask, as far as they are given.

    The map's gradient is summed in float32 or better, channels-last, and deterministic sums are
    integers. Where that is a buffer beside the gradient, images go through it a few at a time.
    """
    batch, height, width, channels = call.maps.permute(0, 2, 3, 1).shape
    packed, largest, step = _packed(call), None, batch
    dtype = torch.promote_types(call.maps.dtype, torch.float32)
    if grad_input is not None:
        largest = _largest_addend(call, grad_output) if deterministic() else None
        if largest is not None or dtype != call.maps.dtype:
            step = min(batch, max(1, _MOST_SUMS // (height * width * channels)))

    def launch(some: slice, tile: Tile) -> Sums | None:
        sums = None
        if grad_input is not None:
            # Each position reads a pixel at most once under each tap.
            most = call.sizes.taps * call.sizes.positions
            shape = (some.stop - some.start, height, width, channels)
            sums = Sums(shape, dtype, call.maps.device, largest, most)
        _launch_positions(
            call.images(some),
            tile,
            grad_output[some],
            packed,
            None if grad_offset is None else grad_offset[some],
            None if grad_mask is None else grad_mask[some],
            sums,
        )
        return sums

    if call.narrow:
        tile = _narrow_tile(call.sizes.offset_group_channels)
    else:
        some = slice(0, step)
        given = grad_input is not None, grad_offset is not None
        tile = _tile("positions", call.images(some), lambda tile: launch(some, tile), *given)
    for first in range(0, batch, step):
        some = slice(first, min(first + step, batch))
        sums = launch(some, tile)
        if grad_input is not None and sums is not None:
            grad_input[some].copy_(sums.result().permute(0, 3, 1, 2))


def _largest_addend(call: _Call, grad_output: Tensor) -> Tensor:
    """Upper bound of what is added to a pixel at once, [] in float64."""
    # A sum over the output channels of a group, of gradient times weight.
    weights = torch.where(call.weight.isfinite(), call.weight, 0).double().abs().sum(0)
    largest = largest_finite(grad_output) * largest_finite(weights)
    return largest if call.mask is None else largest * largest_finite(call.mask)


def _launch_positions(
    call: _Call,
    tile: Tile,
    grad_output: Tensor,
    packed: Tensor,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    sums: Sums | None,
) -> None:
    sizes, in_offset_group = call.sizes, call.sizes.offset_group_channels
    if call.narrow:
        segments = Segments(in_offset_group, 1)
    else:
        segments = _segments(sizes, in_offset_group)
    grid = triton.cdiv(sizes.rows, tile.rows) * sizes.taps, sizes.offset_groups
    call.launch(
        *(_backward_positions, grid, tile),
        *(grad_output, call.maps, call.offset, call.mask, packed, grad_offset, grad_mask),
        *(None if sums is None else sums.target, sizes, segments, _strides(grad_output)),
    )


def _by_weight(call: _Call, grad_output: Tensor) -> Tensor:
    """The gradient of the weight."""
    if call.narrow:
        tile = _narrow_tile(call.sizes.offset_group_out)
    else:
        tile = _tile("weight", call, lambda tile: _launch_weight(call, tile, grad_output))
    return _unpacked(_launch_weight(call, tile, grad_output).sum(0), call)


def _launch_weight(call: _Call, tile: Tile, grad_output: Tensor) -> Tensor:
    """Partial sums of the weight gradient, [splits, numel], each laid out like `_packed`."""
    sizes, segments = call.sizes, _segments(call.sizes, call.sizes.group_channels)
    if call.narrow:
        programs = sizes.offset_groups * sizes.taps * sizes.group_channels
        programs *= triton.cdiv(sizes.offset_group_out, tile.out)
    else:
        programs = _groups(sizes) * sizes.taps * segments.number
        programs *= triton.cdiv(segments.length, tile.channels)
        programs *= triton.cdiv(sizes.group_out, tile.out)
    row_tiles, weights = triton.cdiv(sizes.rows, tile.rows), call.weight.numel()
    check_most("offset", "tiles of positions", row_tiles, MOST_PROGRAMS)
    splits = max(1, min(row_tiles, _PROGRAMS // programs, _MOST_PARTIAL // weights))
    tiles_of_split = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, tiles_of_split)
    dtype = torch.promote_types(call.maps.dtype, torch.float32)
    partial = torch.empty((splits, weights), dtype=dtype, device=call.maps.device)
    tensors = grad_output, call.maps, call.offset, call.mask, partial
    grid, strides = (programs, splits), _strides(grad_output)
    if call.narrow:
        arguments = *tensors, sizes, strides, tiles_of_split
        call.launch(narrow.backward_weight, grid, tile, *arguments)
    else:
        arguments = *tensors, sizes, segments, strides, _groups(sizes), tiles_of_split
        call.launch(_backward_weight, grid, tile, *arguments)
    return partial


def _sizes(input: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry) -> Sizes:
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    _, offset_channels, out_h, out_w = offset.shape
    taps = kernel_h * kernel_w
    offset_groups = offset_channels // (2 * taps)
    in_offset_group = channels // offset_groups
    group_out = out_channels // (channels // group_channels)
    return Sizes(
        *(batch * out_h * out_w, out_h * out_w, height, width, channels, out_w),
        *(group_channels, group_out, offset_groups),
        *(in_offset_group, in_offset_group // group_channels * group_out, taps, kernel_w),
        *(*geometry.stride, *geometry.padding, *geometry.dilation),
    )


def _check_sizes(input: Tensor, weight: Tensor, sizes: Sizes) -> None:
    """Check sizes that the kernels store as 32-bit integers even with 64-bit indices, and grids."""
    check_sides(input)
    # Also bounds the channels and groups, of which there are not more.
    check_most("weight", "elements", weight.numel(), MOST)
    check_most("offset", "offset groups", sizes.offset_groups, MOST_SECOND_PROGRAMS)
    if not _is_narrow(sizes):
        check_most("weight", "groups", _groups(sizes), MOST_SECOND_PROGRAMS)


def _groups(sizes: Sizes) -> int:
    return sizes.channels // sizes.group_channels


def _segments(sizes: Sizes, channels: int) -> Segments:
    """The segments of a group, or offset group, of so many channels."""
    length = math.gcd(sizes.group_channels, sizes.offset_group_channels)
    return Segments(length, channels // length)


def _is_narrow(sizes: Sizes) -> bool:
    """Whether groups are too narrow for the matrix unit; each then has one offset group."""
    whole = sizes.offset_group_channels % sizes.group_channels == 0
    return whole and sizes.group_channels * sizes.group_out <= _NARROW_PRODUCTS


def _narrow_tile(columns: int) -> Tile:
    """The tile of a kernel in `triton_narrow`, whose columns are channels of one kind."""
    columns = min(_NARROW_CHANNELS, triton.next_power_of_2(columns))
    warps = devices.warps_of_32(4)
    return Tile(_NARROW_TILE // columns, columns, columns, warps, stages=2)


def _tile(kernel: str, call: _Call, run: Callable[[Tile], object], *gradients: bool) -> Tile:
    """The fastest tile of a kernel for problems like this one, or the default tile.

    Args:
        gradients: which gradients are asked for, of a kernel that leaves out the others.
    """
    sizes, dtype = call.sizes, call.maps.dtype
    if dtype.itemsize == 2:
        precision = "half"
    else:
        precision = "tf32" if call.tf32 else str(dtype).removeprefix("torch.")
    length = _segments(sizes, sizes.channels).length
    # Maps of similar sizes share a choice.
    rows = triton.next_power_of_2(sizes.rows)
    kind = devices.kind_of(*devices.target())
    tiles = candidates(kind, kernel, precision, rows, sizes.group_out, length)
    # Bias and the output's memory format change only the end of a kernel.
    code = call.mask is not None, call.msra, call.wide, *gradients
    groups = sizes.group_channels, sizes.group_out, sizes.offset_groups
    shape = "x".join(map(str, (rows, sizes.taps, sizes.channels, *groups)))
    problem = f"{kernel} {precision} {shape} {''.join(str(int(flag)) for flag in code)}"
    return tuning.fastest(call.maps, problem, tiles, run)


def _packed_by_output(call: _Call) -> Tensor:
    """The weight as the forward kernel reads it: [groups, K, O, C].

    Both operands of tl.dot are then contiguous along the summed dimension, as the matrix unit of
    NVIDIA GPUs since compute capability 9.0 requires in tf32; otherwise, elements are loaded one
    by one.
    """
    weight = call.weight.flatten(2).unflatten(0, (_groups(call.sizes), -1))
    return weight.permute(0, 3, 1, 2).contiguous()


def _packed(call: _Call) -> Tensor:
    """The weight as the other kernels read it: [groups, K, C, O], or [K, C, all O] if narrow."""
    weight = call.weight.flatten(2)
    if call.narrow:
        return weight.permute(2, 1, 0).contiguous()
    return weight.unflatten(0, (_groups(call.sizes), -1)).permute(0, 3, 2, 1).contiguous()


def _unpacked(packed: Tensor, call: _Call) -> Tensor:
    """The inverse of `_packed`."""
    taps, group_channels = call.sizes.taps, call.sizes.group_channels
    if call.narrow:
        weight = packed.view(taps, group_channels, -1).permute(2, 1, 0)
    else:
        groups = _groups(call.sizes)
        weight = packed.view(groups, taps, group_channels, -1).permute(0, 3, 2, 1)
    return weight.reshape(call.weight.shape)


def _strides(output: Tensor) -> Strides:
    """Of [N, O, Ho, Wo] in one of the two memory formats."""
    _, channels, height, width = output.shape
    # Not the tensor's own, which are arbitrary along an axis of size one.
    if output.is_contiguous():
        return Strides(channels * height * width, height * width, 1)
    return Strides(channels * height * width, 1, channels)


def _memory_format(input: Tensor) -> torch.memory_format:
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
