"""Deformable RoI pooling on a GPU, plain and position-sensitive.

The samples of a bin lie on a grid, and bilinear weights are products of one factor for each axis.
So a bin is a sum over the pixels of some rows and columns of the map, with a weight for each row
and one for each column. The kernels walk along y, and within that along x, sample by sample;
consecutive samples that fall between the same two pixels are merged into the weights of these. A
pixel is read, or added to, once all samples that it has a part in are known, and so once, however
many samples there are.

- `_forward`: output. A program has one tile of bins x channels.
- `_backward`: gradients by input and offset. A program has all channels of its bins, in turns.

What both have in common:

- Tiles. Rows of a tile are bins, of all boxes and groups; columns are channels of a group. What is
  the same for all channels (positions, weights, state) is [bins, 1]. A tile has 256 numbers: as
  many channels as there are, since these are read as vectors, and the rest in bins. Every bin sums
  its samples in their own order, so that the bits of a mean do not depend on the tile.
- Memory order. The map is [N, planes, H, W, C]: channels-last, and where position-sensitive a plane
  for each of the K bins, so that all channels of a bin are neighbors. Boxes, offset, output and
  its gradient are contiguous.
- Positions are those of the reference to the last bit, so that both agree on what is inside the map
  and in which cell: they are computed in float64, and the kernels are compiled without contraction
  of products and sums. Weights and sums are float32, or float64 for float64 maps.
- Out of the map, NaN. Samples outside are decided on float64 positions and masked; no NaN or huge
  number becomes an address. A NaN offset, a box with a coordinate that is not finite, or one of an
  image that does not exist has no samples, and its bins are NaN.
- Determinism. Only the gradient by input is summed by atomics, see `ops.triton.sums`. Everything
  else is written once, by one program, and has the same bits in every run.

Letters: R boxes, G offset groups, N C H W the map, with C the channels of the output, ph pw bins of
a box, K = ph*pw, B = R*K*G bins of all boxes and groups.
"""

# A tl.constexpr stands for its value, a NamedTuple with these fields.
# pyright: reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deformnet.ops._arguments import MOST, check_most, check_sides
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.roi_pool.parts import of_bins, of_parts
from deformnet.ops.triton import MOST_PROGRAMS, MOST_SECOND_PROGRAMS, devices
from deformnet.ops.triton.sums import Sums, add, deterministic, largest_finite, scale_of

# Numbers in a buffer for the sums of a gradient that is not summed in place.
_MOST_SUMS = 2**26
# From this size on an index into a tensor takes 64 bits.
_LEAST_WIDE = 2**31
# Numbers in the tile of a program, its maximum of channels, too; and its maximum of bins.
_TILE = 256
_MOST_BINS = 128

# Triton 3.6 and 3.7 reduce tensors that a loop carries as they were before the loop.
_SKIPS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)

# The cell of a bin that has had no sample yet, or all of them: it and the next lie on no map.
_NOWHERE = tl.constexpr(-4)


class _Sizes(NamedTuple):
    """The call, in numbers that kernels are compiled for: being 1, or divisible by 16."""

    channels: int  # C
    group_channels: int
    groups: int  # G
    planes: int  # of the map for each channel: K where position-sensitive, or 1
    ph: int
    pw: int


class _Extent(NamedTuple):
    """The call, in numbers that vary from image to image; no kernel is compiled for their values.

    Kernels take them one by one: Triton heeds `do_not_specialize` for arguments, not for fields.
    """

    every_bin: int  # B
    batch: int  # N
    height: int  # H
    width: int  # W
    samples: int  # along each axis of a bin, where the rule does not adapt


class _Options(NamedTuple):
    """What kernels are compiled for, in addition to tiles."""

    sampling: str
    adapts: bool  # whether the number of samples depends on the size of the box
    wide: bool  # indices into tensors are int64
    dtype: tl.dtype  # of weights and sums
    skips: bool  # whether samples that complete no row of pixels cost no loop along x


