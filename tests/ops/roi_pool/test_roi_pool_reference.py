"""The reference against the rules of sampling, written as loops over Python numbers."""

from dataclasses import replace

import pytest
import torch
from operator_testing import Normal, assert_same
from roi_pool_cases import EVERY_SAMPLING, ROI_OR_PS, Case, call, output_gradient, random_case, run
from roi_pool_loops import naive
from torch.autograd import gradcheck, gradgradcheck

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("seed", range(34))
def test_loops(seed, sampling, position_sensitive):
    case = random_case(seed, sampling, position_sensitive)
    grad_output = output_gradient(case)
    assert_same(run(case, "reference", grad_output), naive(case, grad_output), 1e-10)


def test_the_cases_are_worth_looping_over():
    cases = [random_case(seed, "msra", True) for seed in range(34)]
    outputs = [call(case, "reference") for case in cases]
    assert sum(case.offset is not None for case in cases) > 15
    assert sum(bool((output == 0).any()) for output in outputs) > 5
    assert sum(bool((output != 0).any()) for output in outputs) > 28
    groups = {case.offset.shape[1] // 2 for case in cases if case.offset is not None}
    assert groups == {1, 2, 3}


def test_boxes_are_rounded_half_away_from_zero():
    # One row of pixels, 100 + their index; a box of one bin gives the mean of its pixels.
    input = 100 + torch.arange(10, dtype=torch.float64).reshape(1, 1, 1, 10)

    def pixels(x1: float, x2: float, scale: float = 1.0, **options) -> float:
        boxes = torch.tensor([[0, x1, 0, x2, 0]], dtype=torch.float64)
        return deform_roi_pool(input, boxes, None, 1, scale, backend="reference", **options).item()

    assert pixels(2, 5) == 103.5
    assert pixels(2.5, 4.5) == 104
    assert pixels(2.49, 4.49) == 103
    # Rounded after scaling: 40/16 = 2.5 and 72/16 = 4.5.
    assert pixels(40, 72, 1 / 16) == 104
    # The largest number below a half is not one.
    assert pixels(0.49999999999999994, 0) == 100
    # -0.5 is rounded to -1, where the map is zero.
    assert pixels(-0.5, 0) == 50
    # "msra" rounds before scaling: [2, 3) and [3, 4) at half the size are the pixel 1 and a half,
    # read at its left end and in its middle, half a pixel to the left of both.
    assert pixels(2.5, 2.5, 0.5, sampling="msra", samples_per_bin=1) == 101
    assert pixels(3, 3, 0.5, sampling="msra", samples_per_bin=2) == pytest.approx(101.125)


def test_a_bin_of_the_authors_kernel_skips_samples_outside():
    # A box of which all but the last pixel lies left of the map.
    input = torch.tensor([[[[7.0, 9.0, 11.0]]]], dtype=torch.float64)
    boxes = torch.tensor([[0, -3, 0, 0, 0]], dtype=torch.float64)
    arguments = {"sampling": "msra", "samples_per_bin": 4, "backend": "reference"}
    # Samples at -3.5, -2.5, -1.5 and -0.5.
    assert deform_roi_pool(input, boxes, None, 1, **arguments).item() == 7
    assert deform_roi_pool(input, boxes, None, (1, 2), **arguments).flatten().tolist() == [0, 7]


def test_bins_overlap_where_they_share_a_pixel():
    # Three pixels in two bins: pixels 0 and 1, pixels 1 and 2.
    input = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 0, 2, 0]], dtype=torch.float64)
    found = deform_roi_pool(input, boxes, None, (1, 2), backend="reference")
    assert found.flatten().tolist() == [1.5, 3]


def test_the_shift_is_in_box_sizes(backend):
    # A bump at (y 3, x 6); a box of one bin that starts at (1, 2), 4 wide and 1 high.
    input = torch.zeros(1, 1, 8, 9, dtype=torch.float64)
    input[0, 0, 3, 6] = 1
    boxes = torch.tensor([[0, 2, 1, 5, 1]], dtype=torch.float64)
    offset = torch.tensor([4 / 4, 2 / 1], dtype=torch.float64).reshape(1, 2, 1, 1)
    found = deform_roi_pool(input, boxes, offset, 1, 1, 1.0, backend=backend)
    assert found.item() == 0.25
    assert deform_roi_pool(input, boxes, offset.flip(1), 1, 1, 1.0, backend=backend).item() == 0


# Numerical Jacobians call the function once for every number.
TINY = [
    seed
    for seed in range(400)
    if sum(t.numel() for t in random_case(seed, "bins", True, shifted=True).leaves.values()) < 150
]


def leaves_and_function(case: Case, backend: str):
    leaves = [tensor.clone().requires_grad_() for tensor in case.leaves.values()]

    def function(input, offset=None):
        return call(replace(case, input=input, offset=offset), backend)

    return leaves, function


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("seed", TINY[:5])
def test_gradcheck(backend, seed, sampling, position_sensitive):
    case = random_case(seed, sampling, position_sensitive, shifted=True)
    leaves, function = leaves_and_function(case, backend)
    assert gradcheck(function, leaves)


@EVERY_SAMPLING
@pytest.mark.parametrize("seed", TINY[:4])
def test_gradgradcheck(seed, sampling):
    case = random_case(seed, sampling, shifted=True)
    leaves, function = leaves_and_function(case, "reference")
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
@ROI_OR_PS
@EVERY_SAMPLING
def test_derivative_at_whole_numbers_is_the_one_from_the_right(
    backend, sampling, position_sensitive, axis
):
    # Boxes of one bin, one sample and one pixel, on whole positions from two pixels outside on
    # the one side to two outside on the other; zero offsets, as every new layer has.
    height, width = 4, 5
    y, x = torch.meshgrid(torch.arange(-2, height + 2), torch.arange(-2, width + 2), indexing="ij")
    y, x = y.flatten().double(), x.flatten().double()
    # Where the samples of the rules lie in a box: "msra" half a pixel to the left of its edge,
    # "aligned" in the middle of a box from edge to edge.
    ends = {"bins": (0.0, 0.0), "msra": (0.0, 0.0), "aligned": (0.0, 1.0)}[sampling]
    boxes = torch.stack([torch.zeros_like(x), x, y, x + ends[1], y + ends[1]], dim=1)
    input = Normal()(1, 2, height, width)
    offset = torch.zeros(len(boxes), 2, 1, 1, dtype=torch.float64)
    if sampling == "msra":
        offset += 0.5
    offset.requires_grad_()
    function = deform_ps_roi_pool if position_sensitive else deform_roi_pool

    def value(offset):
        return function(
            *(input, boxes, offset, 1, 1.0, 1.0),
            sampling=sampling,
            samples_per_bin=1,
            backend=backend,
        ).sum(1)

    (gradient,) = torch.autograd.grad(value(offset).sum(), offset)
    step = torch.zeros_like(offset)
    step[:, axis] = 2**-20
    # Inside a cell the read is linear along each axis: the quotient is the derivative.
    change = value(offset + step) - value(offset)
    quotient = change.detach().flatten() / 2**-20
    # But "msra" and "aligned" fall to zero at once where the map ends: no derivative there.
    smooth = change.detach().flatten().abs() < 0.01
    assert (~smooth).sum() == (0 if sampling != "aligned" else [6, 7][axis])
    torch.testing.assert_close(
        gradient[smooth, axis].flatten(), quotient[smooth], rtol=0, atol=1e-8
    )
    assert quotient[smooth].abs().max() > 0.1
