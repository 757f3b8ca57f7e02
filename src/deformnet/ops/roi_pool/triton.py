"""Deformable RoI pooling on a GPU, plain and position-sensitive.

The samples of a bin lie on a grid, and bilinear weights are products. So a bin is a sum over the
pixels of some rows and columns of the map, with a weight for each row and one for each column.
Samples are taken one after another along each axis; a pixel is read, or added to, once all samples
that it has a part in are known, and so once, however many they are.

A program has a tile of bins times channels of a group. What is the same for all channels has the
shape [bins, 1]. Samples are summed in their own order in every tile: the bits of a mean do not
depend on the shape of the tile, and so not on the number of groups.

Positions are those of the reference to the last bit, so that what lies inside the map and in which
cell is the same; the kernels are compiled without contraction of products and sums.

Letters: R boxes, G offset groups, N C H W the map, with C the channels of the output, K = ph*pw
bins, B = R*K*G bins of all boxes and groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deformnet.ops.triton.sums import Sums, add, deterministic, largest_finite

Pair = tuple[int, int]

# Numbers in a buffer for the sums of a gradient that is not summed in place.
_MOST_SUMS = 2**26
# Beyond this a place in a tensor is counted in 64 bits.
_NARROW = 2**31
# Numbers in the tile of a program, its channels at most, and its bins at most.
_TILE = 256
_MOST_BINS = 128
# Arguments of the kernels for whose values none is compiled anew.
_VARYING = ("every_bin", "batch", "height", "width", "samples")

# The cell of a bin that has had no sample yet, or all of them: it and the next lie on no map.
_NOWHERE = tl.constexpr(-4)


@triton.jit
def _finite(x):
    return (x - x) == 0


@triton.jit
def _round(x):
    """To whole numbers, halves away from zero."""
    whole = tl.where(x < 0, tl.ceil(x), tl.floor(x))
    rest = x - whole
    return whole + (rest >= 0.5).to(tl.float64) - (rest <= -0.5).to(tl.float64)


@triton.jit
def _axis(low, high, exists, bin, k, scale, samples, SAMPLING: tl.constexpr, ADAPTS: tl.constexpr):
    """The rule of sampling on one axis, for bin `bin` of k of a box from `low` to `high`.

    Returns:
        The size of the box; and of the samples of its bin, sample s being at start + s * step
        before the shift, start, step and number. An undefined box has the size NaN, starts at NaN
        and has no samples.
    """
    bin = bin.to(tl.float64)
    if SAMPLING == "bins":
        low, high = _round(low * scale), _round(high * scale)
        size = high - low + 1
        size = tl.where(size < 1, size * 0 + 1, size)
        first = tl.floor(bin * size / k)
        start = low + first
        step = start * 0 + 1
        number = tl.ceil((bin + 1) * size / k) - first
    elif SAMPLING == "msra":
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
        if ADAPTS:
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
def _range(start, step, number, length, SAMPLING: tl.constexpr, ADAPTS: tl.constexpr):
    """Which samples can lie on a map of this length: the first of them, and how many.

    At most a few more than the map has room for, however large the box is.
    """
    if ADAPTS:
        # One more at each end than lies within [-1, length], for the sake of rounding.
        divisor = tl.where(step > 0, step, 1.0)
        first = tl.floor((-1 - start) / divisor) - 1
        last = tl.floor((length - start) / divisor) + 1
        # Also where these are no numbers: no comparison with such is true.
        first = tl.where((step > 0) & (first > 0), first, 0.0)
        first = tl.where(first < number, first, number)
        last = tl.where(step > 0, last, number)
        last = tl.where(last < number - 1, last, number - 1)
        most = length + 5 if SAMPLING == "bins" else 2 * length + 7
        needed = last - first + 1
        needed = tl.where(needed < most, needed, most)
    else:
        first = number * 0
        needed = number
    return first, tl.where(needed > 0, needed, 0.0).to(tl.int32)


@triton.jit
def _inside(start, step, samples, length):
    """How many of all samples of a bin "msra" does not skip."""
    count = tl.zeros(start.shape, tl.float64)
    for s in range(samples):
        at = start + s * step
        count += ((at >= -0.5) & (at <= length - 0.5)).to(tl.float64)
    return count


@triton.jit
def _place(
    boxes, offset, program, every_bin, batch, height, width, groups, ph, pw, scale, gamma, samples,
    SHIFTED: tl.constexpr, SAMPLING: tl.constexpr, ADAPTS: tl.constexpr, WIDE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The bins of a program, all [BINS, 1].

    Returns:
        Whether there is such a bin; its box, its group, its number among the K; the image, which is
        the first one for a box of none; height and width of the box, in pixels of the map; its
        samples on the axes y and x, (start, step, first, needed) each; of how many the mean is.
    """
    index = tl.arange(0, BINS)[:, None]
    index += (program.to(tl.int64) if WIDE else program) * BINS
    real = index < every_bin
    index = tl.where(real, index, 0)
    group = index % groups
    bin = (index // groups) % (ph * pw)
    r = index // groups // (ph * pw)

    image = tl.load(boxes + 5 * r, mask=real, other=0).to(tl.float64)
    x1 = tl.load(boxes + 5 * r + 1, mask=real, other=0).to(tl.float64)
    y1 = tl.load(boxes + 5 * r + 2, mask=real, other=0).to(tl.float64)
    x2 = tl.load(boxes + 5 * r + 3, mask=real, other=0).to(tl.float64)
    y2 = tl.load(boxes + 5 * r + 4, mask=real, other=0).to(tl.float64)
    # Nobody could look at the boxes before.
    exists = (image >= 0) & (image < batch)
    image = tl.where(exists, image, 0.0).to(tl.int64 if WIDE else tl.int32)

    box_height, y, y_step, y_number = _axis(
        y1, y2, exists, bin // pw, ph, scale, samples, SAMPLING, ADAPTS
    )
    box_width, x, x_step, x_number = _axis(
        x1, x2, exists, bin % pw, pw, scale, samples, SAMPLING, ADAPTS
    )
    if SHIFTED:
        # The pair is (x, y).
        place = (r * groups + group) * 2 * (ph * pw) + bin
        shift_x = tl.load(offset + place, mask=real, other=0).to(tl.float64)
        shift_y = tl.load(offset + place + ph * pw, mask=real, other=0).to(tl.float64)
        x = x + gamma * shift_x * box_width
        y = y + gamma * shift_y * box_height
    y_first, y_needed = _range(y, y_step, y_number, height, SAMPLING, ADAPTS)
    x_first, x_needed = _range(x, x_step, x_number, width, SAMPLING, ADAPTS)
    if SAMPLING == "msra":
        number = _inside(y, y_step, samples, height) * _inside(x, x_step, samples, width)
    else:
        number = y_number * x_number
    number = tl.where(number < 1, number * 0 + 1, number)
    y_axis = y, y_step, y_first, y_needed
    x_axis = x, x_step, x_first, x_needed
    return real, r, group, bin, image, box_height, box_width, y_axis, x_axis, number


@triton.jit
def _take(
    axis, s, length, cell, low, high, low_slope, high_slope,
    SAMPLING: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Takes sample s of each bin, along one axis.

    The samples before were read from the pixels `cell` and `cell + 1`, with the weights `low` and
    `high` and the derivatives `low_slope` and `high_slope` of these by the position.

    Returns:
        Whether these two pixels lie on the map and are done: this sample has no part in them. The
        new state, the five numbers. Whether the sample's weights change with its position.
    """
    start, step, first, needed = axis
    more = s < needed
    at = start + (first + s) * step
    if SAMPLING == "bins":
        # Equations 3-4: the map is zero outside.
        within = more & (at >= -1) & (at < length)
        moves = within
        at = tl.where(within, at, 0.0)
    else:
        if SAMPLING == "msra":
            within = more & (at >= -0.5) & (at <= length - 0.5)
        else:
            within = more & (at >= -1) & (at <= length)
        # Beyond the last pixel's centre the value is the last pixel's.
        moves = within & (at >= 0) & (at < length - 1)
        at = tl.where(within & (at > 0), at, 0.0)
        end = (length - 1).to(tl.float64)
        at = tl.where(at < end, at, end)
    # From here on all positions are finite and small.
    whole = tl.floor(at)
    fraction = at - whole
    # A sample that is skipped leaves all as it is; after the last one everything is done.
    new = tl.where(within, whole.to(tl.int32), tl.where(more, cell, _NOWHERE))
    same, next = new == cell, new == cell + 1
    low_done = (same == 0) & (cell >= 0) & (cell < length)
    high_done = ((same | next) == 0) & (cell + 1 >= 0) & (cell + 1 < length)

    slope = moves.to(DTYPE)
    low = tl.where(same, low, tl.where(next, high, 0))
    low += tl.where(within, 1 - fraction, 0.0).to(DTYPE)
    high = tl.where(same, high, 0) + tl.where(within, fraction, 0.0).to(DTYPE)
    low_slope = tl.where(same, low_slope, tl.where(next, high_slope, 0)) - slope
    high_slope = tl.where(same, high_slope, 0) + slope
    return low_done, high_done, new, low, high, low_slope, high_slope, moves


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    input, boxes, offset, output,
    every_bin, batch, height, width, channels, group_channels, groups, planes, ph, pw,
    scale: tl.float64, gamma: tl.float64, samples,  # pyright: ignore[reportInvalidTypeForm]
    SHIFTED: tl.constexpr, SAMPLING: tl.constexpr, ADAPTS: tl.constexpr,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    real, r, group, bin, image, _height, _width, y_axis, x_axis, number = _place(
        boxes, offset, tl.program_id(0), every_bin, batch, height, width, groups, ph, pw,
        scale, gamma, samples, SHIFTED, SAMPLING, ADAPTS, WIDE, BINS,
    )  # fmt: skip
    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    real_lane = lane < group_channels
    channel = group * group_channels + lane
    origin = (image * planes + (bin % planes)) * height * width
    down = width * channels
    rows = tl.max(tl.where(real, y_axis[3] + 1, 0))
    columns = tl.max(tl.where(real, x_axis[3] + 1, 0))

    none = tl.zeros((BINS, 1), DTYPE)
    total = tl.zeros((BINS, CHANNELS), DTYPE)
    top_cell = tl.full((BINS, 1), _NOWHERE, tl.int32)
    top, bottom, top_slope, bottom_slope = none, none, none, none
    for i in range(rows):  # pyright: ignore[reportArgumentType]
        (
            top_done, bottom_done, new_cell, new_top, new_bottom,
            _new_top_slope, _new_bottom_slope, _moves_y,
        ) = _take(
            y_axis, i, height, top_cell, top, bottom, top_slope, bottom_slope, SAMPLING, DTYPE
        )  # fmt: skip
        top_done, bottom_done = top_done & real, bottom_done & real
        cell = tl.full((BINS, 1), _NOWHERE, tl.int32)
        left, right, left_slope, right_slope = none, none, none, none
        steps = tl.max(tl.where(top_done | bottom_done, columns, 0))
        for j in range(steps):  # pyright: ignore[reportArgumentType]
            (
                left_done, right_done, next_cell, next_left, next_right,
                _next_left_slope, _next_right_slope, _moves_x,
            ) = _take(
                x_axis, j, width, cell, left, right, left_slope, right_slope, SAMPLING, DTYPE
            )  # fmt: skip
            at = input + (origin + top_cell.to(origin.dtype) * width + cell) * channels + channel
            m00, m01 = top_done & left_done & real_lane, top_done & right_done & real_lane
            m10, m11 = bottom_done & left_done & real_lane, bottom_done & right_done & real_lane
            # Not a product with zero: the map may hold infinities and NaN.
            v00 = tl.load(at, mask=m00, other=0).to(DTYPE)
            v01 = tl.load(at + channels, mask=m01, other=0).to(DTYPE)
            v10 = tl.load(at + down, mask=m10, other=0).to(DTYPE)
            v11 = tl.load(at + down + channels, mask=m11, other=0).to(DTYPE)
            total += (v00 * left + v01 * right) * top
            total += (v10 * left + v11 * right) * bottom
            cell, left, right = next_cell, next_left, next_right
        top_cell, top, bottom = new_cell, new_top, new_bottom
    total = total / number.to(DTYPE)
    undefined = (y_axis[0] != y_axis[0]) | (x_axis[0] != x_axis[0])
    total = tl.where(undefined, float("nan"), total)
    place = (r * (groups * group_channels) + channel) * (ph * pw) + bin
    tl.store(output + place, total.to(output.dtype.element_ty), mask=real & real_lane)


@triton.jit(do_not_specialize=[*_VARYING, "first_image", "images"])
def _backward(
    grad_output, input, boxes, offset, grad_offset, floats, integers, unit,
    first_image, images,
    every_bin, batch, height, width, channels, group_channels, groups, planes, ph, pw,
    scale: tl.float64, gamma: tl.float64, samples,  # pyright: ignore[reportInvalidTypeForm]
    BY_INPUT: tl.constexpr, BY_OFFSET: tl.constexpr, FIXED: tl.constexpr,
    SHIFTED: tl.constexpr, SAMPLING: tl.constexpr, ADAPTS: tl.constexpr,
    WIDE: tl.constexpr, DTYPE: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of the boxes of images first_image .. first_image + images - 1.

    `floats`, `integers` and `unit` are the tensors of a `Sums` for these images.
    """
    real, r, group, bin, image, box_height, box_width, y_axis, x_axis, number = _place(
        boxes, offset, tl.program_id(0), every_bin, batch, height, width, groups, ph, pw,
        scale, gamma, samples, SHIFTED, SAMPLING, ADAPTS, WIDE, BINS,
    )  # fmt: skip
    # Boxes of no image have a gradient by their offset, too, and are here those of the first.
    real = real & (image >= first_image) & (image < first_image + images)
    plane = (bin % planes) * height * width
    origin = image * planes * height * width + plane
    sums_origin = (image - first_image) * planes * height * width + plane
    down = width * channels
    rows = tl.max(tl.where(real, y_axis[3] + 1, 0))
    columns = tl.max(tl.where(real, x_axis[3] + 1, 0))
    if FIXED:
        unit_of_sums = tl.load(unit)
    else:
        unit_of_sums = 1.0

    none = tl.zeros((BINS, 1), DTYPE)
    by_y, by_x = none, none
    for first_lane in range(0, group_channels, CHANNELS):
        lane = first_lane + tl.arange(0, CHANNELS)[None, :]
        real_lane = lane < group_channels
        channel = group * group_channels + lane
        place = (r * (groups * group_channels) + channel) * (ph * pw) + bin
        gradient = tl.load(grad_output + place, mask=real & real_lane, other=0).to(DTYPE)
        gradient = gradient / number.to(DTYPE)
        slope_y = tl.zeros((BINS, CHANNELS), DTYPE)
        slope_x = tl.zeros((BINS, CHANNELS), DTYPE)
        moved_y, moved_x = none > 0, none > 0

        top_cell = tl.full((BINS, 1), _NOWHERE, tl.int32)
        top, bottom, top_slope, bottom_slope = none, none, none, none
        for i in range(rows):  # pyright: ignore[reportArgumentType]
            (
                top_done, bottom_done, new_cell, new_top, new_bottom,
                new_top_slope, new_bottom_slope, moves_y,
            ) = _take(
                y_axis, i, height, top_cell, top, bottom, top_slope, bottom_slope, SAMPLING, DTYPE
            )  # fmt: skip
            top_done, bottom_done = top_done & real, bottom_done & real
            moved_y = moved_y | moves_y
            cell = tl.full((BINS, 1), _NOWHERE, tl.int32)
            left, right, left_slope, right_slope = none, none, none, none
            steps = tl.max(tl.where(top_done | bottom_done, columns, 0))
            for j in range(steps):  # pyright: ignore[reportArgumentType]
                (
                    left_done, right_done, next_cell, next_left, next_right,
                    next_left_slope, next_right_slope, moves_x,
                ) = _take(
                    x_axis, j, width, cell, left, right, left_slope, right_slope, SAMPLING, DTYPE
                )  # fmt: skip
                moved_x = moved_x | moves_x
                pixel = top_cell.to(origin.dtype) * width + cell
                m00, m01 = top_done & left_done & real_lane, top_done & right_done & real_lane
                m10 = bottom_done & left_done & real_lane
                m11 = bottom_done & right_done & real_lane
                if BY_OFFSET:
                    at = input + (origin + pixel) * channels + channel
                    v00 = tl.load(at, mask=m00, other=0).to(DTYPE)
                    v01 = tl.load(at + channels, mask=m01, other=0).to(DTYPE)
                    v10 = tl.load(at + down, mask=m10, other=0).to(DTYPE)
                    v11 = tl.load(at + down + channels, mask=m11, other=0).to(DTYPE)
                    slope_y += (v00 * left + v01 * right) * top_slope
                    slope_y += (v10 * left + v11 * right) * bottom_slope
                    slope_x += (v00 * left_slope + v01 * right_slope) * top
                    slope_x += (v10 * left_slope + v11 * right_slope) * bottom
                if BY_INPUT:
                    to = (sums_origin + pixel) * channels + channel
                    g00, g01 = gradient * (top * left), gradient * (top * right)
                    g10, g11 = gradient * (bottom * left), gradient * (bottom * right)
                    # Most bins of boxes on whole pixels have zeros here.
                    m00, m01 = m00 & (g00 != 0), m01 & (g01 != 0)
                    m10, m11 = m10 & (g10 != 0), m11 & (g11 != 0)
                    add(floats, integers, unit_of_sums, to, g00, m00, FIXED)
                    add(floats, integers, unit_of_sums, to + channels, g01, m01, FIXED)
                    add(floats, integers, unit_of_sums, to + down, g10, m10, FIXED)
                    add(floats, integers, unit_of_sums, to + down + channels, g11, m11, FIXED)
                cell, left, right = next_cell, next_left, next_right
                left_slope, right_slope = next_left_slope, next_right_slope
            top_cell, top, bottom = new_cell, new_top, new_bottom
            top_slope, bottom_slope = new_top_slope, new_bottom_slope
        if BY_OFFSET:
            # What does not move has no slope, also where the gradient is not finite.
            slope_y = tl.where(moved_y & real_lane, slope_y * gradient, 0)
            slope_x = tl.where(moved_x & real_lane, slope_x * gradient, 0)
            by_y += tl.sum(slope_y, axis=1, keep_dims=True)
            by_x += tl.sum(slope_x, axis=1, keep_dims=True)
    if BY_OFFSET:
        undefined = (y_axis[0] != y_axis[0]) | (x_axis[0] != x_axis[0])
        grad_x = tl.where(undefined, float("nan"), by_x.to(tl.float64) * box_width * gamma)
        grad_y = tl.where(undefined, float("nan"), by_y.to(tl.float64) * box_height * gamma)
        place = (r * groups + group) * 2 * (ph * pw) + bin
        dtype = grad_offset.dtype.element_ty
        tl.store(grad_offset + place, grad_x.to(dtype), mask=real)
        tl.store(grad_offset + place + ph * pw, grad_y.to(dtype), mask=real)


def roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> Tensor:
    """Forward pass; arguments are as `deformnet.ops.deform_roi_pool` has checked them.

    Returns:
        [R, C, ph, pw], contiguous.
    """
    channels = _out_channels(input, output_size, position_sensitive)
    output = input.new_empty((boxes.shape[0], channels, *output_size))
    if output.numel() == 0:
        return output
    planes = output_size[0] * output_size[1] if position_sensitive else 1
    maps = _maps(input, planes)
    boxes = boxes.contiguous()
    shifts = None if offset is None else _of_bins(offset, output_size).contiguous()
    sizes = _sizes(input, boxes, shifts, output_size, channels, planes)
    tile = _tile(sizes.group_channels)
    grid = (
        triton.cdiv(sizes.every_bin, tile.bins),
        triton.cdiv(sizes.group_channels, tile.channels),
    )
    with torch.cuda.device_of(input):
        _forward[grid](
            *(maps, boxes, boxes if shifts is None else shifts, output),
            *sizes,
            *(float(spatial_scale), float(gamma), samples_per_bin),
            SHIFTED=shifts is not None,
            SAMPLING=sampling,
            ADAPTS=sampling == "bins" or samples_per_bin == 0,
            WIDE=_wide(maps, boxes, output, shifts),
            DTYPE=_arithmetic(input.dtype),
            BINS=tile.bins,
            CHANNELS=tile.channels,
            num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )
    return output


def roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by input and offset, those that `needs` asks for."""
    needs_input, needs_offset = needs
    memory_format = _memory_format(input)
    shifts = None if offset is None else _of_bins(offset, output_size).contiguous()
    grad_shifts = torch.empty_like(shifts) if needs_offset and shifts is not None else None
    if grad_output.numel() == 0 or (not needs_input and grad_shifts is None):
        # Without boxes no kernel runs: the gradients are zero.
        grad_input, grad_offset = None, None
        if needs_input:
            grad_input = torch.zeros_like(input, memory_format=memory_format)
        if needs_offset and offset is not None:
            grad_offset = torch.zeros_like(offset, memory_format=torch.contiguous_format)
        return grad_input, grad_offset

    n, _, height, width = input.shape
    channels = _out_channels(input, output_size, position_sensitive)
    planes = output_size[0] * output_size[1] if position_sensitive else 1
    boxes, grad_output = boxes.contiguous(), grad_output.contiguous()
    # The gradient by the map does not depend on what the map holds.
    maps = grad_output if grad_shifts is None else _maps(input, planes)
    sizes = _sizes(input, boxes, shifts, output_size, channels, planes)
    tile = _tile(sizes.group_channels)
    grid = (triton.cdiv(sizes.every_bin, tile.bins),)
    dtype = torch.promote_types(input.dtype, torch.float32)

    largest = largest_finite(grad_output) if needs_input and deterministic() else None
    # Sums that are the gradient itself need no buffer.
    in_place = (
        planes == 1
        and dtype == input.dtype
        and memory_format == torch.channels_last
        and largest is None
    )
    grad_input, images = None, n
    if needs_input and not in_place:
        grad_input = torch.empty_like(input, memory_format=memory_format)
        images = max(1, _MOST_SUMS // (input.shape[1] * height * width))
    # At least once, for the offsets of boxes of no image.
    for first in range(0, max(n, 1), max(images, 1)):
        some = min(images, n - first)
        sums = None
        if needs_input:
            shape = (some, planes, height, width, channels)
            # A bin adds to a pixel once, or up to four times where the box is turned inside out.
            most = 4 * sizes.every_bin // sizes.groups
            sums = Sums(shape, dtype, input.device, largest, min(most, 2**40))
        with torch.cuda.device_of(input):
            _backward[grid](
                *(grad_output, maps, boxes, boxes if shifts is None else shifts),
                grad_output if grad_shifts is None else grad_shifts,
                *((grad_output, grad_output, grad_output) if sums is None else sums.tensors),
                *(first, max(some, 1)),
                *sizes,
                *(float(spatial_scale), float(gamma), samples_per_bin),
                BY_INPUT=sums is not None,
                BY_OFFSET=grad_shifts is not None,
                FIXED=sums is not None and sums.fixed,
                SHIFTED=shifts is not None,
                SAMPLING=sampling,
                ADAPTS=sampling == "bins" or samples_per_bin == 0,
                WIDE=_wide(input, boxes, grad_output, shifts),
                DTYPE=_arithmetic(input.dtype),
                BINS=tile.bins,
                CHANNELS=tile.channels,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]
                enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
            )
        if sums is None:
            continue
        if grad_input is None:
            grad_input = sums.result()[:, 0].permute(0, 3, 1, 2)
        else:
            part = grad_input[first : first + some].unflatten(1, (channels, planes))
            part.permute(0, 2, 3, 4, 1).copy_(sums.result())
    if grad_shifts is None or offset is None:
        return grad_input, None
    return grad_input, _of_parts(grad_shifts, offset)


class _Sizes(NamedTuple):
    """What both kernels take, in their order."""

    every_bin: int  # B
    batch: int
    height: int
    width: int
    channels: int
    group_channels: int
    groups: int
    planes: int  # of the map for each channel: K where position-sensitive, or 1
    ph: int
    pw: int


def _sizes(
    input: Tensor,
    boxes: Tensor,
    shifts: Tensor | None,
    output_size: Pair,
    channels: int,
    planes: int,
) -> _Sizes:
    batch, _, height, width = input.shape
    groups = 1 if shifts is None else shifts.shape[1] // 2
    ph, pw = output_size
    return _Sizes(
        *(boxes.shape[0] * ph * pw * groups, batch, height, width),
        *(channels, channels // groups, groups, planes, ph, pw),
    )


class _Tile(NamedTuple):
    """Of one program; bins and channels are powers of two."""

    bins: int
    channels: int
    warps: int


def _tile(group_channels: int) -> _Tile:
    channels = min(triton.next_power_of_2(group_channels), _TILE)
    bins = min(_TILE // channels, _MOST_BINS)
    # Few channels are read one by one, many in vectors of four by each thread.
    return _Tile(bins, channels, 2 if channels >= 64 else 4)


def _out_channels(input: Tensor, output_size: Pair, position_sensitive: bool) -> int:
    bins = output_size[0] * output_size[1]
    return input.shape[1] // bins if position_sensitive else input.shape[1]


def _maps(input: Tensor, planes: int) -> Tensor:
    """The input with channels last: [N, planes, H, W, C]."""
    if planes == 1:
        return input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)[:, None]
    return input.unflatten(1, (-1, planes)).permute(0, 2, 3, 4, 1).contiguous()


def _memory_format(input: Tensor) -> torch.memory_format:
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _wide(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.numel() >= _NARROW for tensor in tensors)


def _arithmetic(dtype: torch.dtype) -> tl.dtype:
    """What weights and sums are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _part(axis: int, offset: Tensor, bins: int) -> Tensor | None:
    """The part that each bin has its offset from, or None if it is the bin itself."""
    parts = offset.shape[axis]
    if parts == bins:
        return None
    return torch.arange(bins, device=offset.device) * parts // bins


def _of_bins(offset: Tensor, output_size: Pair) -> Tensor:
    """The offsets [R, 2*G, ph, pw] of the bins, from those [R, 2*G, part, part] of the parts."""
    if offset.shape[2:] == tuple(output_size):
        return offset
    # Gradients of a part's bins are then summed in float32.
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    for axis in (2, 3):
        part = _part(axis, offset, output_size[axis - 2])
        if part is not None:
            offset = offset.index_select(axis, part)
    return offset


def _of_parts(grad: Tensor, offset: Tensor) -> Tensor:
    """The gradient of `offset`, from that of the bins' offsets."""
    for axis in (3, 2):
        part = _part(axis, offset, grad.shape[axis])
        if part is not None:
            sums = list(grad.shape)
            sums[axis] = offset.shape[axis]
            grad = grad.new_zeros(sums).index_add_(axis, part, grad)
    return grad.to(offset.dtype)
