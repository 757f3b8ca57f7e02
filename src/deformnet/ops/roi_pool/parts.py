"""Offsets of parts as offsets of bins (rule "msra"), for the kernels and the reference."""

import torch
from torch import Tensor


def _part(axis: int, offset: Tensor, bins: int) -> Tensor | None:
    """The part of each bin, or None if parts are bins."""
    parts = offset.shape[axis]
    return None if parts == bins else torch.arange(bins, device=offset.device) * parts // bins


def of_bins(offset: Tensor, output_size: tuple[int, int]) -> Tensor:
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


def of_parts(grad: Tensor, offset: Tensor) -> Tensor:
    """The gradient of `offset`, from that of the bins' offsets."""
    for axis in (3, 2):
        part = _part(axis, offset, grad.shape[axis])
        if part is not None:
            sums = list(grad.shape)
            sums[axis] = offset.shape[axis]
            grad = grad.new_zeros(sums).index_add_(axis, part, grad)
    return grad.to(offset.dtype)
