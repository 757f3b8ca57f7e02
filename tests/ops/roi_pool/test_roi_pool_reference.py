"""The reference against the rules of sampling, written as loops over Python numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from operator_testing import Normal, assert_same
from roi_pool_cases import EVERY_SAMPLING, ROI_OR_PS, Case, call, output_gradient, random_case, run
from torch.autograd import gradcheck, gradgradcheck

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool

# Of one sample on one axis: the pixels read, with their weights and the weights' derivatives.
Read = list[tuple[int, float, float]]


def half_away(number: float) -> int:
    return int(math.copysign(math.floor(abs(number) + 0.5), number))


def read_zeros(position: float, size: int) -> Read:
    """Equation 4 on one axis; the derivative is the one from the right."""
    if not -1 <= position < size:
        return []
    return [
        (q, 1 - abs(q - position), 1.0 if position < q else -1.0)
        for q in range(size)
        if q - 1 <= position < q + 1
    ]


def read_clamped(position: float, size: int) -> Read:
    """Beyond the first and the last pixel, their values."""
    if 0 <= position < size - 1:
        return read_zeros(position, size)
    return [(0 if position < 0 else size - 1, 1.0, 0.0)]


def axis_of_box(case: Case, low: float, high: float, k: int) -> tuple[float, list]:
    """The size of a box on one axis; and of its k bins the positions of all samples, unshifted."""
    scale, samples = case.spatial_scale, case.samples_per_bin
    if case.sampling == "bins":
        first, last = half_away(low * scale), half_away(high * scale)
        size = max(last - first + 1, 1)
        cells = [range(size) for _ in range(k)]
        inside = [
            [p for p in cells[i] if math.floor(i * size / k) <= p < math.ceil((i + 1) * size / k)]
            for i in range(k)
        ]
        return size, [[first + p for p in bin] for bin in inside]
    if case.sampling == "msra":
        start = half_away(low) * scale - 0.5
        size = max((half_away(high) + 1) * scale - 0.5 - start, 0.1)
        bin, shift = size / k, 0.0
    else:
        start = low * scale - 0.5
        size = high * scale - 0.5 - start
        bin, shift = size / k, 0.5
        if samples == 0:
            samples = max(math.ceil(bin), 0)
    return size, [
        [start + i * bin + (s + shift) * (bin / samples) for s in range(samples)] for i in range(k)
    ]


def samples_read(case: Case, positions: list[float], size: int) -> tuple[list[Read], int]:
    """What the samples of a bin read on one axis, and how many of them count in its mean."""
    if case.sampling == "bins":
        return [read_zeros(p, size) for p in positions], len(positions)
    if case.sampling == "msra":
        kept = [read_clamped(p, size) for p in positions if -0.5 <= p <= size - 0.5]
        return kept, len(kept)
    return [read_clamped(p, size) if -1 <= p <= size else [] for p in positions], len(positions)


def naive(case: Case, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values and gradients, one number at a time."""
    _, _, height, width = case.input.shape
    ph, pw = case.output_size
    shape = case.output_size_of()
    maps, boxes, grads = case.input.tolist(), case.boxes.tolist(), grad_output.tolist()
    offset = None if case.offset is None else case.offset.tolist()
    groups = 1 if offset is None else len(offset[0]) // 2
    output = torch.zeros(shape, dtype=torch.float64)
    grad_input = torch.zeros_like(case.input)
    grad_offset = None if case.offset is None else torch.zeros_like(case.offset)

    for r, (image, x1, y1, x2, y2) in enumerate(boxes):
        box_height, rows = axis_of_box(case, y1, y2, ph)
        box_width, columns = axis_of_box(case, x1, x2, pw)
        for g, i, j in itertools.product(range(groups), range(ph), range(pw)):
            dy = dx = 0.0
            if offset is not None:
                part = i * len(offset[r][0]) // ph, j * len(offset[r][0][0]) // pw
                dx = case.gamma * offset[r][2 * g][part[0]][part[1]] * box_width
                dy = case.gamma * offset[r][2 * g + 1][part[0]][part[1]] * box_height
            at_y, number_y = samples_read(case, [y + dy for y in rows[i]], height)
            at_x, number_x = samples_read(case, [x + dx for x in columns[j]], width)
            number = max(number_y * number_x, 1)
            per_group = shape[1] // groups
            for c in range(g * per_group, (g + 1) * per_group):
                channel = (c * ph + i) * pw + j if case.position_sensitive else c
                plane, grad = maps[int(image)][channel], grads[r][c][i][j] / number
                for y_read, x_read in itertools.product(at_y, at_x):
                    for (y, wy, sy), (x, wx, sx) in itertools.product(y_read, x_read):
                        output[r, c, i, j] += wy * wx * plane[y][x] / number
                        grad_input[int(image), channel, y, x] += wy * wx * grad
                        if grad_offset is not None:
                            slope = case.gamma * plane[y][x] * grad
                            at = (r, slice(2 * g, 2 * g + 2), *part)
                            grad_offset[at] += torch.tensor(
                                [slope * wy * sx * box_width, slope * sy * wx * box_height],
                                dtype=torch.float64,
                            )
    results = {"output": output, "grad_input": grad_input}
    return results if grad_offset is None else {**results, "grad_offset": grad_offset}


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
