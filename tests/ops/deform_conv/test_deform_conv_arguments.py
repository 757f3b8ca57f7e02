"""What deform_conv2d takes and refuses: layouts, sizes, dtypes, autocast, bad input."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from deform_conv_cases import NAMES, Case, large_case, output_gradient, random_case, run
from operator_testing import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops import deform_conv2d

HALVES = [torch.bfloat16, torch.float16]

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

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        # Every second element of a transposed tensor: neither contiguous nor channels-last.
        room = torch.full((*reversed(tensor.shape[:-1]), 2 * tensor.shape[-1]), float("nan"))
        room = room.to(tensor.dtype)
        order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
        view = room[..., ::2].permute(order)
        view.copy_(tensor)
        return view

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


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that what is never written shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def poisoned(*args, create=create, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


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


# What is changed, the error, its message.
BAD = {
    "input of rank 3": (
        lambda: {"input": torch.ones(4, 7, 8)},
        ValueError,
        r"input: want 4 dimensions, got \[4, 7, 8\]",
    ),
    "offset of rank 2": (
        lambda: {"offset": torch.ones(2, 36)},
        ValueError,
        r"offset: want 4 dimensions, got \[2, 36\]",
    ),
    "weight of rank 5": (
        lambda: {"weight": torch.ones(6, 2, 3, 3, 3)},
        ValueError,
        r"weight: want 4 dimensions",
    ),
    "bias of rank 2": (
        lambda: {"bias": torch.ones(1, 6)},
        ValueError,
        r"bias: want 1 dimensions",
    ),
    "mask of rank 3": (
        lambda: {"mask": torch.ones(18, 3, 4)},
        ValueError,
        r"mask: want 4 dimensions",
    ),
    "integer input": (
        lambda: {"input": torch.ones(2, 4, 7, 8, dtype=torch.int64)},
        TypeError,
        r"input: want one of .*float32.*, got torch.int64",
    ),
    "complex input": (
        lambda: {"input": torch.ones(2, 4, 7, 8, dtype=torch.complex64)},
        TypeError,
        r"input: want one of .*, got torch.complex64",
    ),
    "weight of another dtype": (
        lambda: {"weight": torch.ones(6, 2, 3, 3, dtype=torch.float64)},
        TypeError,
        r"weight: want torch.float32, as input, got torch.float64",
    ),
    "offset of another dtype": (
        lambda: {"offset": torch.ones(2, 36, 3, 4, dtype=torch.float64)},
        TypeError,
        r"offset: want torch.float32, as input.* got torch.float64",
    ),
    "offset in half beside float32": (
        lambda: {"offset": torch.ones(2, 36, 3, 4, dtype=torch.bfloat16)},
        TypeError,
        r"offset: want torch.float32, as input.* got torch.bfloat16",
    ),
    "offset in another half": (
        lambda: {
            **{k: v.bfloat16() for k, v in good().items() if isinstance(v, torch.Tensor)},
            "offset": torch.ones(2, 36, 3, 4, dtype=torch.float16),
        },
        TypeError,
        r"offset: want torch.bfloat16, as input, or torch.float32, got torch.float16",
    ),
    "bias of another dtype": (
        lambda: {"bias": torch.ones(6, dtype=torch.float16)},
        TypeError,
        r"bias: want torch.float32, as input, got torch.float16",
    ),
    "mask of booleans": (
        lambda: {"mask": torch.ones(2, 18, 3, 4, dtype=torch.bool)},
        TypeError,
        r"mask: want torch.float32, as input.* got torch.bool",
    ),
    "offset on another device": (
        lambda: {"offset": torch.ones(2, 36, 3, 4, device="meta")},
        ValueError,
        r"offset: want device cpu, as input, got meta",
    ),
    "weight on another device": (
        lambda: {"weight": torch.ones(6, 2, 3, 3, device="meta")},
        ValueError,
        r"weight: want device cpu, as input, got meta",
    ),
    "input is a list": (
        lambda: {"input": [1.0]},
        TypeError,
        r"input: want a tensor, got list",
    ),
    "mask is a number": (
        lambda: {"mask": 1.0},
        TypeError,
        r"mask: want a tensor, got float",
    ),
    "no offset": (
        lambda: {"offset": None},
        TypeError,
        r"offset: want a tensor, got NoneType",
    ),
    "channels that weight does not divide": (
        lambda: {"weight": torch.ones(6, 3, 3, 3)},
        ValueError,
        r"weight: want \[C_out, 4 / groups, kh, kw\].* got \[6, 3, 3, 3\]",
    ),
    "more channels in weight than in input": (
        lambda: {"weight": torch.ones(6, 8, 3, 3)},
        ValueError,
        r"weight: want .* got \[6, 8, 3, 3\]",
    ),
    "output channels that groups do not divide": (
        lambda: {"weight": torch.ones(5, 2, 3, 3), "bias": None},
        ValueError,
        r"weight: want .* got \[5, 2, 3, 3\]",
    ),
    "no output channels": (
        lambda: {"weight": torch.ones(0, 2, 3, 3), "bias": None},
        ValueError,
        r"weight: want no size of zero, got \[0, 2, 3, 3\]",
    ),
    "kernel of no rows": (
        lambda: {"weight": torch.ones(6, 2, 0, 3)},
        ValueError,
        r"weight: want no size of zero, got \[6, 2, 0, 3\]",
    ),
    "input without channels": (
        lambda: {"input": torch.ones(2, 0, 7, 8)},
        ValueError,
        r"input: want at least one channel, row and column, got \[2, 0, 7, 8\]",
    ),
    "input without rows": (
        lambda: {"input": torch.ones(2, 4, 0, 8), "padding": 3},
        ValueError,
        r"input: want at least one channel, row and column, got \[2, 4, 0, 8\]",
    ),
    "bias of another length": (
        lambda: {"bias": torch.ones(5)},
        ValueError,
        r"bias: want \[6\], got \[5\]",
    ),
    "offset of another batch": (
        lambda: {"offset": torch.zeros(3, 36, 3, 4)},
        ValueError,
        r"offset: want \[2, 18 \* G, 3, 4\].* got \[3, 36, 3, 4\]",
    ),
    "offset of another size": (
        lambda: {"offset": torch.zeros(2, 36, 4, 4)},
        ValueError,
        r"offset: want \[2, 18 \* G, 3, 4\].* got \[2, 36, 4, 4\]",
    ),
    "offset of half a group": (
        lambda: {"offset": torch.zeros(2, 27, 3, 4)},
        ValueError,
        r"offset: want \[2, 18 \* G, 3, 4\].* got \[2, 27, 3, 4\]",
    ),
    "offset without channels": (
        lambda: {"offset": torch.zeros(2, 0, 3, 4)},
        ValueError,
        r"offset: want \[2, 18 \* G, 3, 4\].* got \[2, 0, 3, 4\]",
    ),
    "offset groups that do not divide the channels": (
        lambda: {"offset": torch.zeros(2, 54, 3, 4), "mask": None},
        ValueError,
        r"offset: want .* G dividing the 4 channels of input, got \[2, 54, 3, 4\]",
    ),
    "mask of one group of two": (
        lambda: {"mask": torch.ones(2, 9, 3, 4)},
        ValueError,
        r"mask: want \[2, 18, 3, 4\].* got \[2, 9, 3, 4\]",
    ),
    "mask of another batch": (
        lambda: {"mask": torch.ones(1, 18, 3, 4)},
        ValueError,
        r"mask: want \[2, 18, 3, 4\].* got \[1, 18, 3, 4\]",
    ),
    "stride of zero": (
        lambda: {"stride": 0},
        ValueError,
        r"stride: want at least 1, got \(0, 0\)",
    ),
    "negative stride": (
        lambda: {"stride": (2, -1)},
        ValueError,
        r"stride: want at least 1, got \(2, -1\)",
    ),
    "negative padding": (
        lambda: {"padding": (-1, 0)},
        ValueError,
        r"padding: want at least 0, got \(-1, 0\)",
    ),
    "dilation of zero": (
        lambda: {"dilation": (1, 0)},
        ValueError,
        r"dilation: want at least 1, got \(1, 0\)",
    ),
    "stride of a fraction": (
        lambda: {"stride": 1.5},
        TypeError,
        r"stride: want an int or a pair of ints, got 1.5",
    ),
    "padding by name": (
        lambda: {"padding": "same"},
        TypeError,
        r"padding: want an int or a pair of ints, got 'same'",
    ),
    "dilation of fractions": (
        lambda: {"dilation": (1, 2.0)},
        TypeError,
        r"dilation: want an int or a pair of ints, got \(1, 2.0\)",
    ),
    "three strides": (
        lambda: {"stride": (1, 1, 1)},
        ValueError,
        r"stride: want an int or a pair of ints, got 3 of them",
    ),
    "kernel larger than the map": (
        lambda: {"dilation": (4, 1)},
        ValueError,
        r"input: want at least the reach of the kernel, \[9, 3\], got \[2, 4, 7, 8\]",
    ),
    "unknown border": (
        lambda: {"border": "reflect"},
        ValueError,
        r"border: want one of zeros, msra2017, got 'reflect'",
    ),
    "unknown backend": (
        lambda: {"backend": "cudnn"},
        ValueError,
        r"backend: want one of auto, reference, cpu, triton, got 'cudnn'",
    ),
}


def test_the_good_call_is_good():
    assert deform_conv2d(**good()).shape == (2, 6, 3, 4)


# Autocast makes the dtypes agree, so there they cannot be wrong.
ROWS = [
    (what, mode)
    for what, (_, _, message) in BAD.items()
    for mode in ("eager", "fake", "autocast", "compiled")
    if not (mode == "autocast" and "want torch." in message)
]


@pytest.mark.parametrize(("what", "mode"), ROWS)
def test_bad_input(what, mode):
    change, error, message = BAD[what]
    function = deform_conv2d
    if mode == "compiled":
        torch._dynamo.reset()
        function = torch.compile(deform_conv2d, backend="eager")
    context = {
        "fake": FakeTensorMode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }.get(mode, torch.no_grad)
    with context(), pytest.raises(error, match=message) as caught:
        function(**{**good(), **change()})
    assert "\n" not in str(caught.value)


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
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(change))}: want"):
        operator(*arguments)