class _Tile(NamedTuple):
    """The tile of a program; bins and channels are powers of two."""

    bins: int
    channels: int
    warps: int


class _Axis(NamedTuple):
    """Samples along one axis, [bins, 1] each: sample s lies at start + (first + s) * step."""

    start: Any  # NaN if the bin is undefined
    step: Any
    first: Any  # the first sample that can lie on the map
    needed: Any  # how many to take from there


class _Bins(NamedTuple):
    """The bins of a program, [bins, 1] each."""

    real: Any  # whether there is such a bin; beyond the last one the first is computed again
    box: Any
    group: Any
    bin: Any  # among the K of its box
    image: Any  # int64 in wide kernels; the first image for a box of none
    box_height: Any  # in pixels of the map
    box_width: Any
    y: Any  # _Axis
    x: Any
    number: Any  # of samples that the mean is over


class _Run(NamedTuple):
    """Samples along one axis between the pixels `cell` and `cell + 1`, [bins, 1] each."""

    cell: Any
    low: Any  # summed weight of the pixel `cell`
    high: Any  # of the pixel `cell + 1`
    low_slope: Any  # derivatives of the weights by the position
    high_slope: Any


@triton.jit
def _finite(x):
    return (x - x) == 0


@triton.jit
def _round(x):
    """Rounds to whole numbers, halves away from zero."""
    whole = tl.where(x < 0, tl.ceil(x), tl.floor(x))
    rest = x - whole
    return whole + (rest >= 0.5).to(tl.float64) - (rest <= -0.5).to(tl.float64)


@triton.jit
def _axis(low, high, exists, bin, k, scale, samples, OPTIONS: tl.constexpr):
    """The sampling rule on one axis, for bin `bin` of k of a box from `low` to `high`.

    Returns:
        The size of the box; and start, step and number of the samples of its bin, sample s lying at
        start + s * step before the shift. An undefined box has the size NaN, starts at NaN and has
        no samples.
    """
    bin = bin.to(tl.float64)
    if OPTIONS.sampling == "bins":
        low, high = _round(low * scale), _round(high * scale)
        size = high - low + 1
        size = tl.where(size < 1, size * 0 + 1, size)
        first = tl.floor(bin * size / k)
        start = low + first
        step = start * 0 + 1
        number = tl.ceil((bin + 1) * size / k) - first
    elif OPTIONS.sampling == "msra":
        low, high = _round(low) * scale - 0.5, (_round(high) + 1) * scale - 0.5
        size = high - low
        size = tl.where(size < 0.1, tl.full(size.shape, 0.1, tl.float64), size)
        length = size / k
        start = low + bin * length
        step = length / samples
        number = length * 0 + samples
    else:
        low, high = low * scale - 0.5, high * scale - 0.5
        size = high - low
        length = size / k
        if OPTIONS.adapts:
            # A box turned inside out has no samples.
            number = tl.ceil(length)
            number = tl.where(number > 0, number, 0.0)
        else:
            number = length * 0 + samples
        step = length / tl.where(number < 1, number * 0 + 1, number)
        start = low + bin * length + step / 2
    # The size may hide an infinite side.
    defined = exists & _finite(low) & _finite(high) & _finite(size)
    size = tl.where(defined, size, float("nan"))
    start = tl.where(defined, start, float("nan"))
    return size, start, step, tl.where(defined, number, 0.0)


@triton.jit
def _on_map(start, step, number, length, OPTIONS: tl.constexpr):
    """The `_Axis` of those samples that can lie on a map of this length.

    They are at most a few more than the map has room for, so that a huge box ends quickly.
    """
    if OPTIONS.adapts:
        # One more at each end than lies within [-1, length], for the sake of rounding.
        divisor = tl.where(step > 0, step, 1.0)
        first = tl.floor((-1 - start) / divisor) - 1
        last = tl.floor((length - start) / divisor) + 1
        # Also where these are NaN, for which no comparison is true.
        first = tl.where((step > 0) & (first > 0), first, 0.0)
        first = tl.where(first < number, first, number)
        last = tl.where(step > 0, last, number)
        last = tl.where(last < number - 1, last, number - 1)
        most = length + 5 if OPTIONS.sampling == "bins" else 2 * length + 7
        needed = last - first + 1
        needed = tl.where(needed < most, needed, most)
    else:
        first = number * 0
        needed = number
    return _Axis(start, step, first, tl.where(needed > 0, needed, 0.0).to(tl.int32))


