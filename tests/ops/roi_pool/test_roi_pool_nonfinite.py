"""Infinities, NaN and huge numbers: little memory, no reading outside, nothing else touched."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from both_operators import check_bad_gradients
from operator_testing import (
    Normal,
    assert_nan_at,
    assert_same,
    assert_same_where_finite,
    with_bad_pixels,
)
from roi_pool_cases import EVERY_SAMPLING, ROI_OR_PS, Case, call, random_case, run

from deformnet.ops import deform_ps_roi_pool

NAN, INF = float("nan"), float("inf")
# The bin whose offset is not finite: box, offset group, row and column.
R, GROUP, ROW, COLUMN = 3, 1, 1, 2
# A box far from the map.
OUTSIDE = {"x1": 1e5, "x2": 1e5 + 50, "y1": 1e5, "y2": 1e5 + 50}


def a_case(sampling: str, position_sensitive: bool, shifted: bool = True) -> Case:
    """Two groups of two channels, boxes well inside a map of 9 x 11."""
    normal = Normal()
    corners = torch.rand(6, 4, generator=normal.generator, dtype=torch.float64)
    corners[:, :2] = 16 + 32 * corners[:, :2]
    corners[:, 2:] = corners[:, :2] + 30 + 60 * corners[:, 2:]
    image = torch.arange(6, dtype=torch.float64)[:, None] % 2
    return Case(
        input=normal(2, 4 * (6 if position_sensitive else 1), 9, 11),
        boxes=torch.cat([image, corners], dim=1),
        offset=normal(6, 4, 2, 3).clamp(-2, 2) if shifted else None,
        output_size=(2, 3),
        spatial_scale=1 / 16,
        gamma=0.1,
        sampling=sampling,
        samples_per_bin=3,
        position_sensitive=position_sensitive,
    )


def with_offset(case: Case, y: float | None, x: float | None) -> Case:
    offset = case.offset.clone()
    for k, value in enumerate((x, y)):
        if value is not None:
            offset[R, 2 * GROUP + k, ROW, COLUMN] = value
    return replace(case, offset=offset)


def with_box(case: Case, **corners: float) -> Case:
    boxes = case.boxes.clone()
    for name, value in corners.items():
        boxes[R, ["image", "x1", "y1", "x2", "y2"].index(name)] = value
    return replace(case, boxes=boxes)


def nowhere(found: dict) -> dict:
    return {name: torch.zeros(value.shape, dtype=bool) for name, value in found.items()}


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("y", "x"), [(NAN, None), (None, NAN), (NAN, NAN), (NAN, INF), (-INF, NAN), (1e30, NAN)]
)
def test_nan_offset(backend, y, x, dtype, sampling, position_sensitive):
    case = a_case(sampling, position_sensitive).to(dtype)
    found = run(with_offset(case, y, x), backend)
    # All else is as if that bin were outside.
    clean = run(with_offset(case, 1e4, 1e4), backend)
    reached = nowhere(found)
    reached["output"][R, 2:, ROW, COLUMN] = True
    reached["grad_offset"][R, 2:, ROW, COLUMN] = True
    assert_nan_at(found, clean, reached, 1e-6)


def test_nan_offset_of_a_part_that_moves_several_bins(backend):
    case = a_case("msra", True)
    case = replace(case, offset=case.offset[:, :, :1, :2].clone())
    clean = run(case, backend)
    case.offset[R, 0, 0, 0] = NAN
    found = run(case, backend)
    reached = nowhere(found)
    # Of three columns the first two belong to the first of two parts.
    reached["output"][R, :2, :, :2] = True
    reached["grad_offset"][R, :2, 0, 0] = True
    del found["grad_input"]
    assert_nan_at(found, clean, reached, 1e-6)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [INF, -INF, 1e10, -1e10, 2.0**31, -(2.0**63), 3e38])
def test_infinite_and_huge_offsets_read_outside(
    backend, value, dtype, sampling, position_sensitive
):
    case = a_case(sampling, position_sensitive).to(dtype)
    clean = run(with_offset(case, 1e4, 1e4), backend)
    for y, x in [(value, None), (None, value), (value, -value)]:
        found = run(with_offset(case, y, x), backend)
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert_same(found, clean, 0.0)
    assert not clean["output"][R, 2:, ROW, COLUMN].any()
    assert not clean["grad_offset"][R, 2:, ROW, COLUMN].any()


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("name", ["x1", "y1", "x2", "y2"])
def test_nan_box(backend, name, shifted, sampling, position_sensitive):
    case = a_case(sampling, position_sensitive, shifted)
    found = run(with_box(case, **{name: NAN}), backend)
    # All else is as if that box were outside.
    clean = run(with_box(case, **OUTSIDE), backend)
    reached = nowhere(found)
    reached["output"][R] = True
    if shifted:
        reached["grad_offset"][R] = True
    assert_nan_at(found, clean, reached, 1e-6)


HUGE = [
    {"x2": INF},
    {"y1": -INF},
    {"x1": -INF, "x2": INF},
    {"x1": INF},
    {"x2": 1e9},
    {"x1": -1e9, "x2": 1e9, "y1": -1e9, "y2": 1e9},
    {"x1": -3e37, "x2": 3e37},
    {"y2": 1e30},
    {"x1": 1e30, "x2": -1e30},
    {"x1": 2.0**31, "x2": 2.0**32},
    {"x1": -3e38, "x2": 3e38, "y1": -3e38, "y2": 3e38},
]


@ROI_OR_PS
@pytest.mark.parametrize(
    ("sampling", "samples_per_bin"), [("bins", 3), ("msra", 3), ("aligned", 3), ("aligned", 0)]
)
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("corners", HUGE, ids=str)
def test_huge_boxes(backend, corners, shifted, samples_per_bin, sampling, position_sensitive):
    case = a_case(sampling, position_sensitive, shifted)
    case = replace(case, samples_per_bin=samples_per_bin)
    clean = run(with_box(case, **OUTSIDE), backend)
    for dtype in (torch.float64, torch.float32):
        start = time.perf_counter()
        found = run(with_box(case, **corners).to(dtype), backend)
        assert time.perf_counter() - start < 2
        # The other boxes and the first image, where this box is not, are untouched; this one holds
        # NaN or a mean of values.
        others = {name: torch.arange(6) != R for name in found}
        infinite = any(abs(value) == INF for value in corners.values())
        others["grad_input"] = [0, 1] if infinite else [0]
        for name, rows in others.items():
            torch.testing.assert_close(
                found[name][rows], clean[name][rows], rtol=0, atol=1e-5, check_dtype=False
            )
        assert not found["grad_input"].isnan().any()
        output = found["output"][R]
        assert output.isnan().all() if infinite else not output.isinf().any()
        assert not (output.abs() > case.input.abs().max() + 1e-4).any()


@ROI_OR_PS
@EVERY_SAMPLING
def test_a_large_box_is_averaged_as_in_the_reference(fast, sampling, position_sensitive):
    # Bins that reach over the whole map and far beyond it.
    case = replace(a_case(sampling, position_sensitive), samples_per_bin=4)
    if sampling == "aligned":
        case = replace(case, samples_per_bin=0)
    case = with_box(case, x1=-700, x2=900, y1=-300, y2=2000)
    found, wanted = run(case, fast), run(case, "reference")
    assert_same(found, wanted, 1e-10)
    if sampling != "msra":
        assert wanted["output"][R].count_nonzero() > 0


# In a process of its own: the highest memory use of this one lies behind it.
MEMORY_OF_HUGE_BOXES = """
import resource, sys, torch
from deformnet.ops import deform_roi_pool

