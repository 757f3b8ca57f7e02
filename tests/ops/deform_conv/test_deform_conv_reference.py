"""The reference against the paper's formulas, written as loops over Python numbers."""

import math
from dataclasses import replace

import pytest
import torch
from deform_conv_cases import EVERY_BORDER, Case, random_case
from operator_testing import Normal
from torch.autograd import gradcheck, gradgradcheck

from deformnet.ops import deform_conv2d


def read_zeros(plane: list[list[float]], y: float, x: float) -> float:
    """Equations 3-4, to the letter: a sum over the whole map."""
    return sum(
        max(0.0, 1 - abs(qx - x)) * max(0.0, 1 - abs(qy - y)) * value
        for qy, row in enumerate(plane)
        for qx, value in enumerate(row)
    )


def read_msra2017(plane: list[list[float]], y: float, x: float) -> float:
    """Nothing outside [0, H) x [0, W); beyond the last row or column the value there."""
    height, width = len(plane), len(plane[0])
    if not (0 <= y < height and 0 <= x < width):
        return 0.0
    return read_zeros(plane, min(y, height - 1), min(x, width - 1))


READ = {"zeros": read_zeros, "msra2017": read_msra2017}


def naive(case: Case, border: str) -> torch.Tensor:
    """Equation 2 with mask, bias, groups and offset groups, one number at a time."""
    channels = case.input.shape[1]
    out_channels, group_channels, kh, kw = case.weight.shape
    groups = channels // group_channels
    offset_groups = case.offset.shape[1] // (2 * kh * kw)
    planes, offset, weight = case.input.tolist(), case.offset.tolist(), case.weight.tolist()
    mask = None if case.mask is None else case.mask.tolist()
    output = torch.empty(case.output_size(), dtype=torch.float64)
    for n, o, i, j in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        total = 0.0 if case.bias is None else case.bias[o].item()
        for c in range(group_channels):
            channel = o // (out_channels // groups) * group_channels + c
            g = channel // (channels // offset_groups)
            for tap in range(kh * kw):
                p, q = divmod(tap, kw)
                at = 2 * (g * kh * kw + tap)
                y = i * case.stride[0] - case.padding[0] + p * case.dilation[0]
                x = j * case.stride[1] - case.padding[1] + q * case.dilation[1]
                value = READ[border](
                    planes[n][channel], y + offset[n][at][i][j], x + offset[n][at + 1][i][j]
                )
                if mask is not None:
                    value *= mask[n][g * kh * kw + tap][i][j]
                total += weight[o][c][p][q] * value
        output[n, o, i, j] = total
    return output


def cost(case: Case) -> int:
    """Numbers that the loops look at."""
    return math.prod(case.output_size()) * case.weight[0].numel() * case.input[0, 0].numel()


SMALL = [seed for seed in range(400) if cost(random_case(seed)) < 60_000][:40]


@EVERY_BORDER
@pytest.mark.parametrize("seed", SMALL)
def test_loops(seed, border):
    case = random_case(seed)
    found = deform_conv2d(*case.public, border=border, backend="reference")
    torch.testing.assert_close(found, naive(case, border), rtol=1e-12, atol=1e-12)


def test_loops_see_both_border_rules_differ():
    case = random_case(SMALL[0])
    assert not torch.allclose(naive(case, "zeros"), naive(case, "msra2017"))


def leaves_and_function(case: Case, backend: str, border: str):
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors.values()]

    def function(*tensors):
        given = replace(case, **dict(zip(case.tensors, tensors, strict=True)))
        return deform_conv2d(*given.public, border=border, backend=backend)

    return leaves, function


# Offsets keep away from whole numbers, where the bilinear read has kinks.
# Numerical Jacobians call the function once for every number.
TINY = [
    seed
    for seed in range(400)
    if sum(tensor.numel() for tensor in random_case(seed, whole=False).tensors.values()) < 250
]


@EVERY_BORDER
@pytest.mark.parametrize("seed", TINY[:16])
def test_gradcheck(backend, seed, border):
    case = random_case(seed, whole=False)
    leaves, function = leaves_and_function(case, backend, border)
    assert gradcheck(function, leaves)


@EVERY_BORDER
@pytest.mark.parametrize("seed", TINY[:6])
def test_gradgradcheck(seed, border):
    case = random_case(seed, whole=False)
    leaves, function = leaves_and_function(case, "reference", border)
    assert gradgradcheck(function, leaves, fast_mode=True)


def tvdcn_case(batch, channels, groups, sizes, steps, masked) -> Case:
    """A test case of tvdcn, whose masks may have fewer groups than its offsets."""
    (in_channels, out_channels), (weight_groups, offset_groups, mask_groups) = channels, groups
    (size, kernel), (stride, padding, dilation) = sizes, steps
    terms = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in terms]
    normal, taps = Normal(12), kernel[0] * kernel[1]
    mask = normal(batch, mask_groups * taps, *out)
    return Case(
        normal(batch, in_channels, *size),
        normal(batch, 2 * offset_groups * taps, *out),
        normal(out_channels, in_channels // weight_groups, *kernel),
        normal(out_channels),
        mask.repeat(1, offset_groups // mask_groups, 1, 1) if masked else None,
        *(stride, padding, dilation),
    )


_5X6, _5X4 = ((5, 6), (2, 3)), ((5, 4), (3, 2))
_UNIT, _LONG, _HIGH = (
    ((1, 1), (0, 0), (1, 1)),
    ((1, 2), (0, 1), (1, 2)),
    ((2, 1), (1, 0), (2, 1)),
)
TVDCN = {
    "gradients": (1, (4, 2), (1, 2, 1), _5X6, _LONG),
    "gradients, unit steps": (1, (4, 2), (1, 2, 1), _5X6, _UNIT),
    "as torchvision": (1, (4, 2), (1, 1, 1), _5X6, _LONG),
    "all operators": (1, (6, 2), (2, 3, 3), _5X4, _HIGH),
    "large batch": (33, (6, 2), (2, 3, 3), _5X4, _HIGH),
}


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("name", TVDCN)
def test_cases_of_tvdcn(backend, name, masked):
    """For 2-D convolution, from versions 0.1 to 1.1."""
    case = tvdcn_case(*TVDCN[name], masked)
    found = deform_conv2d(*case.public, backend=backend)
    torch.testing.assert_close(found, naive(case, "zeros"), rtol=1e-12, atol=1e-12)
    leaves, function = leaves_and_function(case, backend, "zeros")
    assert gradcheck(function, leaves, fast_mode=True)


@EVERY_BORDER
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_derivative_at_whole_numbers_is_the_one_from_the_right(backend, border, axis):
    # Positions from two pixels outside on the one side to two outside on the other.
    height, width = 4, 5
    normal = Normal()
    input, weight = normal(1, 2, height, width), normal(1, 2, 1, 1)
    offset = torch.zeros(1, 2, height + 4, width + 4, dtype=torch.float64, requires_grad=True)

    def value(offset):
        return deform_conv2d(input, offset, weight, padding=2, border=border, backend=backend)

    (gradient,) = torch.autograd.grad(value(offset).sum(), offset)
    step = torch.zeros_like(offset)
    step[:, axis] = 2**-20
    # Inside a cell the read is linear along each axis: the quotient is the derivative.
    quotient = (value(offset + step) - value(offset)).detach()[:, 0] / 2**-20
    torch.testing.assert_close(gradient[:, axis], quotient, rtol=0, atol=1e-8)
    assert quotient.abs().max() > 0.1
