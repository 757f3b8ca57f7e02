"""Deformable RoI pooling, plain and position-sensitive, in plain PyTorch: the definition.

Each bin is the mean of samples on a grid, rows times columns; each axis is computed by itself.
Letters: R boxes, C output channels, G offset groups, K = ph*pw bins, H W height and width of the
map, B = R*G*K bins of all boxes and groups, S samples on one axis of a bin.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deformnet.ops._arguments import values_known
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.roi_pool.parts import of_bins

# Numbers read from the map at a time, unless one bin alone has more of them.
_CHUNK = 2**22


def roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Tensor:
    """`deformnet.ops.deform_roi_pool` and `deform_ps_roi_pool`; the arguments are checked.

    Positions are computed in float64, so that rounding of boxes, and samples inside and outside of
    the map, are the same for every dtype of the input; the rest is computed in float64 for float64
    and in float32 for all other dtypes. Differentiable any number of times by input and offset;
    the memory that autograd holds grows with the number of samples.

    Returns:
        [R, C, ph, pw] of the dtype of `input`.
    """
    height, width = input.shape[2:]
    bins = bins_of(input, boxes, offset, rule)
    most_rows = _most(height, rule.sampling, rule.samples_per_bin)
    most_columns = _most(width, rule.sampling, rule.samples_per_bin)
    y = _grid(*bins.y, size=height, most=most_rows)
    x = _grid(*bins.x, size=width, most=most_columns)
    # Halves are exact in float32, so nothing is lost before the single rounding at the end.
    table = bins.table(input.to(torch.promote_types(input.dtype, torch.float32)))
    origin = bins.plane * (height * width)

    if values_known(y.needed):
        order, chunks = _chunks(y.needed, x.needed, table.shape[1])
    else:
        order, chunks = None, [(slice(None), most_rows, most_columns)]
    sums, insides = [], []
    for chosen, samples_y, samples_x in chunks:
        y_read = read_axis(y.at(chosen), samples_y, height, rule.sampling)
        x_read = read_axis(x.at(chosen), samples_x, width, rule.sampling)
        sums.append(_sum(table, origin[chosen], y_read, x_read, width))
        insides.append(y_read.inside * x_read.inside)
    output, inside = torch.cat(sums), torch.cat(insides)
    if order is not None:
        back = order.argsort()
        output, inside = output[back], inside[back]
    # The divisor: the number of samples inside, or of all samples.
    return bins.means(output, inside if rule.sampling == "msra" else y.number * x.number, input)


class Samples(NamedTuple):
    """The samples of all bins along one axis, shifted: start + s * step. Every tensor is [B]."""

    start: Tensor
    step: Tensor
    number: Tensor


class Bins(NamedTuple):
    """The bins of all boxes, and their positions on the map."""

    y: Samples
    x: Samples
    plane: Tensor  # [B], the plane of the map that a bin reads; see `table`
    shape: tuple[int, int, int, int]  # R, G, ph, pw
    planes: int  # number of planes per group: that of bins if position-sensitive, else 1

    def table(self, maps: Tensor) -> Tensor:
        """Maps [N, C, H, W] as rows of pixels [N * G * planes * H * W, C / (G * planes)]."""
        n, channels, height, width = maps.shape
        groups = self.shape[1]
        some = channels // (groups * self.planes)
        maps = maps.reshape(n, groups, some, self.planes, height, width)
        return maps.permute(0, 1, 3, 4, 5, 2).reshape(-1, some)

    def means(self, sums: Tensor, number: Tensor, input: Tensor) -> Tensor:
        """The output [R, C, ph, pw] from sums [B, C/G] over `number` [B] samples."""
        (count, groups, ph, pw), dtype = self.shape, sums.dtype
        output = sums / number.clamp_min(1).to(dtype)[:, None]
        # A NaN position gives a NaN mean, which is squared so that its derivative is NaN as well.
        y, x = self.y.start, self.x.start
        undefined = y.isnan() | x.isnan()
        poison = torch.where(undefined, y + x, 0).to(dtype)
        output = torch.where(undefined[:, None], (poison * poison)[:, None], output)
        channels = sums.shape[1]
        output = output.reshape(count, groups, ph, pw, channels).permute(0, 1, 4, 2, 3)
        return output.reshape(count, groups * channels, ph, pw).to(input.dtype)


def bins_of(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Bins:
    """The bins of boxes [R, 5], moved by their offsets; for the arguments, see `roi_pool`."""
    (ph, pw), _, gamma, _, _, position_sensitive = rule
    groups = 1 if offset is None else offset.shape[1] // 2
    shape = (boxes.shape[0], groups, ph, pw)
    planes = ph * pw if position_sensitive else 1

    image = boxes.detach()[:, 0].to(_position_dtype(boxes))
    # If the values of the boxes could not be checked, some may belong to images that do not exist.
    exists = (image >= 0) & (image < input.shape[0])
    y_axis, x_axis = axes(boxes, exists, rule)

    y_start, x_start = y_axis.start[:, None, :, None], x_axis.start[:, None, None, :]
    if offset is not None:
        offset = of_bins(offset.to(_position_dtype(boxes)), rule.output_size)
        shift = gamma * offset.unflatten(1, (groups, 2))
        # The pair is (x, y).
        x_start = x_start + shift[:, :, 0] * x_axis.size[:, None, None, None]
        y_start = y_start + shift[:, :, 1] * y_axis.size[:, None, None, None]
    rows = (y_start, y_axis.step[:, None, :, None], y_axis.number[:, None, :, None])
    columns = (x_start, x_axis.step[:, None, None, :], x_axis.number[:, None, None, :])

    plane = torch.where(exists, image, 0).long()[:, None] * groups
    plane = plane + torch.arange(groups, device=input.device)
    plane = plane[:, :, None] * planes + torch.arange(planes, device=input.device)
    return Bins(
        Samples(*(it.expand(shape).flatten() for it in rows)),
        Samples(*(it.expand(shape).flatten() for it in columns)),
        plane.expand(shape[0], groups, ph * pw).flatten(),
        shape,
        planes,
    )


class Axis(NamedTuple):
    """Boxes on one axis of the map, and the samples of their k bins.

    Sample s of a bin, s = 0, ..., number - 1, is at start + s * step, before the shift.
    """

    size: Tensor  # [R], the unit of the shift
    start: Tensor  # [R, k]
    step: Tensor  # [R, k]
    number: Tensor  # [R, k]


def axes(boxes: Tensor, exists: Tensor, rule: Rule) -> tuple[Axis, Axis]:
    """How boxes [R, 5] lie on the vertical and the horizontal axis of the map.

    Args:
        boxes: [R, 5].
        exists: [R], whether the image of each box exists.
        rule: the arguments of the pooling that are not tensors.
    """
    sides = boxes.detach()[:, 1:].to(_position_dtype(boxes))
    scale = rule.spatial_scale
    if rule.sampling == "bins":
        sides = _round(sides * scale)
    elif rule.sampling == "msra":
        first, last = _round(sides).chunk(2, dim=1)
        sides = torch.cat([first, last + 1], dim=1) * scale - 0.5
    else:
        sides = sides * scale - 0.5
    x1, y1, x2, y2 = sides.unbind(1)
    ph, pw = rule.output_size
    return _axis(y1, y2, exists, ph, rule), _axis(x1, x2, exists, pw, rule)


def _position_dtype(boxes: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if boxes.device.type == "mps" else torch.float64


def _axis(low: Tensor, high: Tensor, exists: Tensor, k: int, rule: Rule) -> Axis:
    """The sampling rule on one axis, for the sides `low` and `high` [R] of the boxes in map pixels.

    A box with an infinite or NaN side has start NaN and size NaN.
    """
    sampling, samples_per_bin = rule.sampling, rule.samples_per_bin
    bin = torch.arange(k, dtype=low.dtype, device=low.device)
    size = high - low
    defined = exists & size.isfinite()  # the size is not finite if a side is not
    if sampling == "bins":
        size = (size + 1).clamp_min(1)
        first = (bin * size[:, None] / k).floor()
        start = low[:, None] + first
        step = torch.ones_like(start)
        count = ((bin + 1) * size[:, None] / k).ceil() - first
    elif sampling == "msra":
        size = size.clamp_min(0.1)
        length = (size / k)[:, None]
        start = low[:, None] + bin * length
        step = (length / samples_per_bin).expand_as(start)
        count = torch.full_like(start, samples_per_bin)
    else:
        length = (size / k)[:, None]
        # A box turned inside out has no samples where their number adapts.
        count = length.ceil().clamp_min(0)
        if samples_per_bin > 0:
            count = torch.full_like(count, samples_per_bin)
        step = length / count.clamp_min(1)
        start = low[:, None] + bin * length + step / 2
        step, count = step.expand_as(start), count.expand_as(start)
    return Axis(
        torch.where(defined, size, torch.nan),
        torch.where(defined[:, None], start, torch.nan),
        step,
        torch.where(defined[:, None], count, 0),
    )


def _round(numbers: Tensor) -> Tensor:
    """Round to integers, halves away from zero."""
    whole = numbers.trunc()
    rest = numbers - whole
    return whole + (rest >= 0.5).to(whole.dtype) - (rest <= -0.5).to(whole.dtype)


class Grid(NamedTuple):
    """The samples of all bins along one axis, shifted; every tensor is [B].

    Only the samples first .. first + needed - 1 can lie on the map.
    """

    start: Tensor
    step: Tensor
    number: Tensor
    first: Tensor
    needed: Tensor

    def at(self, chosen: Tensor | slice) -> "Grid":
        return Grid(*(tensor[chosen] for tensor in self))


def _most(size: int, sampling: str, samples_per_bin: int) -> int:
    """The largest number of samples that a bin can need on a map of this size, for any box.

    The step is 1 for "bins", and more than a half wherever an adapting bin has several samples.
    """
    if sampling == "bins":
        return size + 5
    return samples_per_bin if samples_per_bin > 0 else 2 * size + 7


def _grid(start: Tensor, step: Tensor, number: Tensor, size: int, most: int) -> Grid:
    # One sample more at each end than lies within [-1, size], for the sake of rounding.
    at = start.detach()
    first, last = ((-1 - at) / step).floor() - 1, ((size - at) / step).floor() + 1
    # Backwards, in boxes that are turned inside out, no sample is left out.
    first = torch.where(step > 0, first.nan_to_num(0), 0).clamp_min(0)
    last = torch.where(step > 0, last.nan_to_num(-1), number).clamp_min(-1)
    first, last = torch.minimum(first, number), torch.minimum(last, number - 1)
    return Grid(start, step, number, first, (last - first + 1).clamp(0, most))


def _chunks(
    rows: Tensor, columns: Tensor, channels: int
) -> tuple[Tensor, list[tuple[Tensor, int, int]]]:
    """Divide all bins into chunks of equal numbers of samples, of at most `_CHUNK` numbers to read.

    Args:
        rows, columns: [B], the numbers of samples on the two axes.
        channels: the number of values at a pixel.

    Returns:
        The order of the bins [B]; and for each chunk its bins, rows and columns.
    """
    kinds, kind, sizes = torch.stack([rows, columns], dim=1).unique(
        dim=0, return_inverse=True, return_counts=True
    )
    order = kind.argsort(stable=True)
    chunks = []
    for chosen, (height, width) in zip(
        order.split(sizes.tolist()), kinds.long().tolist(), strict=True
    ):
        length = max(1, _CHUNK // max(1, 4 * height * width * channels))
        chunks.extend((some, height, width) for some in chosen.split(length))
    # Without a bin there is nothing to read, but a result to be made all the same.
    return order, chunks or [(order, 0, 0)]


class AxisRead(NamedTuple):
    """The pixels that the samples of bins read along one axis, two for each sample: [B, 2*S]."""

    pixel: Tensor
    weight: Tensor
    counts: Tensor  # whether the pixel lies on the map and its sample is one of the bin's
    inside: Tensor  # [B], the number of samples that are not skipped


def read_axis(grid: Grid, samples: int, size: int, sampling: str) -> AxisRead:
    """One axis of bilinear interpolation.

    At integers the cell is the one to the right, and so is the derivative.
    """
    sample = torch.arange(samples, dtype=grid.first.dtype, device=grid.first.device)
    sample = grid.first[:, None] + sample
    position = grid.start[:, None] + sample * grid.step[:, None]
    if sampling == "bins":
        # Equations 3-4: the map is zero outside.
        within = (position >= -1) & (position < size)
    elif sampling == "msra":
        within = (position >= -0.5) & (position <= size - 0.5)
    else:
        within = (position >= -1) & (position <= size)
    within = within & (sample < grid.number[:, None])
    # From here on all positions are finite and small; where() keeps the others' gradients out.
    position = torch.where(within, position, 0)
    if sampling != "bins":
        # Beyond the last pixel's center the value is the last pixel's.
        position = torch.where(position < 0, 0, position)
        position = torch.where(position > size - 1, size - 1, position)
    low = position.detach().floor()
    right = position - low
    high = low + 1 if sampling == "bins" else (low + 1).clamp_max(size - 1)
    pixel = torch.cat([low, high], dim=1)
    counts = torch.cat([within, within], dim=1) & (pixel >= 0) & (pixel < size)
    return AxisRead(
        torch.where(counts, pixel, 0).long(),
        torch.cat([1 - right, right], dim=1),
        counts,
        within.sum(1),
    )


def _sum(table: Tensor, origin: Tensor, y: AxisRead, x: AxisRead, width: int) -> Tensor:
    """The sum [B, C/G] over the samples of each bin."""
    pixel = origin[:, None, None] + y.pixel[:, :, None] * width + x.pixel[:, None, :]
    values = table.index_select(0, pixel.flatten()).reshape(*pixel.shape, table.shape[1])
    # Not a product with zero: the map may hold infinities and NaN.
    counts = y.counts[:, :, None] & x.counts[:, None, :]
    values = torch.where(counts[..., None], values, 0)
    y_weight, x_weight = y.weight.to(values.dtype), x.weight.to(values.dtype)
    if not values_known(values) or values.numel() == 0:
        return torch.einsum("byxc,by,bx->bc", values, y_weight, x_weight)
    # The same in an order that does not depend on the number of channels: groups that move alike
    # give the bits of a single one.
    rows = values.new_zeros(*values.shape[:2], values.shape[3])
    for column, weight in zip(values.unbind(2), x_weight.unbind(1), strict=True):
        rows = rows + column * weight[:, None, None]
    total = values.new_zeros(values.shape[0], values.shape[3])
    for row, weight in zip(rows.unbind(1), y_weight.unbind(1), strict=True):
        total = total + row * weight[:, None]
    return total