def step(size):
    input = torch.randn(1, 64, 40, 60, requires_grad=True)
    boxes = torch.tensor([[0, -size, -size, size, size]]).repeat(8, 1)
    offset = torch.randn(8, 2, 7, 7, requires_grad=True)
    output = deform_roi_pool(
        input, boxes, offset, 7, sampling=sys.argv[1], samples_per_bin=int(sys.argv[2]),
        backend=sys.argv[3],
    )
    torch.autograd.grad(output.sum(), (input, offset))

step(20.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in (1e3, 1e6, 1e12, 1e30):
    step(size)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units")
@pytest.mark.parametrize(("sampling", "samples_per_bin"), [("bins", 4), ("aligned", 0)])
def test_memory_does_not_grow_with_the_boxes(backend, sampling, samples_per_bin):
    command = [sys.executable, "-c", MEMORY_OF_HUGE_BOXES, sampling, str(samples_per_bin), backend]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # One bin of each box holds the whole map, once for every corner that a sample reads.
    limit = {"cpu": 16, "reference": 512}[backend]
    assert grown < limit * 2**20


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_pixels_outside_do_not_count_whatever_the_map_holds(
    backend, bad, sampling, position_sensitive
):
    # A map of which only the pixels that a bin reads are good.
    case = a_case(sampling, position_sensitive)
    case = replace(case, boxes=case.boxes[:1], offset=case.offset[:1])
    reads = run(case, "reference", torch.ones(case.output_size_of(), dtype=torch.float64))
    read = reads["grad_input"] != 0
    # What weight zero makes of a bad pixel is left open: the next row and column stay good, too.
    read[..., 1:, :] |= read[..., :-1, :].clone()
    read[..., 1:] |= read[..., :-1].clone()
    assert 0 < read.sum() < read.numel()
    input = torch.where(read, case.input, bad)
    found = call(replace(case, input=input), backend)
    torch.testing.assert_close(found, call(case, backend), rtol=0, atol=1e-12)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("seed", range(12))
def test_bad_pixels_touch_only_what_reads_them(fast, seed, sampling, position_sensitive):
    # Offsets off the whole numbers: what weight zero makes of a bad pixel is left open.
    case = random_case(seed, sampling, position_sensitive, shifted=True)
    case = replace(case, input=with_bad_pixels(case.input, seed))
    wanted, found = run(case, "reference"), run(case, fast)
    # The derivative where a read is held at the border, zero times what the map holds there, is
    # left open.
    del wanted["grad_offset"]
    assert_same_where_finite(found, wanted)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_gradients_stay_where_they_belong(backend, bad, sampling, position_sensitive):
    case = a_case(sampling, position_sensitive)
    check_bad_gradients(case, backend, (R, slice(None), ROW, COLUMN), bad)


@EVERY_SAMPLING
@ROI_OR_PS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 16), (9, 17)])
def test_any_numbers_are_survived(backend, size, dtype, sampling, position_sensitive):
    values = torch.tensor([NAN, INF, -INF, 0.0, -1.0, 17, 1e10, -1e10, 3e38, 0.5])
    generator = torch.Generator().manual_seed(size[1])

    def some(*shape: int) -> torch.Tensor:
        return values[torch.randint(len(values), shape, generator=generator)].to(dtype)

    boxes = some(60, 5)
    boxes[:, 0] = torch.arange(60) % 2
    input = torch.randn(2, 12, *size, generator=generator).to(dtype)
    case = a_case(sampling, position_sensitive)
    case = replace(case, input=input, boxes=boxes, offset=some(60, 4, 2, 3), spatial_scale=0.5)
    found = run(case, backend)
    assert found["grad_input"].isfinite().all()
    nan = case.offset.isnan().unflatten(1, (2, 2)).any(2)
    per_group = found["output"].unflatten(1, (2, -1))
    assert per_group.isnan().any(2).logical_or(~nan).all()
    assert found["output"][~boxes.isfinite().all(1)].isnan().all()


@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_of_bins_that_read_nothing(backend, groups):
    """They are zero, whatever the gradient of the output is; sizes may exceed float32."""
    input = torch.ones(1, 8, 4, 4)
    boxes = torch.tensor([[0, 0, 0, 3, 3], [0, 0, 0, 1e300, 3]], dtype=torch.float64)
    offset = torch.full((2, 2 * groups, 1, 1), 100.0).requires_grad_()
    output = deform_ps_roi_pool(input, boxes, offset, 1, sampling="bins", backend=backend)
    gradient = torch.tensor([INF, 1.0]).reshape(2, 1, 1, 1).expand_as(output)
    output.backward(gradient)
    assert torch.equal(offset.grad, torch.zeros_like(offset))