@triton.jit
def _inside(start, step, samples, length):
    """The number of a bin's samples that "msra" does not skip."""
    count = tl.zeros(start.shape, tl.float64)
    for s in range(samples):
        at = start + s * step
        count += ((at >= -0.5) & (at <= length - 0.5)).to(tl.float64)
    return count


@triton.jit
def _bins_of(
    boxes, offset, program, extent, sizes, scale, gamma,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The `_Bins` of a program; offset is None for plain pooling."""
    bins = sizes.ph * sizes.pw
    index = tl.arange(0, TILE.bins)[:, None]
    index += (program.to(tl.int64) if OPTIONS.wide else program) * TILE.bins
    real = index < extent.every_bin
    index = tl.where(real, index, 0)
    group = index % sizes.groups
    bin = (index // sizes.groups) % bins
    r = index // sizes.groups // bins

    image = tl.load(boxes + 5 * r, mask=real, other=0).to(tl.float64)
    x1 = tl.load(boxes + 5 * r + 1, mask=real, other=0).to(tl.float64)
    y1 = tl.load(boxes + 5 * r + 2, mask=real, other=0).to(tl.float64)
    x2 = tl.load(boxes + 5 * r + 3, mask=real, other=0).to(tl.float64)
    y2 = tl.load(boxes + 5 * r + 4, mask=real, other=0).to(tl.float64)
    # Checked here, since the host would have to wait for the GPU to see the boxes.
    exists = (image >= 0) & (image < extent.batch)
    image = tl.where(exists, image, 0.0).to(tl.int64 if OPTIONS.wide else tl.int32)

    box_height, y, y_step, y_number = _axis(
        y1, y2, exists, bin // sizes.pw, sizes.ph, scale, extent.samples, OPTIONS
    )
    box_width, x, x_step, x_number = _axis(
        x1, x2, exists, bin % sizes.pw, sizes.pw, scale, extent.samples, OPTIONS
    )
    if offset is not None:
        # The pair is (x, y).
        place = (r * sizes.groups + group) * 2 * bins + bin
        shift_x = tl.load(offset + place, mask=real, other=0).to(tl.float64)
        shift_y = tl.load(offset + place + bins, mask=real, other=0).to(tl.float64)
        x = x + gamma * shift_x * box_width
        y = y + gamma * shift_y * box_height
    y_axis = _on_map(y, y_step, y_number, extent.height, OPTIONS)
    x_axis = _on_map(x, x_step, x_number, extent.width, OPTIONS)
    if OPTIONS.sampling == "msra":
        number = _inside(y, y_step, extent.samples, extent.height)
        number = number * _inside(x, x_step, extent.samples, extent.width)
    else:
        number = y_number * x_number
    number = tl.where(number < 1, number * 0 + 1, number)
    return _Bins(real, r, group, bin, image, box_height, box_width, y_axis, x_axis, number)


@triton.jit
def _start(none):
    """The `_Run` before the first sample; `none` is zeros [bins, 1]."""
    return _Run(tl.full(none.shape, _NOWHERE, tl.int32), none, none, none, none)


@triton.jit
def _take(axis, s, length, run, OPTIONS: tl.constexpr):
    """Takes sample s of each bin, along one axis of a map of this length.

    Returns:
        Whether the pixels `run.cell` and `run.cell + 1` lie on the map and are done: this sample
        has no part in them. The run that this sample belongs to: the same one, or one that begins
        with it (and keeps the pixel that both share). Whether the weights change with the sample's
        position.
    """
    more = s < axis.needed
    at = axis.start + (axis.first + s) * axis.step
    if OPTIONS.sampling == "bins":
        # Equations 3-4: the map is zero outside.
        within = more & (at >= -1) & (at < length)
        moves = within
        at = tl.where(within, at, 0.0)
    else:
        if OPTIONS.sampling == "msra":
            within = more & (at >= -0.5) & (at <= length - 0.5)
        else:
            within = more & (at >= -1) & (at <= length)
        # Beyond the last pixel's center the value is the last pixel's.
        moves = within & (at >= 0) & (at < length - 1)
        at = tl.where(within & (at > 0), at, 0.0)
        end = (length - 1).to(tl.float64)
        at = tl.where(at < end, at, end)
    # From here on all positions are finite and small.
    whole = tl.floor(at)
    fraction = at - whole
    # A sample that is skipped changes nothing; after the last one every pixel is done.
    cell = run.cell
    new = tl.where(within, whole.to(tl.int32), tl.where(more, cell, _NOWHERE))
    same, next = new == cell, new == cell + 1
    low_done = (new != cell) & (cell >= 0) & (cell < length)
    high_done = (new != cell) & (new != cell + 1) & (cell + 1 >= 0) & (cell + 1 < length)

    dtype = OPTIONS.dtype
    slope = moves.to(dtype)
    low = tl.where(same, run.low, tl.where(next, run.high, 0))
    low += tl.where(within, 1 - fraction, 0.0).to(dtype)
    high = tl.where(same, run.high, 0) + tl.where(within, fraction, 0.0).to(dtype)
    low_slope = tl.where(same, run.low_slope, tl.where(next, run.high_slope, 0)) - slope
    high_slope = tl.where(same, run.high_slope, 0) + slope
    return low_done, high_done, _Run(new, low, high, low_slope, high_slope), moves


@triton.jit(do_not_specialize=_Extent._fields)
def _forward(
    input, boxes, offset, output,
    every_bin, batch, height, width, samples,
    scale: tl.float64, gamma: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    sizes, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The means of TILE.bins bins, in TILE.channels channels of their groups.

    Grid: (tiles of B, tiles of a group's channels). B counts groups fastest, then bins, then boxes.
    Both loops run as long as the bin of the tile that needs most; one sample more than `needed`
    flushes the last pixels. Every number of the output is written once: deterministic.

    `offset` is None for plain pooling. `scale` and `gamma` are not in a NamedTuple, where a float
    would be float32.
    """
    extent = _Extent(every_bin, batch, height, width, samples)
    bins = _bins_of(boxes, offset, tl.program_id(0), extent, sizes, scale, gamma, OPTIONS, TILE)
    real, y, x = bins.real, bins.y, bins.x
    lane = tl.program_id(1) * TILE.channels + tl.arange(0, TILE.channels)[None, :]
    real_lane = lane < sizes.group_channels
    channel = bins.group * sizes.group_channels + lane
    origin = (bins.image * sizes.planes + (bins.bin % sizes.planes)) * height * width
    right_of, below = sizes.channels, width.to(origin.dtype) * sizes.channels
    rows = tl.max(tl.where(real, y.needed + 1, 0))
    columns = tl.max(tl.where(real, x.needed + 1, 0))

    # Triton before 3.8 takes no field of a tl.constexpr in a shape.
    BINS: tl.constexpr = TILE.bins
    CHANNELS: tl.constexpr = TILE.channels
    none = tl.zeros((BINS, 1), OPTIONS.dtype)
    total = tl.zeros((BINS, CHANNELS), OPTIONS.dtype)
    across = _start(none)
    for i in range(rows):  # pyright: ignore[reportArgumentType]
        top_done, bottom_done, new_across, _moves_y = _take(y, i, height, across, OPTIONS)
        top_done, bottom_done = top_done & real, bottom_done & real
        along = _start(none)
        steps = columns
        if OPTIONS.skips:
            steps = tl.max(tl.where(top_done | bottom_done, columns, 0))
        for j in range(steps):  # pyright: ignore[reportArgumentType]
            left_done, right_done, new_along, _moves_x = _take(x, j, width, along, OPTIONS)
            pixel = origin + across.cell.to(origin.dtype) * width + along.cell
            at = input + pixel * sizes.channels + channel
            m00, m01 = top_done & left_done & real_lane, top_done & right_done & real_lane
            m10, m11 = bottom_done & left_done & real_lane, bottom_done & right_done & real_lane
            # Masked loads, not products with zero: the map may hold infinities and NaN.
            v00 = tl.load(at, mask=m00, other=0).to(OPTIONS.dtype)
            v01 = tl.load(at + right_of, mask=m01, other=0).to(OPTIONS.dtype)
            v10 = tl.load(at + below, mask=m10, other=0).to(OPTIONS.dtype)
            v11 = tl.load(at + below + right_of, mask=m11, other=0).to(OPTIONS.dtype)
            total += (v00 * along.low + v01 * along.high) * across.low
            total += (v10 * along.low + v11 * along.high) * across.high
            along = new_along
        across = new_across
    total = total / bins.number.to(OPTIONS.dtype)
    undefined = (y.start != y.start) | (x.start != x.start)
    total = tl.where(undefined, float("nan"), total)
    place = bins.box * (sizes.groups * sizes.group_channels) + channel
    place = place * (sizes.ph * sizes.pw) + bins.bin
    tl.store(output + place, total.to(output.dtype.element_ty), mask=real & real_lane)


@triton.jit(do_not_specialize=["first_image", "images", *_Extent._fields])
def _backward(
    grad_output, input, boxes, offset, grad_offset, target, first_image, images,
    every_bin, batch, height, width, samples,
    scale: tl.float64, gamma: tl.float64,  # pyright: ignore[reportInvalidTypeForm]
    sizes, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients by input and offset, of TILE.bins bins in all channels of their groups.

    Grid: (tiles of B,). The loops are those of `_forward`, anew for every TILE.channels channels;
    a program keeps the gradient by the offset of its bins over all of them, and alone writes it,
    once. A bin adds to each pixel that it has read, where it meets the bins of other boxes, groups
    and channels of none: atomics to `target`, the `Target` of a `Sums` [images, planes, H, W, C].

    What is not asked for is None: `target`, `grad_offset`. Of boxes, those of the images
    first_image .. first_image + images - 1 take part, `target` being of these.
    """
    extent = _Extent(every_bin, batch, height, width, samples)
    bins = _bins_of(boxes, offset, tl.program_id(0), extent, sizes, scale, gamma, OPTIONS, TILE)
    y, x, image = bins.y, bins.x, bins.image
    # Boxes of no image have a gradient by their offset, too, and are here those of the first.
    real = bins.real & (image >= first_image) & (image < first_image + images)
    plane = (bins.bin % sizes.planes) * height * width
    origin = image * sizes.planes * height * width + plane
    sums_origin = (image - first_image) * sizes.planes * height * width + plane
    right_of, below = sizes.channels, width.to(origin.dtype) * sizes.channels
    rows = tl.max(tl.where(real, y.needed + 1, 0))
    columns = tl.max(tl.where(real, x.needed + 1, 0))
    unit = 1.0
    if target is not None:
        unit = scale_of(target)

    # Triton before 3.8 takes no field of a tl.constexpr in a shape.
    BINS: tl.constexpr = TILE.bins
    CHANNELS: tl.constexpr = TILE.channels
    none = tl.zeros((BINS, 1), OPTIONS.dtype)
    by_y, by_x = none, none
    for first_lane in range(0, sizes.group_channels, TILE.channels):
        lane = first_lane + tl.arange(0, TILE.channels)[None, :]
        real_lane = lane < sizes.group_channels
        channel = bins.group * sizes.group_channels + lane
        place = bins.box * (sizes.groups * sizes.group_channels) + channel
        place = place * (sizes.ph * sizes.pw) + bins.bin
        gradient = tl.load(grad_output + place, mask=real & real_lane, other=0).to(OPTIONS.dtype)
        gradient = gradient / bins.number.to(OPTIONS.dtype)
        # The same for all channels of a bin, so that their atomics are vectorized.
        special = tl.max((gradient - gradient != 0).to(tl.int32), axis=1, keep_dims=True) != 0
        slope_y = tl.zeros((BINS, CHANNELS), OPTIONS.dtype)
        slope_x = tl.zeros((BINS, CHANNELS), OPTIONS.dtype)
        moved_y, moved_x = none > 0, none > 0

        across = _start(none)
        for i in range(rows):  # pyright: ignore[reportArgumentType]
            top_done, bottom_done, new_across, moves_y = _take(y, i, height, across, OPTIONS)
            top_done, bottom_done = top_done & real, bottom_done & real
            moved_y = moved_y | moves_y
            along = _start(none)
            steps = columns
            if OPTIONS.skips:
                steps = tl.max(tl.where(top_done | bottom_done, columns, 0))
            for j in range(steps):  # pyright: ignore[reportArgumentType]
                left_done, right_done, new_along, moves_x = _take(x, j, width, along, OPTIONS)
                moved_x = moved_x | moves_x
                pixel = across.cell.to(origin.dtype) * width + along.cell
                m00, m01 = top_done & left_done & real_lane, top_done & right_done & real_lane
                m10 = bottom_done & left_done & real_lane
                m11 = bottom_done & right_done & real_lane
                if grad_offset is not None:
                    at = input + (origin + pixel) * sizes.channels + channel
                    v00 = tl.load(at, mask=m00, other=0).to(OPTIONS.dtype)
                    v01 = tl.load(at + right_of, mask=m01, other=0).to(OPTIONS.dtype)
                    v10 = tl.load(at + below, mask=m10, other=0).to(OPTIONS.dtype)
                    v11 = tl.load(at + below + right_of, mask=m11, other=0).to(OPTIONS.dtype)
                    slope_y += (v00 * along.low + v01 * along.high) * across.low_slope
                    slope_y += (v10 * along.low + v11 * along.high) * across.high_slope
                    slope_x += (v00 * along.low_slope + v01 * along.high_slope) * across.low
                    slope_x += (v10 * along.low_slope + v11 * along.high_slope) * across.high
                if target is not None:
                    to = (sums_origin + pixel) * sizes.channels + channel
                    w00, w01 = across.low * along.low, across.low * along.high
                    w10, w11 = across.high * along.low, across.high * along.high
                    # For boxes on whole pixels, most weights are zero: skip their atomics, unless
                    # the result has to become NaN.
                    m00, m01 = m00 & ((w00 != 0) | special), m01 & ((w01 != 0) | special)
                    m10, m11 = m10 & ((w10 != 0) | special), m11 & ((w11 != 0) | special)
                    add(target, unit, to, gradient * w00, m00)
                    add(target, unit, to + right_of, gradient * w01, m01)
                    add(target, unit, to + below, gradient * w10, m10)
                    add(target, unit, to + below + right_of, gradient * w11, m11)
                along = new_along
            across = new_across
        if grad_offset is not None:
            # What does not move has no slope, also where the gradient is not finite.
            slope_y = tl.where(moved_y & real_lane, slope_y * gradient, 0)
            slope_x = tl.where(moved_x & real_lane, slope_x * gradient, 0)
            by_y += tl.sum(slope_y, axis=1, keep_dims=True)
            by_x += tl.sum(slope_x, axis=1, keep_dims=True)
    if grad_offset is not None:
        undefined = (y.start != y.start) | (x.start != x.start)
        grad_x = by_x.to(tl.float64) * bins.box_width * gamma
        grad_y = by_y.to(tl.float64) * bins.box_height * gamma
        grad_x = tl.where(undefined, float("nan"), grad_x)
        grad_y = tl.where(undefined, float("nan"), grad_y)
        place = (bins.box * sizes.groups + bins.group) * 2 * (sizes.ph * sizes.pw) + bins.bin
        dtype = grad_offset.dtype.element_ty
        tl.store(grad_offset + place, grad_x.to(dtype), mask=real)
        tl.store(grad_offset + place + sizes.ph * sizes.pw, grad_y.to(dtype), mask=real)


class _Call(NamedTuple):
    """One call: its tensors as the kernels read them, and what follows from their shapes."""

    boxes: Tensor  # contiguous
    shifts: Tensor | None  # offsets of all bins, contiguous
    sizes: _Sizes
    extent: _Extent
    rule: Rule
    tile: _Tile

    @classmethod
    def of(cls, input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> "_Call":
        batch, _, height, width = input.shape
        ph, pw = rule.output_size
        groups = 1 if offset is None else offset.shape[1] // 2
        channels = rule.out_channels(input)
        every_bin = boxes.shape[0] * ph * pw * groups
        tile = _tile(channels // groups)
        # Sizes that the kernels store as 32-bit integers even with 64-bit indices, and grids.
        check_sides(input)
        check_most("input", "channels", channels, MOST)
        most = MOST_SECOND_PROGRAMS * tile.channels
        check_most("input", "channels in an offset group", channels // groups, most)
        check_most("boxes", "bins in all offset groups", every_bin, MOST_PROGRAMS * tile.bins)
        return cls(
            boxes.contiguous(),
            None if offset is None else of_bins(offset, rule.output_size).contiguous(),
            _Sizes(channels, channels // groups, groups, _planes(rule), ph, pw),
            _Extent(every_bin, batch, height, width, rule.samples_per_bin),
            rule,
            tile,
        )

    def launch(
        self, kernel: Any, channel_tiles: int, tensors: tuple[Tensor, ...], *arguments: Any
    ) -> None:
        """Run a kernel; `tensors` are those that decide how wide an index is, beside its own."""
        rule, dtype = self.rule, tensors[0].dtype
        sized = (*tensors, self.boxes, *(() if self.shifts is None else (self.shifts,)))
        kernel[triton.cdiv(self.extent.every_bin, self.tile.bins), channel_tiles](
            *arguments,
            *self.extent,
            *(float(rule.spatial_scale), float(rule.gamma), self.sizes),
            OPTIONS=_Options(
                sampling=rule.sampling,
                adapts=rule.sampling == "bins" or rule.samples_per_bin == 0,
                wide=any(tensor.numel() >= _LEAST_WIDE for tensor in sized),
                dtype=tl.float64 if dtype == torch.float64 else tl.float32,
                skips=_SKIPS,
            ),
            TILE=self.tile,
            num_warps=devices.warps_of_32(self.tile.warps),
            enable_fp_fusion=False,
        )


def roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Tensor:
    """Forward pass; the arguments are checked.

    Returns:
        [R, C, ph, pw], contiguous.
    """
    output = input.new_empty((boxes.shape[0], rule.out_channels(input), *rule.output_size))
    if output.numel() == 0:
        return output
    call, maps = _Call.of(input, boxes, offset, rule), _maps(input, _planes(rule))
    channel_tiles = triton.cdiv(call.sizes.group_channels, call.tile.channels)
    with devices.on_device_of(input):
        arguments = maps, call.boxes, call.shifts, output
        call.launch(_forward, channel_tiles, (maps, output), *arguments)
    return output


def roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    rule: Rule,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and offset, as far as `needs` says True."""
    needs_input, needs_offset = needs
    call = _Call.of(input, boxes, offset, rule)
    grad_shifts = None
    if needs_offset and call.shifts is not None:
        grad_shifts = torch.empty_like(call.shifts)
    if grad_output.numel() == 0 or (not needs_input and grad_shifts is None):
        # No kernel runs: the gradients are zero.
        grad_input, grad_offset = None, None
        if needs_input:
            grad_input = torch.zeros_like(input, memory_format=_memory_format(input))
        if needs_offset and offset is not None:
            grad_offset = torch.zeros_like(offset, memory_format=torch.contiguous_format)
        return grad_input, grad_offset
    grad_output = grad_output.contiguous()
    with devices.on_device_of(input):
        if needs_input:
            grad_input = _by_input_and_offset(call, grad_output, input, grad_shifts)
        else:
            grad_input = None
            _launch_backward(call, grad_output, input, grad_shifts, None, slice(0, input.shape[0]))
    if grad_shifts is None or offset is None:
        return grad_input, None
    return grad_input, of_parts(grad_shifts, offset)


def _by_input_and_offset(
    call: _Call, grad_output: Tensor, input: Tensor, grad_shifts: Tensor | None
) -> Tensor:
    """The gradient of input; fills that of all bins' offsets, if it is given.

    The map's gradient is summed in float32 or better, in the order of `_maps`, and deterministic
    sums are integers. Where that is a buffer beside the gradient, images go through it a few at a
    time.
    """
    batch, in_channels, height, width = input.shape
    channels, planes = call.sizes.channels, call.sizes.planes
    memory_format = _memory_format(input)
    dtype = torch.promote_types(input.dtype, torch.float32)
    largest = largest_finite(grad_output) if deterministic() else None
    # A bin adds to a pixel once, or up to four times where the box is turned inside out.
    most = min(4 * call.extent.every_bin // call.sizes.groups, 2**40)

    def summed(some: slice) -> Tensor:
        shape = (some.stop - some.start, planes, height, width, channels)
        sums = Sums(shape, dtype, input.device, largest, most)
        _launch_backward(call, grad_output, input, grad_shifts, sums, some)
        return sums.result()

    last = memory_format == torch.channels_last
    if last and planes == 1 and dtype == input.dtype and largest is None:
        # The sums are the gradient.
        return summed(slice(0, batch))[:, 0].permute(0, 3, 1, 2)
    grad_input = torch.empty_like(input, memory_format=memory_format)
    step = max(1, _MOST_SUMS // (in_channels * height * width))
    # At least once, for the offsets of boxes of no image.
    for first in range(0, max(batch, 1), step):
        some = slice(first, min(first + step, batch))
        part = grad_input[some].unflatten(1, (channels, planes))
        part.permute(0, 2, 3, 4, 1).copy_(summed(some))
    return grad_input


def _launch_backward(
    call: _Call,
    grad_output: Tensor,
    input: Tensor,
    grad_shifts: Tensor | None,
    sums: Sums | None,
    some: slice,
) -> None:
    # The gradient by the map does not depend on what the map holds.
    maps = None if grad_shifts is None else _maps(input, call.sizes.planes)
    target = None if sums is None else sums.target
    call.launch(
        *(_backward, 1, (input, grad_output)),
        *(grad_output, maps, call.boxes, call.shifts, grad_shifts, target),
        *(some.start, max(some.stop - some.start, 1)),
    )


def _tile(group_channels: int) -> _Tile:
    channels = min(triton.next_power_of_2(group_channels), _TILE)
    bins = min(_TILE // channels, _MOST_BINS)
    # Few channels are read one by one, many in vectors of four by each thread.
    return _Tile(bins, channels, 2 if channels >= 64 else 4)


def _planes(rule: Rule) -> int:
    ph, pw = rule.output_size
    return ph * pw if rule.position_sensitive else 1


def _maps(input: Tensor, planes: int) -> Tensor:
    """The input with channels last: [N, planes, H, W, C]."""
    if planes == 1:
        return input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)[:, None]
    return input.unflatten(1, (-1, planes)).permute(0, 2, 3, 4, 1).contiguous()


def _memory_format(input: Tensor) -> torch.memory_format:
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
