"""The Triton kernels of deformable convolution, in the interpreter or on a GPU."""

import importlib
import os
from dataclasses import replace

import pytest
import torch
from deform_conv_cases import Case, output_gradient, random_case, run
from on_triton import put_triton_behind_cpu
from operator_testing import assert_same

from deformnet.ops.deform_conv.checks import Geometry

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = importlib.import_module("deformnet.ops.deform_conv.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="there is no GPU, and TRITON_INTERPRET=1 is not set",
)
# Random calls with few taps: the interpreter takes milliseconds for every line of a kernel.
SEEDS = (2011, 2035, 2053, 2125, 2019, 2063, 2197, 2142, 2001, 2006, 2060, 2115, 2058, 2146)
# Among them calls whose groups are too narrow for the matrix unit.
NARROW_SEEDS = (2035, 2053, 2060, 2065, 2101, 2115, 2142, 2284)
NAN, INF = float("nan"), float("inf")


def run_here(
    case: Case, border: str = "zeros", grad_output: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        put_triton_behind_cpu(patch)
        return run(case, "cpu", border, grad_output)


def layered(batch: int = 2) -> Case:
    """Two groups that share channels with three offset groups, one row of taps, on a small map."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Case(
        input=normal(batch, 12, 4, 5),
        offset=normal(batch, 2 * 3 * 2, 4, 4),
        weight=normal(10, 6, 1, 2) / 3,
        bias=normal(10),
        mask=normal(batch, 3 * 2, 4, 4),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
    )


def depthwise(batch: int = 2) -> Case:
    """The same offsets, twelve groups of one channel and two outputs."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 1, 1, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(24, generator=generator, dtype=torch.float64)
    return replace(layered(batch), weight=weight, bias=bias)


EITHER_PATH = pytest.mark.parametrize("make", [layered, depthwise])


def narrow(case: Case) -> bool:
    return kernels._is_narrow(
        kernels._sizes(case.input, case.offset, case.weight, geometry_of(case))
    )


def geometry_of(case: Case) -> Geometry:
    return Geometry(case.stride, case.padding, case.dilation, "zeros")


@runs
@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_the_reference(monkeypatch, seed):
    monkeypatch.setattr(kernels, "_NARROW_PRODUCTS", 0)
    case = random_case(seed)
    border = "zeros" if seed % 2 else "msra2017"
    assert_same(run_here(case, border), run(case, "reference", border), 1e-10)


@runs
@pytest.mark.parametrize("seed", NARROW_SEEDS)
def test_narrow_groups_agree_with_the_reference(seed):
    case = random_case(seed)
    assert narrow(case)
    border = "zeros" if seed % 2 else "msra2017"
    assert_same(run_here(case, border), run(case, "reference", border), 1e-10)


def test_what_counts_as_narrow():
    assert narrow(depthwise())
    assert not narrow(layered())
    # Groups of 3 channels under offset groups of 4.
    assert not narrow(replace(layered(), weight=torch.zeros(8, 3, 1, 2)))


@runs
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=str,
)
@EITHER_PATH
def test_other_dtypes(make, dtype, tolerance):
    if make is layered and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    case = make().to(dtype, torch.float32)
    found = run_here(case)
    assert found["output"].dtype == dtype
    assert found["grad_offset"].dtype == torch.float32
    gradient = output_gradient(case).double()
    assert_same(found, run(case.to(torch.float64), "reference", "zeros", gradient), tolerance)


@runs
def test_more_than_one_tile_of_everything(monkeypatch):
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.Tile(16, 16, 16, 4, 2))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    case = Case(
        input=normal(3, 37, 3, 4),
        offset=normal(3, 2, 3, 4),
        weight=normal(35, 37, 1, 1),
        bias=None,
        mask=None,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
    )
    assert_same(run_here(case), run(case, "reference"), 1e-10)


@runs
def test_trials_of_tiles_leave_no_trace(monkeypatch):
    problems = []

    def fastest(on, problem, tiles, run):
        problems.append(problem)
        small = kernels.Tile(16, 16, 16, 4, 2)
        for tile in (small, *tiles, small):
            run(tile)
        return small

    monkeypatch.setattr(kernels.tuning, "fastest", fastest)
    case = layered()
    assert_same(run_here(case), run(case, "reference"), 1e-10)
    assert [problem.split()[0] for problem in problems] == ["forward", "positions", "weight"]


