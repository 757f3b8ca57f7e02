"""Deformable convolution in standard operators, for exported programs and ONNX graphs.

Computes the same as the reference, but all taps at once, which takes fewer operators, but memory
for the values of all taps.
"""

import torch
from torch import Tensor

from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.deform_conv.reference import read


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """`deformnet.ops.deform_conv2d`; the arguments are checked."""
    stride, padding, dilation, border = geometry
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    out_height, out_width = offset.shape[2:]
    taps, positions = kh * kw, out_height * out_width
    offset_groups, groups = offset.shape[1] // (2 * taps), channels // group_channels
    dtype = torch.promote_types(input.dtype, torch.float32)

    y0 = _places(out_height, stride[0], padding[0], kh, dilation[0], offset)[:, None, :, None]
    x0 = _places(out_width, stride[1], padding[1], kw, dilation[1], offset)[None, :, None, :]
    shifts = offset.to(dtype).reshape(n, offset_groups, kh, kw, 2, out_height, out_width)
    y = (y0.to(dtype) + shifts[:, :, :, :, 0]).reshape(n, offset_groups, taps * positions)
    x = (x0.to(dtype) + shifts[:, :, :, :, 1]).reshape(n, offset_groups, taps * positions)
    maps = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, height, width)
    samples = read(maps, y, x, border)
    if mask is not None:
        samples = samples * mask.to(dtype).reshape(n, offset_groups, 1, taps * positions)
    columns = samples.reshape(n, groups, group_channels * taps, positions)
    filters = weight.to(dtype).reshape(groups, out_channels // groups, group_channels * taps)
    output = (filters @ columns).reshape(n, out_channels, out_height, out_width)
    if bias is not None:
        output = output + bias.to(dtype)[:, None, None]
    return output.to(input.dtype)


def _places(size: int, stride: int, padding: int, taps: int, dilation: int, like: Tensor) -> Tensor:
    """Positions [taps, size] of the taps of a kernel along one axis, without offsets."""
    starts = torch.arange(size, device=like.device) * stride - padding
    return starts + torch.arange(taps, device=like.device)[:, None] * dilation
