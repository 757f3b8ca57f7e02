"""Deformable convolution in plain PyTorch, as the paper defines it: a sum over the kernel's taps.

Letters: N batch, C channels, H W height and width of the input, G offset groups, P = Ho*Wo output
positions, (y, x) a sampling position in pixels of the input.
"""

import torch
from torch import Tensor

from deformnet.ops.deform_conv.checks import Geometry


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Equation 2 of Dai et al. 2017, with the mask of modulated convolution (Zhu et al. 2019).

    Shapes are those of `deformnet.ops.deform_conv2d`, already checked. Computes in float64 for
    float64 and in float32 for all other dtypes. Differentiable any number of times; the memory
    that autograd holds grows with the number of taps.

    Returns:
        [N, C_out, Ho, Wo], contiguous, of the dtype of `input`.
    """
    stride, padding, dilation, border = geometry
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    out_height, out_width = offset.shape[2:]
    offset_groups = offset.shape[1] // (2 * kh * kw)
    groups = channels // group_channels
    positions = out_height * out_width

    # Halves are exact in float32, so nothing is lost before the single rounding at the end.
    dtype = torch.promote_types(input.dtype, torch.float32)
    maps = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, height, width)
    # The pair is (y, x).
    shifts = offset.to(dtype).reshape(n, offset_groups, kh, kw, 2, positions)
    filters = weight.to(dtype).reshape(groups, out_channels // groups, group_channels, kh, kw)
    if mask is not None:
        mask = mask.to(dtype).reshape(n, offset_groups, kh, kw, positions)

    # p0 of Equation 2, in integers: where the kernel's first tap lies without an offset.
    rows = torch.arange(out_height, device=input.device) * stride[0] - padding[0]
    columns = torch.arange(out_width, device=input.device) * stride[1] - padding[1]
    y0 = rows[:, None].expand(out_height, out_width).reshape(positions)
    x0 = columns[None, :].expand(out_height, out_width).reshape(positions)

    output = maps.new_zeros(n, groups, out_channels // groups, positions)
    for i in range(kh):
        for j in range(kw):
            y = (y0 + i * dilation[0]).to(dtype) + shifts[:, :, i, j, 0]
            x = (x0 + j * dilation[1]).to(dtype) + shifts[:, :, i, j, 1]
            samples = read(maps, y, x, border)
            if mask is not None:
                samples = samples * mask[:, :, i, j, None]
            samples = samples.reshape(n, groups, group_channels, positions)
            output = output + torch.einsum("goc,ngcp->ngop", filters[..., i, j], samples)

    output = output.reshape(n, out_channels, out_height, out_width)
    if bias is not None:
        output = output + bias.to(dtype)[:, None, None]
    return output.to(input.dtype)


def read(maps: Tensor, y: Tensor, x: Tensor, border: str) -> Tensor:
    """Interpolate `maps` [N, G, C/G, H, W] at `y`, `x` [N, G, P] bilinearly (Equations 3-4).

    `border="zeros"`: the map is zero outside, so less than one pixel outside of it the corners
    that lie inside still count. `border="msra2017"`: nothing is read outside [0, H) x [0, W), and
    beyond the last row or column the value is that of the last row or column.

    At a NaN position the value and its derivative by the position are NaN, and no gradient reaches
    the map. At all other positions outside (infinite ones, too) all three are zero.

    Returns:
        [N, G, C/G, P].
    """
    height, width = maps.shape[3:]
    # On each axis the positions from which anything is read are [first, size).
    first = -1 if border == "zeros" else 0
    undefined = y.isnan() | x.isnan()
    within = (y >= first) & (y < height) & (x >= first) & (x < width)

    # From here on all positions are finite and small; where() keeps the others' gradients out.
    safe_y = torch.where(within, y, 0)
    safe_x = torch.where(within, x, 0)
    if border == "msra2017":
        safe_y = torch.where(safe_y >= height - 1, height - 1, safe_y)
        safe_x = torch.where(safe_x >= width - 1, width - 1, safe_x)

    # At integers the cell is the one to the right, and so is the derivative.
    top, left = safe_y.detach().floor(), safe_x.detach().floor()
    down, right = safe_y - top, safe_x - left
    values = (
        _corner(maps, top, left, within) * ((1 - down) * (1 - right))[:, :, None]
        + _corner(maps, top, left + 1, within) * ((1 - down) * right)[:, :, None]
        + _corner(maps, top + 1, left, within) * (down * (1 - right))[:, :, None]
        + _corner(maps, top + 1, left + 1, within) * (down * right)[:, :, None]
    )
    # The square of a NaN, because then the derivative is NaN as well.
    poison = torch.where(undefined, y + x, 0)
    return torch.where(undefined[:, :, None], (poison * poison)[:, :, None], values)


def _corner(maps: Tensor, y: Tensor, x: Tensor, within: Tensor) -> Tensor:
    """Values of `maps` [N, G, C/G, H, W] at integer `y`, `x` [N, G, P], zero outside the map."""
    channels, height, width = maps.shape[2:]
    inside = within & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = torch.where(inside, y, 0).long() * width + torch.where(inside, x, 0).long()
    values = maps.flatten(3).gather(3, index[:, :, None].expand(-1, -1, channels, -1))
    # Not a product with zero: the map may hold infinities and NaN.
    return torch.where(inside[:, :, None], values, 0)