@runs
def test_more_than_one_narrow_tile_of_everything(monkeypatch):
    monkeypatch.setattr(kernels, "_NARROW_TILE", 32)
    monkeypatch.setattr(kernels, "_NARROW_CHANNELS", 2)
    # Two splits of the three tiles of rows; 3 * 2 * 4 programs each, of offset groups, taps, tiles.
    monkeypatch.setattr(kernels, "_PROGRAMS", 2 * 3 * 2 * 4)
    case = replace(depthwise(3), mask=None, bias=None)
    assert_same(run_here(case), run(case, "reference"), 1e-10)


@runs
@EITHER_PATH
def test_wide_addresses_agree(monkeypatch, make):
    expected = run_here(make())
    monkeypatch.setattr(kernels, "_LEAST_WIDE", 0)
    assert_same(run_here(make()), expected, 0.0 if not torch.cuda.is_available() else 1e-12)


@runs
@EITHER_PATH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_deterministic_gradients_are_right_and_sums_may_be_chunked(monkeypatch, dtype, make):
    case = make().to(dtype)
    expected = run_here(case)
    monkeypatch.setattr(kernels, "_MOST_SUMS", 1)
    torch.use_deterministic_algorithms(True)
    try:
        found = run_here(case)
        again = run_here(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected, 1e-12 if dtype == torch.float64 else 1e-2)
    for name, tensor in found.items():
        assert tensor.equal(again[name]), name


@runs
@EITHER_PATH
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_nan_reaches_only_what_reads_it(deterministic, make):
    case = make()
    offset, outside = case.offset.clone(), case.offset.clone()
    # Image 1, offset group 1 (channels 4 to 7), tap 1, output position (2, 3).
    offset[1, 2 * 3, 2, 3] = NAN
    outside[1, 2 * 3, 2, 3] = INF
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = run_here(replace(case, offset=offset))
        clean = run_here(replace(case, offset=outside))
    finally:
        torch.use_deterministic_algorithms(False)
    reached = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in found.items()}
    reached["grad_offset"][1, 6:8, 2, 3] = True
    reached["grad_mask"][1, 3, 2, 3] = True
    if make is depthwise:
        reached["output"][1, 8:16, 2, 3] = True
        reached["grad_weight"][8:16, :, :, 1] = True
    else:
        # These channels are of both groups.
        reached["output"][1, :, 2, 3] = True
        reached["grad_weight"][:5, 4:, :, 1] = True
        reached["grad_weight"][5:, :2, :, 1] = True
    for name, tensor in found.items():
        assert tensor.isnan().equal(reached[name]), name
        assert clean[name].isfinite().all()
        kept = ~reached[name]
        torch.testing.assert_close(tensor[kept], clean[name][kept], rtol=0, atol=1e-12)


@runs
@EITHER_PATH
def test_infinities_in_the_map_reach_no_neighbor(make):
    case = make()
    input = case.input.clone()
    input[0, 3, 1, 2] = INF
    found = run_here(replace(case, input=input))
    expected = run(replace(case, input=input), "reference")
    for name, tensor in expected.items():
        assert found[name].isfinite().equal(tensor.isfinite()), name


@runs
@EITHER_PATH
def test_gradients_on_their_own(make):
    case = make()
    gradient = output_gradient(case)
    expected = run_here(case)
    tensors = gradient, case.input, case.offset, case.weight, case.mask
    tensors = [None if t is None else t.to(DEVICE) for t in tensors]
    names = "grad_input", "grad_offset", "grad_weight", "grad_bias", "grad_mask"
    for k, name in enumerate(names):
        needs = tuple(i == k for i in range(5))
        found = kernels.deform_conv2d_backward(*tensors, geometry_of(case), needs)
        assert [tensor is not None for tensor in found] == list(needs)
        assert_same({name: found[k].cpu()}, {name: expected[name]}, 1e-12)


@runs
@EITHER_PATH
def test_gradients_with_strides_of_any_kind(make):
    case = make()
    spread = output_gradient(case).transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(run_here(case, "zeros", spread), run_here(case), 1e-12)
    column = replace(case, offset=case.offset[..., :1], mask=case.mask[..., :1])
    column = replace(column, input=case.input[..., :2])
    assert_same(run_here(column), run(column, "reference"), 1e-10)


@runs
@EITHER_PATH
def test_an_empty_batch(make):
    found = run_here(make(0))
    assert found["output"].shape == (0, make().weight.shape[0], 4, 4)
    assert not found["grad_weight"].any()
