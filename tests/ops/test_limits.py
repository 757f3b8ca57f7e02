"""The largest sizes, and the next: see "Size limits" in docs/operators.md.

All elements of a tensor share one place in memory. Kernels that would copy them are not run at a
limit; only the check at their beginning is called.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from deformnet.ops import backends, deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from deformnet.ops._arguments import MOST, MOST_PADDING, MOST_SIDE, check_sides
from deformnet.ops.deform_conv.checks import Geometry, check_framed
from deformnet.ops.deform_conv.operator import OPERATOR
from deformnet.ops.roi_pool.checks import MOST_SAMPLES, Rule

needs_cpu = pytest.mark.skipif(
    backends.CPU_UNAVAILABLE is not None, reason=str(backends.CPU_UNAVAILABLE)
)
INT32 = 2**31 - 1


def shared(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that share one place in memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


# ------------------------------------------------------------------------ deformable convolution

# Rows and columns of the largest maps.
FRAMED = [(MOST // 2 - 4, 1), (1, MOST // 5 - 1), (44721 - 4, 44721 - 1), (10**6 - 4, 2000 - 1)]


@pytest.mark.parametrize(("height", "width"), FRAMED)
def test_largest_map_of_a_convolution_on_a_cpu(height, width):
    check_framed(shared(1, 1, height, width))
    # What sampling.h stores in 32 bits. Positions beyond the map are farther out than a pixel by up
    # to half a unit in the last place of float32.
    row, last = width + 1, (height + 4) * (width + 1) + 1
    beyond_y, beyond_x = (1 + size + size * 2**-24 for size in (height, width))
    assert last <= INT32
    assert (beyond_y + 1) * row + beyond_x + 1 <= INT32
    # What it converts to float32 and back.
    assert all(torch.tensor(float(size + 1)).int().item() >= size for size in (height, width))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("height", "width"),
    [(MOST // 2 - 3, 1), (1, MOST // 5), (44721, 44721), (2**30, 1), (2**62, 1)],
)
def test_a_larger_map_of_a_convolution_is_refused_on_a_cpu(height, width, dtype):
    input, weight = shared(1, 1, height, width, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    steps = (MOST_PADDING, MOST_PADDING), (0, 0), (1, 1)
    out = [(size - 1) // MOST_PADDING + 1 for size in (height, width)]
    offset, output = (shared(1, channels, *out, dtype=dtype) for channels in (2, 1))
    wanted = (
        "expected input to have at most 2000000000 pixels with a frame, "
        rf"\(H \+ 4\) \* \(W \+ 1\), but got {height} x {width}"
    )
    geometry, needs = (*steps, "zeros"), [True] * 4 + [False]
    for run in (
        partial(deform_conv2d, input, offset, weight, None, *steps),
        partial(OPERATOR.forward, input, offset, weight, None, None, *geometry),
        partial(OPERATOR.backward, output, input, offset, weight, None, *geometry, needs),
    ):
        with pytest.raises(ValueError, match=wanted):
            run()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("far", [2**24 + 1, 2**28 - 3, MOST_PADDING])
def test_largest_steps(backend, far, axis):
    # Three positions, of which the middle one lies on the map of one pixel.
    steps = [[1, 1], [0, 0], [1, 1]]
    steps[0][axis] = steps[1][axis] = far
    out = [3 if k == axis else 1 for k in (0, 1)]
    tensors = torch.full((1, 1, 1, 1), 7.0), torch.zeros(1, 2, *out), torch.ones(1, 1, 1, 1)
    assert deform_conv2d(*tensors, None, *steps, backend=backend).flatten().tolist() == [0, 7, 0]
    # Three taps, of which the middle one does.
    steps = [[1, 1], [0, 0], [1, 1]]
    steps[1][axis] = steps[2][axis] = far
    kernel = torch.arange(1.0, 4).reshape(1, 1, *out)
    offset = torch.zeros(1, 6, 1, 1)
    found = deform_conv2d(tensors[0], offset, kernel, None, *steps, backend=backend)
    assert found.item() == 14
    offset.requires_grad_()
    deform_conv2d(tensors[0], offset, kernel, None, *steps, backend=backend).sum().backward()
    assert offset.grad.flatten().nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [MOST_PADDING + 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 10**30])
def test_larger_steps_are_refused(backend, name, value):
    for numbers in ((value, 1), (1, value)):
        for input in (torch.ones(1, 1, 1, 1), meta(1, 1, 1, 1).float()):
            offset = torch.zeros(1, 2, 1, 1, device=input.device)
            weight = torch.ones(1, 1, 1, 1, device=input.device)
            wanted = rf"expected {name} to be at most {MOST_PADDING}, but got \({numbers[0]}, "
            with pytest.raises(ValueError, match=wanted):
                deform_conv2d(input, offset, weight, **{name: numbers}, backend=backend)


def test_a_map_with_padding_fits_32_bits():
    # Positions of all backends: stride * position - padding + dilation * tap.
    assert MOST_SIDE + 2 * MOST_PADDING <= MOST <= INT32


# ------------------------------------------------------------------------------------ RoI pooling


def test_largest_map_of_a_pooling():
    for sides in ((MOST_SIDE, 1), (1, MOST_SIDE), (MOST_SIDE, MOST_SIDE)):
        check_sides(shared(1, 1, *sides))
    # Vectors reach beyond the last pixel; and see `_on_map` of triton.py.
    assert MOST_SIDE + 64 <= INT32
    assert 2 * MOST_SIDE + 7 <= INT32


@needs_cpu
@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
@pytest.mark.parametrize("sides", [(MOST_SIDE + 1, 1), (1, MOST_SIDE + 1), (2**31, 3), (1, 2**62)])
def test_a_larger_map_of_a_pooling_is_refused(function, sides):
    input, boxes = shared(1, 1, *sides), torch.zeros(1, 5)
    wanted = "expected input to have at most 1000000000 rows and columns, but got {} x {}"
    with pytest.raises(ValueError, match=wanted.format(*sides)):
        function(input, boxes, None, 1)
    rule = ((1, 1), 1.0, 0.1, "bins", 4, function is deform_ps_roi_pool)
    with pytest.raises(ValueError, match=wanted.format(*sides)):
        torch.ops.deformnet.roi_pool_backward(
            shared(1, 1, 1, 1), input, boxes, None, *rule, [True, False]
        )


@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
def test_largest_number_of_bins_and_samples(backend, function):
    boxes = torch.zeros(0, 5)
    for size in ((MOST, 1), (1, MOST), (40000, 50000)):
        input = shared(1, size[0] * size[1] if function is deform_ps_roi_pool else 1, 1, 1)
        if backend != "reference":  # which has a number for each of them
            assert function(input, boxes, None, size, backend=backend).shape == (0, 1, *size)
    for size in ((MOST + 1, 1), (2**16, 2**16), (2**32, 2**32), (1, 2**63), (10**30, 1)):
        wanted = "expected output_size to have at most 2000000000 bins, but got {} x {}"
        with pytest.raises(ValueError, match=wanted.format(*size)):
            function(shared(1, 1, 1, 1), boxes, None, size, backend=backend)
    input, box = torch.full((1, 1, 3, 3), 5.0), torch.tensor([[0.0, 0, 0, 2, 2]])
    for sampling in ("msra", "aligned"):
        rule = {"sampling": sampling, "samples_per_bin": MOST_SAMPLES, "backend": backend}
        assert function(input, box, None, 1, **rule).item() == pytest.approx(5)
    for samples in (MOST_SAMPLES + 1, 2**31, 2**63, 10**30):
        wanted = f"expected samples_per_bin to be at most 1024, but got {samples}"
        with pytest.raises(ValueError, match=wanted):
            function(input, box, None, 1, samples_per_bin=samples, backend=backend)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["spatial_scale", "gamma"])
def test_numbers_that_are_not_finite_are_refused(backend, name, value):
    tensors, numbers = (torch.ones(1, 1, 1, 1), torch.zeros(1, 5), None), {name: value}
    with pytest.raises(ValueError, match=f"expected {name} to be "):
        deform_roi_pool(*tensors, 1, **numbers, backend=backend)


# -------------------------------------------------------------------------------------- workspace


@needs_cpu
@pytest.mark.parametrize(
    "call",
    [
        lambda input: deform_conv2d(input, torch.zeros(1, 18, 18, 18), torch.ones(64, 64, 3, 3)),
        lambda input: deform_roi_pool(input, torch.zeros(1, 5), None, 7),
    ],
    ids=["deform_conv2d", "roi_pool"],
)
def test_a_workspace_that_no_machine_has_is_refused(monkeypatch, call):
    monkeypatch.setattr(torch, "get_num_threads", lambda: INT32)
    input = torch.ones(1, 64, 20, 20)
    with pytest.raises(MemoryError, match="not enough memory for the workspace of"):
        call(input)


# ----------------------------------------------------------------------------------------- Triton


@pytest.fixture
def kernels():
    """The modules of both operators' Triton kernels."""
    pytest.importorskip("triton")
    from deformnet.ops.deform_conv import triton as deform_conv
    from deformnet.ops.roi_pool import triton as roi_pool

    return deform_conv, roi_pool


