"""What only the C++ kernels have: tiles, chunks, blocks, threads and instruction sets."""

import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from both_operators import EVERY_LARGE, FORMATS, LARGE, random_cases, with_format
from cuda_cases import exact, run
from operator_testing import (
    HALVES,
    Normal,
    assert_same,
    assert_same_bits_for_any_number_of_threads,
    assert_same_where_finite,
    differentiate,
    with_bad_pixels,
)

from deformnet.ops import backends, cpu, deform_conv2d

if backends.why_unavailable("cpu"):
    pytest.skip(str(backends.why_unavailable("cpu")), allow_module_level=True)

BEST = cpu.instruction_set()


def convolution(
    batch: int,
    channels: int,
    size: tuple[int, int],
    *,
    out_channels: int = 40,
    groups: int = 1,
    offset_groups: int = 1,
    stride: int = 1,
    kernel: int = 3,
    modulated: bool = True,
) -> deform_conv_cases.Case:
    normal = Normal()
    out = tuple((side - 1) // stride + 1 for side in size)
    taps = kernel**2
    return deform_conv_cases.Case(
        input=normal(batch, channels, *size),
        offset=normal(batch, 2 * taps * offset_groups, *out) * 3,
        weight=normal(out_channels, channels // groups, kernel, kernel) / 10,
        bias=None,
        mask=normal(batch, taps * offset_groups, *out).sigmoid() if modulated else None,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dilation=(1, 1),
    )


def pooling(
    channels: int,
    size: tuple[int, int],
    bins: tuple[int, int],
    *,
    position_sensitive: bool,
    groups: int = 1,
    batch: int = 2,
    boxes: int = 6,
    sampling: str = "msra",
    samples_per_bin: int = 4,
) -> roi_pool_cases.Case:
    normal = Normal()
    planes = bins[0] * bins[1] if position_sensitive else 1
    return roi_pool_cases.Case(
        input=normal(batch, channels * planes, *size),
        boxes=roi_pool_cases.random_boxes(random.Random(0), boxes, batch, size[0] * 4, size[1] * 4),
        offset=normal(boxes, 2 * groups, *bins),
        output_size=bins,
        spatial_scale=0.25,
        gamma=0.1,
        sampling=sampling,
        samples_per_bin=samples_per_bin,
        position_sensitive=position_sensitive,
    )


def depthwise(
    batch: int,
    channels: int,
    size: tuple[int, int],
    *,
    offset_groups: int = 1,
    stride: int = 1,
    kernel: int = 5,
    modulated: bool = True,
) -> deform_conv_cases.Case:
    case = convolution(
        batch,
        channels,
        size,
        out_channels=channels,
        groups=channels,
        offset_groups=offset_groups,
        stride=stride,
        kernel=kernel,
        modulated=modulated,
    )
    # Sixteenths are exact in float32, so that samples lie between the same pixels in both types.
    offset = ((8 * case.offset).round() + 0.5) / 8
    return replace(case, offset=offset, bias=Normal(1)(channels))


DEPTHWISE = {
    "depthwise": depthwise(3, 35, (13, 14), offset_groups=5, kernel=3),
    "depthwise, channels that fill no vectors": depthwise(2, 97, (9, 11), modulated=False),
    "depthwise, slices one after another": depthwise(1, 97, (33, 37), kernel=3),
    "depthwise, parts of an image": depthwise(1, 70, (19, 21), offset_groups=35),
    "depthwise, several images in a part": depthwise(7, 48, (7, 9), modulated=False, kernel=3),
    "depthwise, strided": depthwise(2, 18, (11, 12), offset_groups=2, stride=2),
    "depthwise, two channels": depthwise(1, 2, (5, 4)),
}
CONVOLUTIONS = {
    **DEPTHWISE,
    "an image in several chunks": convolution(2, 104, (31, 27), offset_groups=2),
    "several images in a chunk": convolution(7, 48, (7, 9), groups=2),
    "images copied in two parts": convolution(3, 16, (257, 263), stride=9),
    "channels beyond one block": convolution(1, 700, (5, 6), out_channels=8),
    "a group that starts within a block": convolution(1, 1000, (4, 5), out_channels=8, groups=4),
    "depthwise, two filters a channel": convolution(2, 24, (9, 9), out_channels=48, groups=24),
    "narrow groups, several to a panel": convolution(3, 40, (9, 8), out_channels=20, groups=5),
    "narrow groups that fill no panel": convolution(
        2, 33, (11, 9), out_channels=6, groups=3, offset_groups=3
    ),
    "groups wider than a panel": convolution(
        3, 80, (15, 20), out_channels=34, groups=2, offset_groups=5
    ),
    "one output channel": convolution(2, 33, (11, 12), out_channels=1),
    "one channel an offset group": convolution(2, 6, (10, 11), offset_groups=6),
}
CASES = {
    **CONVOLUTIONS,
    "bins in several blocks": pooling(1040, (9, 8), (6, 6), position_sensitive=False, boxes=3),
    "a channel for every thread": pooling(7, (9, 8), (2, 2), position_sensitive=False, groups=7),
    "wide groups": pooling(78, (9, 8), (2, 3), position_sensitive=False, groups=2),
    "planes in several pieces": pooling(3, (320, 420), (1, 2), position_sensitive=True),
    "bins wider than vectors": pooling(2, (20, 150), (2, 2), position_sensitive=True, groups=2),
    "images without boxes": pooling(3, (9, 8), (2, 2), position_sensitive=True, batch=9, boxes=4),
    "samples by the dozen": pooling(
        3, (9, 31), (2, 1), position_sensitive=True, sampling="aligned", samples_per_bin=29
    ),
    "samples by the dozen, adapting": pooling(
        18, (30, 90), (2, 1), position_sensitive=False, sampling="aligned", samples_per_bin=0
    ),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@FORMATS
@EVERY_CASE
def test_every_way_through_the_kernels_agrees_with_the_reference(name, channels_last):
    case = with_format(CASES[name], channels_last)
    assert_same(run(case, backend="cpu"), run(case, backend="reference"), 1e-11)


@EVERY_CASE
def test_the_bits_do_not_depend_on_the_number_of_threads(name):
    case = CASES[name].to(torch.float32)
    assert_same_bits_for_any_number_of_threads(lambda: run(case, backend="cpu"))


@EVERY_LARGE
def test_every_instruction_set_agrees_with_the_reference(instructions, name):
    assert cpu.instruction_set() == instructions
    for case in (LARGE[name], with_format(LARGE[name], True), *random_cases(name, 8)):
        assert_same(run(case, backend="cpu"), run(case, backend="reference"), 1e-11)
        single = case.to(torch.float32)
        assert_same(run(single, backend="cpu"), exact(single), 2e-5)


@deform_conv_cases.EVERY_BORDER
def test_every_instruction_set_knows_the_border(instructions, border):
    for case in map(deform_conv_cases.random_case, range(12)):
        found, expected = (
            deform_conv_cases.run(case, backend, border) for backend in ("cpu", "reference")
        )
        assert_same(found, expected, 1e-11)


@pytest.mark.parametrize(
    "wanted", [("input",), ("offset",), ("weight",), ("input", "weight")], ids=str
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_do_not_depend_on_which_others_are_wanted(name, wanted):
    case = CONVOLUTIONS[name]

    def gradients(*names: str) -> dict[str, torch.Tensor]:
        leaves = {key: tensor for key, tensor in case.tensors.items() if key in names}
        return differentiate(
            lambda **leaves: deform_conv2d(*replace(case, **leaves).public),
            leaves,
            torch.ones(case.output_size(), dtype=torch.float64),
        )

    found, expected = gradients(*wanted), gradients("input", "offset", "weight")
    assert all(found[f"grad_{key}"].equal(expected[f"grad_{key}"]) for key in wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [1, 64])
def test_every_instruction_set_converts_halves_as_pytorch_does(instructions, channels, dtype):
    # A 1x1 kernel with weight 1 at whole positions copies: what comes out is what went in.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].reshape(1, channels, 1, -1)
    offset = torch.zeros(1, 2, 1, numbers.shape[-1])
    weight = torch.ones(channels, 1, 1, 1, dtype=dtype)
    # The neighbor is read with weight 0, so that negative zero becomes zero: compare as numbers.
    assert torch.equal(deform_conv2d(numbers, offset, weight), numbers)
    # A bias in the same type makes sums that must be rounded.
    numbers = (Normal()(1, channels, 1, 4096) * 3).to(dtype)
    offset = torch.zeros(1, 2, 1, 4096)
    for bias in (1.0, 0.01, 1e-6, 3e4):
        biases = torch.full((channels,), bias, dtype=dtype)
        wanted = (numbers.float() + biases.float()[:, None, None]).to(dtype)
        assert torch.equal(deform_conv2d(numbers, offset, weight, biases), wanted)


# Rows, channels and output channels that leave remainders of tiles; groups that share a block.
TILED = {
    "one tile": convolution(1, 32, (3, 5), out_channels=16),
    "remainders of all": convolution(2, 64, (9, 11), out_channels=48),
    "groups and offset groups": convolution(
        2, 128, (9, 11), out_channels=70, groups=2, offset_groups=4
    ),
    "groups beyond one block": convolution(1, 1408, (6, 7), out_channels=40, groups=2),
    "channels beyond one block": convolution(1, 1312, (6, 7), out_channels=33),
    "several chunks of positions": convolution(2, 32, (40, 41), out_channels=33),
}


@pytest.mark.parametrize("name", TILED)
def test_products_of_bfloat16_are_as_exact_as_a_convolution(name, instructions):
    if instructions not in ("amx", "avx512_bf16"):
        pytest.skip("has no bfloat16 products")
    case = TILED[name].to(torch.bfloat16, torch.float32)
    grad_output = Normal()(*case.output_size()).bfloat16()
    found = run(case, grad_output, "cpu")
    exactly = run(case.to(torch.float64), grad_output.double(), "reference")
    rounded = plain(case, grad_output)
    precise = plain(case.to(torch.float64), grad_output.double())
    for key, value in exactly.items():
        error = (found[key] - value).abs().max()
        if key in rounded:
            assert error <= 2 * (rounded[key] - precise[key]).abs().max(), key
        else:  # of positions: only inputs are rounded to bfloat16
            assert error <= 1e-5 * value.abs().max(), key
    torch.set_num_threads(3)
    again = run(case, grad_output, "cpu")
    assert all(again[key].equal(value) for key, value in found.items())


def plain(case: deform_conv_cases.Case, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain convolution and its gradients."""
    groups = case.input.shape[1] // case.weight.shape[1]
    return differentiate(
        lambda input, weight: torch.nn.functional.conv2d(input, weight, padding=1, groups=groups),
        {"input": case.input, "weight": case.weight},
        grad_output,
    )


@pytest.mark.parametrize("channels", [34, 64], ids=["pairs", "tiles"])
@pytest.mark.parametrize("wanted", [float("nan"), float("inf")])
def test_non_finite_numbers_affect_only_their_own_products(instructions, wanted, channels):
    """One number of the input and one of grad_output; odd numbers of positions and lanes."""
    case = convolution(1, channels, (3, 5), out_channels=33).to(torch.bfloat16, torch.float32)
    case = replace(case, offset=torch.zeros_like(case.offset))
    case.input[0, 7, 1, 2] = wanted
    grad_output = Normal()(*case.output_size()).bfloat16()
    grad_output[0, 11, 2, 4] = wanted
    found = run(case, grad_output, "cpu")
    expected = run(case.to(torch.float64), grad_output.double(), "reference")
    for key, value in expected.items():
        assert torch.equal(found[key].isfinite(), value.isfinite()), key


@deform_conv_cases.EVERY_BORDER
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_layers_in_every_instruction_set(instructions, name, border):
    case = with_format(DEPTHWISE[name], border == "msra2017")
    expected = deform_conv_cases.run(case, "reference", border)
    assert_same(deform_conv_cases.run(case, "cpu", border), expected, 1e-11)
    single = case.to(torch.float32)
    expected = deform_conv_cases.run(single.to(torch.float64), "reference", border)
    assert_same(deform_conv_cases.run(single, "cpu", border), expected, 2e-5)


@deform_conv_cases.EVERY_BORDER
@pytest.mark.parametrize("what", ["input", "offset", "mask", "weight", "gradient"])
def test_non_finite_numbers_in_depthwise_layers_affect_only_what_reads_them(
    instructions, what, border
):
    case = depthwise(2, 21, (6, 7), kernel=3, offset_groups=3)
    gradient = deform_conv_cases.output_gradient(case)
    if what == "gradient":
        gradient = with_bad_pixels(gradient, 0)
    else:
        case = replace(case, **{what: with_bad_pixels(getattr(case, what), 0)})
    expected, found = (
        deform_conv_cases.run(case, backend, border, gradient) for backend in ("reference", "cpu")
    )
    if border == "msra2017":  # see test_bad_pixels_touch_only_what_reads_them
        del expected["grad_offset"]
    assert any(not value.isfinite().all() for value in expected.values())
    assert_same_where_finite(found, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise_halves_are_rounded_once(instructions, channels_last, dtype):
    case = with_format(depthwise(2, 35, (9, 11)), channels_last).to(dtype, torch.float32)
    found, expected = run(case, backend="cpu"), exact(case)
    for key in ("output", "grad_input", "grad_weight"):
        error = (found[key].double() - expected[key]).abs()
        # Half a unit in the last place, and rounding errors of sums in float32.
        bound = expected[key].abs() * torch.finfo(dtype).eps * 0.51 + 1e-5
        assert (error <= bound).all(), key


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["roi bins", "ps bins"])
def test_halves_are_rounded_once(instructions, name, dtype):
    case = LARGE[name].to(dtype, torch.float32)
    found, expected = run(case, backend="cpu"), exact(case)
    for key in ("output", "grad_input"):
        error = (found[key].double() - expected[key]).abs()
        # Half a unit in the last place, and rounding errors of sums in float32.
        bound = expected[key].abs() * torch.finfo(dtype).eps * 0.51 + 1e-5
        assert (error <= bound).all(), key


@roi_pool_cases.ROI_OR_PS
@roi_pool_cases.EVERY_SAMPLING
def test_what_is_not_read_does_not_matter(instructions, sampling, position_sensitive):
    """One box in the middle of a map that is NaN everywhere else."""
    case = pooling(
        2, (12, 40), (2, 2), position_sensitive=position_sensitive, batch=1, sampling=sampling
    )
    boxes = torch.tensor([[0, 9 * 4, 4 * 4, 13 * 4, 7 * 4.0]], dtype=torch.float64)
    case = replace(case, boxes=boxes, offset=case.offset[:1].clamp(-1, 1)).to(torch.float32)
    reads = run(case, torch.ones(case.output_size_of()), "reference")["grad_input"]
    # Read with a weight of zero is read, too: a margin.
    near = torch.nn.functional.max_pool2d((reads != 0).float(), 3, 1, 1) > 0
    assert 0 < near.sum() < near.numel() / 2
    hidden = replace(case, input=torch.where(near, case.input, torch.nan))
    assert_same(run(hidden, backend="cpu"), run(case, backend="cpu"), 1e-6)


# In a process of its own: the highest memory use of this one lies behind it.
MEMORY = """
import resource, sys, torch
from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

def step(function, output_size, *sizes):
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    gradient = torch.randn(output_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, gradient)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 - output.nbytes - sum(g.nbytes for g in gradients)

def convolve(n):
    sizes = (n, 32, 64, 64), (n, 18, 64, 64), (32, 32, 3, 3)
    return step(lambda x, offset, w: deform_conv2d(x, offset, w, padding=1), sizes[0], *sizes)

def pool(function, channels, n, count):
    corners = torch.rand(count, 2) * 40
    image = torch.randint(0, n, (count, 1))
    boxes = torch.cat([image, corners, corners + torch.rand(count, 2) * 30], 1)
    sizes = (count, channels, 3, 3), (n, 36, 64, 64), (count, 2, 3, 3)
    return step(lambda x, offset: function(x, boxes, offset, 3), *sizes)

print(eval(sys.argv[1])[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units")
@pytest.mark.parametrize(
    ("calls", "limit"),
    [
        # The columns of 48 images would be 226 MB, in the forward pass and twice in the backward.
        ("convolve(1), convolve(48)", 64),
        # The maps in another layout would be 57 MB; the 9 bins of all boxes with 3x3 pixels, 70 MB.
        ("pool(deform_roi_pool, 36, 1, 10), pool(deform_roi_pool, 36, 96, 6000)", 24),
        ("pool(deform_ps_roi_pool, 4, 1, 10), pool(deform_ps_roi_pool, 4, 96, 6000)", 24),
    ],
)
def test_memory_grows_neither_with_the_batch_nor_with_the_boxes(calls, limit):
    command = [sys.executable, "-c", MEMORY, calls]
    beyond_tensors = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert beyond_tensors < limit * 2**20


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'sse9' is not available"):
        cpu.select_instruction_set("sse9")
    assert cpu.instruction_set() == BEST


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("baseline", "None baseline"),
        ("sse9", "expected DEFORMNET_INSTRUCTION_SET to be .*, but got 'sse9'"),
    ],
)
def test_the_environment_names_an_instruction_set(choice, wanted):
    script = (
        "from deformnet.ops.cpu import instruction_set, why_unavailable as why; "
        "print(why(), '' if why() else instruction_set())"
    )
    environment = os.environ | {"DEFORMNET_INSTRUCTION_SET": choice}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(wanted, ran.stdout)
