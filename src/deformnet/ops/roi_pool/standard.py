"""RoI pooling in standard operators, for exported programs and ONNX graphs.

Computes the same as the reference, but without data-dependent shapes, and memory does not grow with
the size of a box. A NaN or infinity in the map may affect more bins than those that read it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.roi_pool.reference import AxisRead, Bins, Grid, Samples, bins_of, read_axis


def roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Tensor:
    """`deformnet.ops.deform_roi_pool` and `deform_ps_roi_pool`; the arguments are checked.

    Raises:
        ValueError: if `samples_per_bin` is 0.
    """
    if rule.sampling != "bins" and rule.samples_per_bin == 0:
        raise ValueError(
            "expected samples_per_bin to be at least 1 in an exported program, whose shapes cannot "
            "depend on the boxes, but got 0; set samples_per_bin=2, or use another sampling rule"
        )
    bins = bins_of(input, boxes, offset, rule)
    if rule.sampling == "bins":
        return _whole_pixels(input, bins)
    return _fixed_number(input, bins, rule)


def _whole_pixels(input: Tensor, bins: Bins) -> Tensor:
    """Rule "bins": the samples of a bin are one pixel apart, so their sum is that of rectangles.

    Differences of cumulative sums over the map sum a rectangle in constant time. In float32, they
    would lose four digits.
    """
    height, width = input.shape[2:]
    maps = F.pad(input.double(), (1, 0, 1, 0)).cumsum(2).cumsum(3)
    table, origin = bins.table(maps), bins.plane * ((height + 1) * (width + 1))
    y, x = _ends(bins.y, height), _ends(bins.x, width)
    sums = _sum(table, origin, y, x, width + 1).to(_dtype(input))
    return bins.means(sums, bins.y.number * bins.x.number, input)


def _ends(samples: Samples, size: int) -> AxisRead:
    """Cumulative sums whose weighted sum is that of the samples of each bin, along one axis.

    A sample at start + s reads (1 - right) * map[low + s] + right * map[low + s + 1].
    """
    # Samples beyond these limits are outside the map as well, so every sum is 0.
    start = samples.start.clamp(-samples.number - 2, torch.full_like(samples.number, size + 1))
    start = torch.where(start.isnan(), 0, start)
    low = start.detach().floor()
    end, right = low + samples.number, start - low
    pixel = torch.stack([low, low + 1, end, end + 1], dim=1).clamp(0, size)
    weight = torch.stack([right - 1, -right, 1 - right, right], dim=1)
    return AxisRead(pixel.long(), weight, torch.ones_like(pixel).bool(), samples.number)


def _fixed_number(input: Tensor, bins: Bins, rule: Rule) -> Tensor:
    """Rules "msra" and "aligned": `samples_per_bin` samples along each axis of a bin."""
    height, width = input.shape[2:]
    table = bins.table(input.to(_dtype(input)))
    y, x = (
        read_axis(
            Grid(*samples, torch.zeros_like(samples.number), samples.number),
            rule.samples_per_bin,
            size,
            rule.sampling,
        )
        for samples, size in ((bins.y, height), (bins.x, width))
    )
    sums = _sum(table, bins.plane * (height * width), y, x, width)
    inside = y.inside * x.inside
    number = inside if rule.sampling == "msra" else bins.y.number * bins.x.number
    return bins.means(sums, number, input)


def _sum(table: Tensor, origin: Tensor, y: AxisRead, x: AxisRead, width: int) -> Tensor:
    """The sum [B, C/G] over the samples of each bin, row by row."""
    rows = origin[:, None] + y.pixel * width
    row_weights = torch.where(y.counts, y.weight, 0).to(table.dtype)[:, :, None]
    weights = torch.where(x.counts, x.weight, 0).to(table.dtype)[:, None]
    total = table.new_zeros(())
    for row in range(y.pixel.shape[1]):
        at = slice(row, row + 1)
        # For the fewest ONNX nodes: one that reads all pixels, and slices that keep the dimension.
        values = F.embedding(rows[:, at] + x.pixel, table)
        total = total + torch.bmm(weights * row_weights[:, at], values)
    return total[:, 0]


def _dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)
