"""What deform_conv2d takes and refuses: layouts, sizes, dtypes, autocast, bad input."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deform_conv_cases import NAMES, Case, large_case, output_gradient, random_case, run
from operator_testing import HALVES, assert_same, bad, check_bad_input, strided
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops import deform_conv2d

# ----------------------------------------------------------------------------- sizes and layouts


@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(backend, channels_last):
    case = large_case(0, channels_last=channels_last)
    empty = replace(case, **{name: getattr(case, name)[:0] for name in ("input", "offset", "mask")})
    found = run(empty, backend)
    assert found["output"].shape == (0, *case.output_size()[1:])
    for name, tensor in empty.tensors.items():
        assert found[f"grad_{name}"].shape == tensor.shape
        assert found[f"grad_{name}"].count_nonzero() == 0


@pytest.mark.parametrize("border", ["zeros", "msra2017"])
def test_map_of_one_pixel(backend, border):
    input = torch.tensor([[[[3.0]]]])
    weight = torch.ones(1, 1, 3, 3)
    offset = torch.zeros(1, 18, 1, 1)
    offset[0, 8] = 0.25  # y of the tap in the middle
    found = deform_conv2d(input, offset, weight, padding=1, border=border, backend=backend)
    assert found.item() == (3 * 0.75 if border == "zeros" else 3)


def test_batch_is_the_images_one_by_one(backend):
    case = large_case(0)
    found = deform_conv2d(*case.public, backend=backend)
    for n in range(found.shape[0]):
        one = replace(case, **{k: getattr(case, k)[n : n + 1] for k in ("input", "offset", "mask")})
        alone = deform_conv2d(*one.public, backend=backend)
        torch.testing.assert_close(found[n : n + 1], alone, rtol=0, atol=1e-12)


def test_any_batch_size(backend):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(37, 4, 5, 6, generator=generator, dtype=torch.float64)
    offset = torch.randn(37, 18, 5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64)
    case = Case(input, offset, weight, None, None, (1, 1), (1, 1), (1, 1))
    assert_same(run(case, backend), run(case, "reference"), 1e-10)


@pytest.mark.parametrize("seed", range(8))
def test_non_contiguous_tensors(backend, seed):
    case = large_case(seed) if seed < 2 else random_case(seed, modulated=True)
    wanted = run(case, backend)

    views = {name: strided(tensor) for name, tensor in case.tensors.items()}
    assert any(not view.is_contiguous() for view in views.values())
    found = run(replace(case, **views), backend, grad_output=strided(output_gradient(case)))
    assert_same(found, wanted, 1e-12)


def test_expanded_tensors(backend):
    case = random_case(11, modulated=True)
    offset = case.offset[:1, :, :1, :1].expand_as(case.offset)
    grad_output = torch.ones((), dtype=torch.float64).expand(case.output_size())
    found = run(replace(case, offset=offset), backend, grad_output=grad_output)
    wanted = run(
        replace(case, offset=offset.contiguous()), backend, grad_output=grad_output.contiguous()
    )
    assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_output_is_channels_last_where_the_input_is(backend, fake):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        weight, offset = torch.ones(6, 4, 3, 3), torch.zeros(2, 18, 7, 5)
        plain = torch.ones(2, 4, 7, 5)
        last = plain.to(memory_format=torch.channels_last)
        for input, wanted in [
            (plain, torch.contiguous_format),
            (last, torch.channels_last),
            (last.transpose(2, 3).contiguous().transpose(2, 3), torch.contiguous_format),
        ]:
            output = deform_conv2d(input, offset, weight, padding=1, backend=backend)
            assert output.is_contiguous(memory_format=wanted)
        # Contiguous in both senses counts as plain.
        pixel = torch.ones(2, 4, 1, 1).to(memory_format=torch.channels_last)
        output = deform_conv2d(pixel, offset[..., :3, :3], weight, padding=2, backend=backend)
        assert output.is_contiguous()


def test_gradient_by_the_input_has_its_memory_format(fast):
    for channels_last in (False, True):
        case = large_case(0, channels_last=channels_last)
        found = run(case, fast)
        assert found["grad_input"].stride() == case.input.stride()
        assert found["grad_offset"].is_contiguous()
        assert found["grad_weight"].is_contiguous()
        assert found["grad_mask"].is_contiguous()


@pytest.mark.parametrize("count", range(1, 6))
def test_any_subset_of_gradients(backend, count):
    case = random_case(5, modulated=True)
    case = replace(case, bias=torch.randn(case.weight.shape[0], dtype=torch.float64))
    wanted = run(case, "reference")
    for names in itertools.combinations(NAMES, count):
        leaves = {name: getattr(case, name).detach().requires_grad_() for name in names}
        output = deform_conv2d(*replace(case, **leaves).public, backend=backend)
        output.backward(output_gradient(case))
        found = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
        assert_same(found, {name: wanted[name] for name in found}, 1e-10)


def test_no_gradient_is_recorded_where_none_is_wanted(backend):
    case = random_case(0)
    assert not deform_conv2d(*case.public, backend=backend).requires_grad
    leaf = case.weight.clone().requires_grad_()
    with torch.no_grad():
        assert not deform_conv2d(*replace(case, weight=leaf).public, backend=backend).requires_grad
    with torch.inference_mode():
        output = deform_conv2d(*case.public, backend=backend)
    torch.testing.assert_close(output, deform_conv2d(*case.public, backend=backend))


# ------------------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_every_number_is_written(fast, dtype, poisoned_memory):
    assert torch.empty(3).isnan().all()
    cases = [random_case(seed) for seed in range(30)] + [large_case(0), large_case(1)]
    # Samples all outside: their gradients, too, have to be written.
    cases.append(replace(cases[-1], offset=torch.full_like(cases[-1].offset, 1e4)))
    cases.append(
        replace(
            cases[0],
            **{k: v[:0] for k, v in cases[0].tensors.items() if k in ("input", "offset", "mask")},
        )
    )
    for case in cases:
        for name, tensor in run(case.to(dtype), fast).items():
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_run_gives_the_same_bits(fast, dtype, threads):
    torch.set_num_threads(threads)
    for case in (large_case(0).to(dtype), large_case(1, channels_last=True).to(dtype)):
        first = run(case, fast)
        for _ in range(4):
            again = run(case, fast)
            for name in first:
                assert again[name].equal(first[name]), name


# --------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("positions", [None, torch.float32], ids=["halves", "float32 offsets"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("seed", [*range(10), None])
def test_half_precision_rounds_once(backend, seed, dtype, positions):
    # Against exact arithmetic on the rounded numbers, error is a few roundings of the result.
    case = large_case(0) if seed is None else random_case(seed)
    case = case.to(dtype, positions)
    found = run(case, backend)
    wanted = run(case.to(torch.float64), "reference")
    for name, value in wanted.items():
        owner = name.removeprefix("grad_")
        expected = dtype if owner == "output" else getattr(case, owner).dtype
        assert found[name].dtype == expected, name
        error = (found[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error <= 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_at_most_twice_as_far_off_as_a_convolution(backend, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    case = Case(
        input=normal(2, 32, 20, 18),
        offset=normal(2, 2 * 2 * 9, 20, 18) * 2,
        weight=normal(24, 32, 3, 3) / 17,
        bias=normal(24),
        mask=None,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    ).to(dtype)

    def errors(found: dict, wanted: dict) -> dict:
        return {
            name: ((found[name].double() - wanted[name]).norm() / wanted[name].norm()).item()
            for name in ("output", "grad_input", "grad_weight", "grad_bias")
        }

    def convolve(case: Case) -> dict:
        leaves = [t.detach().requires_grad_() for t in (case.input, case.weight, case.bias)]
        output = F.conv2d(*leaves, padding=1)
        gradients = torch.autograd.grad(output, leaves, output_gradient(case).to(output.dtype))
        names = ("grad_input", "grad_weight", "grad_bias")
        return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}

    exact = case.to(torch.float64)
    grad_output = output_gradient(case)
    ours = errors(
        run(case, backend, grad_output=grad_output),
        run(exact, "reference", grad_output=grad_output.double()),
    )
    plain = convolve(case)
    leaves = [t.detach().requires_grad_() for t in (exact.input, exact.weight, exact.bias)]
    output = F.conv2d(*leaves, padding=1)
    gradients = torch.autograd.grad(output, leaves, grad_output.double())
    names = ("grad_input", "grad_weight", "grad_bias")
    theirs = errors(plain, {"output": output.detach(), **dict(zip(names, gradients, strict=True))})
    for name, error in ours.items():
        assert error <= 2 * theirs[name], name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("offset", "mask"), [(0, 1), (1, 0)])
def test_offset_and_mask_may_differ_in_dtype(backend, dtype, offset, mask):
    choice = dtype, torch.float32
    case = random_case(5, modulated=True).to(dtype)
    case = replace(case, offset=case.offset.to(choice[offset]), mask=case.mask.to(choice[mask]))
    found = run(case, backend)
    assert found["grad_offset"].dtype == choice[offset]
    assert found["grad_mask"].dtype == choice[mask]
    assert_same(found, run(case.to(torch.float64), "reference"), 2 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend, dtype):
    check_autocast(dtype, lambda case: deform_conv2d(*case.public, backend=backend), backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_of_the_registered_operator(fast, dtype):
    operator = torch.ops.deformnet.deform_conv2d
    check_autocast(dtype, lambda case: operator(*case.operator, "zeros"), fast)


def check_autocast(dtype: torch.dtype, call: Callable[[Case], torch.Tensor], backend: str) -> None:
    case = random_case(5, modulated=True)
    case = replace(case, bias=torch.ones(case.weight.shape[0])).to(torch.float32)
    # The input as an earlier layer leaves it; offsets from a convolution under autocast, too.
    mixed = replace(case, input=case.input.to(dtype), mask=case.mask.to(dtype))
    wanted = deform_conv2d(*case.to(dtype, torch.float32).public, backend=backend)
    for given in (case, mixed):
        weight = given.weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            found = call(replace(given, weight=weight))
        assert found.dtype == dtype
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=torch.finfo(dtype).eps * wanted.abs().max().item()
        )
        found.sum().backward()
        assert weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(backend):
    case = random_case(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deform_conv2d(*case.public, backend=backend)
    assert found.equal(deform_conv2d(*case.public, backend=backend))


def test_autocast_keeps_offsets_exact(backend):
    # An offset that bfloat16 would round to the next pixel.
    input = torch.arange(300.0).reshape(1, 1, 1, 300) % 2
    offset = torch.tensor([0.0, 257.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 300)
    weight = torch.ones(1, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deform_conv2d(input, offset, weight, backend=backend)
    assert found[0, 0, 0, :4].tolist() == [1, 0, 1, 0]


# ------------------------------------------------------------------------------------ bad input


def good() -> dict:
    """A right call, made of fresh tensors: whatever mode is on applies to them."""
    return {
        "input": torch.ones(2, 4, 7, 8),
        "offset": torch.zeros(2, 36, 3, 4),
        "weight": torch.ones(6, 2, 3, 3),
        "bias": torch.ones(6),
        "stride": (2, 2),
        "padding": (0, 1),
        "dilation": (1, 1),
        "mask": torch.ones(2, 18, 3, 4),
    }


ones = torch.ones
INTS = "to be an int or a pair of ints, but got "
WEIGHT = "to have shape [C_out, 4 / groups, kh, kw], ... but got shape "
OFFSET = "to have shape [2, 18 * G, 3, 4], where G divides the 4 channels of input, but got shape "
MASK = "to have shape [2, 18, 3, 4] (2 offset groups of 9 taps), but got shape "
MAP = "to have at least one channel, row and column, but got shape "
BAD = [
    bad("input", lambda: ones(4, 7, 8), ValueError, "to be 4-dimensional, but got shape [4, 7, 8]"),
    bad("offset", lambda: ones(2, 36), ValueError, "to be 4-dimensional, but got shape [2, 36]"),
    bad("weight", lambda: ones(6, 2, 3, 3, 3), ValueError, "to be 4-dimensional, but got shape"),
    bad("bias", lambda: ones(1, 6), ValueError, "to be 1-dimensional, but got shape [1, 6]"),
    bad("mask", lambda: ones(18, 3, 4), ValueError, "to be 4-dimensional, but got shape"),
    bad("input", lambda: ones(2, 4, 7, 8).long(), TypeError, "...float32..., but got torch.int64"),
    bad("input", lambda: ones(2, 4, 7, 8) + 0j, TypeError, "...float32..., but got torch.complex"),
    bad("weight", lambda: ones(6, 2, 3, 3).double(), TypeError,
        "to be torch.float32 like input, but got torch.float64"),
    bad("offset", lambda: ones(2, 36, 3, 4).double(), TypeError,
        "to be torch.float32 like input or torch.float32, but got torch.float64"),
    bad("offset", lambda: ones(2, 36, 3, 4).bfloat16(), TypeError,
        "to be torch.float32 like input or torch.float32, but got torch.bfloat16"),
    bad("bias", lambda: ones(6).half(), TypeError,
        "to be torch.float32 like input, but got torch.float16"),
    bad("mask", lambda: ones(2, 18, 3, 4).bool(), TypeError, "...like input... got torch.bool"),
    bad("offset", lambda: ones(2, 36, 3, 4, device="meta"), ValueError,
        "to be on cpu like input, but got meta"),
    bad("weight", lambda: ones(6, 2, 3, 3, device="meta"), ValueError,
        "to be on cpu like input, but got meta"),
    bad("input", lambda: [1.0], TypeError, "to be a tensor, but got list"),
    bad("mask", lambda: 1.0, TypeError, "to be a tensor, but got float"),
    bad("offset", lambda: None, TypeError, "to be a tensor, but got NoneType"),
    bad("weight", lambda: ones(6, 3, 3, 3), ValueError, f"{WEIGHT}[6, 3, 3, 3]"),
    bad("weight", lambda: ones(6, 8, 3, 3), ValueError, f"{WEIGHT}[6, 8, 3, 3]"),
    bad("weight", lambda: ones(5, 2, 3, 3), ValueError, f"{WEIGHT}[5, 2, 3, 3]", bias=None),
    bad("weight", lambda: ones(0, 2, 3, 3), ValueError,
        "to have no dimension of size 0, but got shape [0, 2, 3, 3]", bias=None),
    bad("weight", lambda: ones(6, 2, 0, 3), ValueError,
        "to have no dimension of size 0, but got shape [6, 2, 0, 3]"),
    bad("input", lambda: ones(2, 0, 7, 8), ValueError, f"{MAP}[2, 0, 7, 8]"),
    bad("input", lambda: ones(2, 4, 0, 8), ValueError, f"{MAP}[2, 4, 0, 8]", padding=3),
    bad("bias", lambda: ones(5), ValueError, "to have shape [6], but got shape [5]"),
    bad("offset", lambda: ones(3, 36, 3, 4), ValueError, f"{OFFSET}[3, 36, 3, 4]"),
    bad("offset", lambda: ones(2, 36, 4, 4), ValueError, f"{OFFSET}[2, 36, 4, 4]"),
    bad("offset", lambda: ones(2, 27, 3, 4), ValueError, f"{OFFSET}[2, 27, 3, 4]"),
    bad("offset", lambda: ones(2, 0, 3, 4), ValueError, f"{OFFSET}[2, 0, 3, 4]"),
    bad("offset", lambda: ones(2, 54, 3, 4), ValueError, f"{OFFSET}[2, 54, 3, 4]", mask=None),
    bad("mask", lambda: ones(2, 9, 3, 4), ValueError, f"{MASK}[2, 9, 3, 4]"),
    bad("mask", lambda: ones(1, 18, 3, 4), ValueError, f"{MASK}[1, 18, 3, 4]"),
    bad("stride", lambda: 0, ValueError, "to be at least 1, but got (0, 0)"),
    bad("stride", lambda: (2, -1), ValueError, "to be at least 1, but got (2, -1)"),
    bad("padding", lambda: (-1, 0), ValueError, "to be at least 0, but got (-1, 0)"),
    bad("dilation", lambda: (1, 0), ValueError, "to be at least 1, but got (1, 0)"),
    bad("stride", lambda: 1.5, TypeError, f"{INTS}1.5"),
    bad("padding", lambda: "same", TypeError, f"{INTS}'same'"),
    bad("dilation", lambda: (1, 2.0), TypeError, f"{INTS}(1, 2.0)"),
    bad("stride", lambda: (1, 1, 1), ValueError, f"{INTS}3 values"),
    bad("stride", lambda: (), ValueError, f"{INTS}0 values"),
    bad("input", lambda: ones(2, 4, 7, 8), ValueError,
        "to be at least as large as the dilated kernel, [9, 3], but got shape [2, 4, 7, 8] with "
        "padding (0, 1)", dilation=(4, 1)),
    bad("border", lambda: "reflect", ValueError,
        "to be one of zeros, msra2017, but got 'reflect'"),
    bad("backend", lambda: "cudnn", ValueError,
        "to be one of auto, reference, cpu, triton, but got 'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "fake", "autocast", "compiled"])
@pytest.mark.parametrize("row", BAD)
def test_bad_input(row, mode):
    check_bad_input(deform_conv2d, good, row, mode)


@pytest.mark.parametrize(
    "change",
    [
        {"stride": np.int64(2), "padding": [np.int32(0), np.int8(1)], "dilation": np.uint8(1)},
        {"stride": torch.Size([2, 2]), "padding": [0, 1], "dilation": (1,)},
        {"stride": torch.tensor(2), "padding": [0, torch.tensor(1)], "dilation": [1]},
    ],
    ids=["NumPy", "sequences", "others"],
)
def test_integers_are_taken_as_conv2d_takes_them(backend, change):
    expected = deform_conv2d(**good(), backend=backend)
    assert deform_conv2d(**{**good(), **change}, backend=backend).equal(expected)


def test_the_good_call_is_good():
    assert deform_conv2d(**good()).shape == (2, 6, 3, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": torch.zeros(2, 36, 4, 4)},
        {"bias": torch.ones(5)},
        {"stride": (0, 1)},
        {"grad_output": torch.ones(2, 6, 3, 5)},
        {"grad_output": torch.ones(2, 6, 3, 4, dtype=torch.float64)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_operators_themselves_refuse_what_would_be_read_out_of_bounds(fast, change):
    call = {**good(), **change}
    tensors = [call[name] for name in NAMES]
    steps = [call[name] for name in ("stride", "padding", "dilation")]
    operator, arguments = torch.ops.deformnet.deform_conv2d, [*tensors, *steps, "zeros"]
    if "grad_output" in change:
        operator = torch.ops.deformnet.deform_conv2d_backward
        del arguments[3]  # bias
        arguments = [call["grad_output"], *arguments, [True] * 5]
    with pytest.raises((ValueError, TypeError), match=f"expected {next(iter(change))} to"):
        operator(*arguments)
