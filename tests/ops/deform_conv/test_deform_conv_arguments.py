"""What deform_conv2d takes and refuses: layouts, sizes, dtypes, autocast, bad input."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deform_conv_cases import (
    EVERY_BORDER,
    NAMES,
    Case,
    large_case,
    output_gradient,
    random_case,
    run,
)
from operator_testing import HALVES, Normal, assert_same, bad, check_bad_input, differentiate
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops import deform_conv2d


@EVERY_BORDER
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
    normal = Normal()
    tensors = normal(37, 4, 5, 6), normal(37, 18, 5, 6), normal(3, 4, 3, 3)
    case = Case(*tensors, None, None, (1, 1), (1, 1), (1, 1))
    assert_same(run(case, backend), run(case, "reference"), 1e-10)


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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_at_most_twice_as_far_off_as_a_convolution(backend, dtype):
    normal = Normal()
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
    exact, gradient = case.to(torch.float64), output_gradient(case)

    def errors(found: dict, expected: dict) -> dict:
        return {
            name: ((found[name].double() - expected[name]).norm() / expected[name].norm()).item()
            for name in ("output", "grad_input", "grad_weight", "grad_bias")
        }

    def convolve(case: Case, gradient: torch.Tensor) -> dict:
        leaves = {name: case.tensors[name] for name in ("input", "weight", "bias")}
        return differentiate(partial(F.conv2d, padding=1), leaves, gradient)

    ours = errors(
        run(case, backend, grad_output=gradient),
        run(exact, "reference", grad_output=gradient.double()),
    )
    theirs = errors(convolve(case, gradient), convolve(exact, gradient.double()))
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


def test_autocast_keeps_offsets_exact(backend):
    # An offset that bfloat16 would round to the next pixel.
    input = torch.arange(300.0).reshape(1, 1, 1, 300) % 2
    offset = torch.tensor([0.0, 257.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 300)
    weight = torch.ones(1, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deform_conv2d(input, offset, weight, backend=backend)
    assert found[0, 0, 0, :4].tolist() == [1, 0, 1, 0]


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
    bad("padding", lambda: (1, True), TypeError, f"{INTS}(1, True)"),
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


@pytest.mark.parametrize(
    "change",
    [
        {"offset": torch.zeros(2, 36, 4, 4)},
        {"bias": torch.ones(5)},
        {"input": None},
        {"stride": (0, 1)},
        {"stride": (1,)},
        {"dilation": (1, 1, 1)},
        {"grad_output": None},
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