SIDES = "input to have at most 1000000000 rows and columns, but got "
NUMBERS = "weight to have at most 2000000000 elements, but got "
GROUPS = "weight to have at most 65535 groups, but got 65536"
OFFSET_GROUPS = "offset to have at most 65535 offset groups, but got 65536"
CHANNELS = "input to have at most 16776960 channels in an offset group, but got 16776961"
TILES = "expected offset to have at most 1073741824 tiles of positions, but got 1073741825"
GEOMETRY = Geometry((1, 1), (0, 0), (1, 1), "zeros")


@pytest.mark.parametrize(
    ("input", "offset", "weight", "wanted"),
    [
        ((1, 1, MOST_SIDE, 1), (1, 2, 1, 1), (1, 1, 1, 1), None),
        ((1, 1, MOST_SIDE + 1, 1), (1, 2, 1, 1), (1, 1, 1, 1), SIDES),
        ((1, 1, 1, 2**31), (1, 2, 1, 1), (1, 1, 1, 1), SIDES),
        ((1, 1, 1, 1), (1, 2, 1, 1), (MOST, 1, 1, 1), None),
        ((1, 1, 1, 1), (1, 2, 1, 1), (MOST + 1, 1, 1, 1), NUMBERS),
        ((1, 1, 1, 1), (1, 2**33, 1, 1), (1, 1, 2**16, 2**16), NUMBERS),
        # Groups are programs in the second dimension of a grid, unless they are narrow.
        ((1, 65535, 1, 1), (1, 2, 1, 1), (17 * 65535, 1, 1, 1), None),
        ((1, 65536, 1, 1), (1, 2, 1, 1), (17 * 65536, 1, 1, 1), GROUPS),
        ((1, 65536, 1, 1), (1, 2, 1, 1), (65536, 1, 1, 1), None),
        ((1, 65535, 1, 1), (1, 2 * 65535, 1, 1), (65535, 1, 1, 1), None),
        ((1, 65536, 1, 1), (1, 2 * 65536, 1, 1), (65536, 1, 1, 1), OFFSET_GROUPS),
        ((2**40, 1, 1, 1), (2**40, 2, 1, 1), (1, 1, 1, 1), None),
    ],
)  # fmt: skip
def test_largest_sizes_of_a_convolution_on_a_gpu(kernels, input, offset, weight, wanted):
    tensors = meta(*input), meta(*offset), meta(*weight), None
    if wanted is None:
        kernels[0]._Call.of(*tensors, GEOMETRY)
        return
    with pytest.raises(ValueError, match=f"expected {wanted}"):
        kernels[0]._Call.of(*tensors, GEOMETRY)


def test_largest_grid_of_a_convolution(kernels):
    call = kernels[0]._Call.of(meta(1, 1, 1, 1), meta(1, 2, 1, 1), meta(1, 1, 1, 1), None, GEOMETRY)
    with pytest.raises(ValueError, match=TILES):
        call.launch(None, (2**30 + 1, 1), None, meta(1))


@pytest.mark.parametrize(
    ("input", "boxes", "groups", "bins", "wanted"),
    [
        ((1, 1, 1, MOST_SIDE), 1, 0, 1, None),
        ((1, 1, 1, MOST_SIDE + 1), 1, 0, 1, SIDES),
        ((1, 65535 * 256, 1, 1), 1, 0, 1, None),
        ((1, 65535 * 256 + 1, 1, 1), 1, 0, 1, CHANNELS),
        ((1, MOST, 1, 1), 1, 1000, 1, None),
        ((1, MOST + 1000, 1, 1), 1, 1000, 1, "input to have at most 2000000000 channels"),
        ((1, 1, 1, 1), 2**37, 0, 1, None),
        ((1, 1, 1, 1), 2**37 + 1, 0, 1, "boxes to have at most 137438953472 bins"),
        ((1, 1, 1, 1), 1, 0, MOST, None),
    ],
)  # fmt: skip
def test_largest_sizes_of_a_pooling_on_a_gpu(kernels, input, boxes, groups, bins, wanted):
    offset = meta(boxes, 2 * groups, bins, 1) if groups else None
    rule = Rule((bins, 1), 1.0, 0.1, "bins", 4, False)
    if wanted is None:
        kernels[1]._Call.of(meta(*input), meta(boxes, 5), offset, rule)
        return
    with pytest.raises(ValueError, match=f"expected {wanted}"):
        kernels[1]._Call.of(meta(*input), meta(boxes, 5), offset, rule)
