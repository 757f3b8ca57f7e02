"""What only the C++ kernels have: tiles, chunks, threads and instruction sets."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from deform_conv_cases import Case, large_case, random_case, run
from operator_testing import assert_same

from deformnet.ops import backends, cpu, deform_conv2d

if backends.why_unavailable("cpu"):
    pytest.skip(str(backends.why_unavailable("cpu")), allow_module_level=True)

BEST = cpu.instruction_set()


def case(
    batch: int,
    channels: int,
    size: tuple[int, int],
    *,
    out_channels: int = 40,
    groups: int = 1,
    offset_groups: int = 1,
    stride: int = 1,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    out = tuple((side - 1) // stride + 1 for side in size)
    return Case(
        input=normal(batch, channels, *size),
        offset=normal(batch, 18 * offset_groups, *out) * 3,
        weight=normal(out_channels, channels // groups, 3, 3) / 10,
        bias=None,
        mask=normal(batch, 9 * offset_groups, *out).sigmoid(),
        stride=(stride, stride),
        padding=(1, 1),
        dilation=(1, 1),
    )


CASES = {
    "an image in several chunks": case(2, 104, (31, 27), offset_groups=2),
    "several images in a chunk": case(7, 48, (7, 9), groups=2),
    "images copied in two parts": case(3, 16, (257, 263), stride=9),
    "channels beyond one block": case(1, 700, (5, 6), out_channels=8),
    "a group that starts within a block": case(1, 1000, (4, 5), out_channels=8, groups=4),
    "depthwise": case(3, 35, (13, 14), out_channels=35, groups=35, offset_groups=5),
    "depthwise, two filters a channel": case(2, 24, (9, 9), out_channels=48, groups=24),
    "narrow groups, several to a panel": case(3, 40, (9, 8), out_channels=20, groups=5),
    "narrow groups that fill no panel": case(
        2, 33, (11, 9), out_channels=6, groups=3, offset_groups=3
    ),
    "groups wider than a panel": case(3, 80, (15, 20), out_channels=34, groups=2, offset_groups=5),
    "one output channel": case(2, 33, (11, 12), out_channels=1),
    "one channel an offset group": case(2, 6, (10, 11), offset_groups=6),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_way_through_the_kernels_agrees_with_the_reference(name, channels_last):
    some = CASES[name]
    if channels_last:
        some = replace(some, input=some.input.contiguous(memory_format=torch.channels_last))
    assert_same(run(some, "cpu"), run(some, "reference"), 1e-11)


@pytest.mark.parametrize(
    "wanted", [("input",), ("offset",), ("weight",), ("input", "weight")], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_gradients_do_not_depend_on_which_others_are_wanted(name, wanted):
    def gradients(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = {key: getattr(some, key).detach().requires_grad_(key in names) for key in every}
        output = deform_conv2d(
            *(leaves["input"], leaves["offset"], leaves["weight"], None),
            *(some.stride, some.padding, some.dilation),
            mask=some.mask,
        )
        output.backward(torch.ones_like(output))
        return {key: leaf.grad for key, leaf in leaves.items() if key in names}

    some, every = CASES[name], ("input", "offset", "weight")
    found, all_of_them = gradients(wanted), gradients(every)
    for key in wanted:
        assert torch.equal(found[key], all_of_them[key])


@pytest.mark.parametrize("border", ["zeros", "msra2017"])
def test_every_instruction_set_agrees_with_the_reference(instructions, border):
    assert cpu.instruction_set() == instructions
    for some in (*map(random_case, range(12)), large_case(0), large_case(1, channels_last=True)):
        assert_same(run(some, "cpu", border), run(some, "reference", border), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_instruction_set_converts_halves_as_pytorch_does(instructions, dtype):
    # A 1x1 kernel with weight 1 at whole positions copies: what comes out is what went in.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].reshape(1, 1, 1, -1)
    offset = torch.zeros(1, 2, 1, numbers.shape[-1])
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    # The neighbor is read with weight 0, so that negative zero becomes zero: compare as numbers.
    assert torch.equal(deform_conv2d(numbers, offset, weight), numbers)
    # A bias in the same type makes sums that must be rounded.
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(1, 1, 1, 4096, generator=generator) * 3).to(dtype)
    offset = torch.zeros(1, 2, 1, 4096)
    for bias in (1.0, 0.01, 1e-6, 3e4):
        biases = torch.tensor([bias], dtype=dtype)
        wanted = (numbers.float() + biases.float()).to(dtype)
        assert torch.equal(deform_conv2d(numbers, offset, weight, biases), wanted)


# Rows, channels and output channels that leave remainders of tiles; groups that share a block.
TILED = {
    "one tile": case(1, 32, (3, 5), out_channels=16),
    "remainders of all": case(2, 64, (9, 11), out_channels=48),
    "groups and offset groups": case(2, 128, (9, 11), out_channels=70, groups=2, offset_groups=4),
    "groups beyond one block": case(1, 1408, (6, 7), out_channels=40, groups=2),
    "channels beyond one block": case(1, 1312, (6, 7), out_channels=33),
}


@pytest.mark.parametrize("name", TILED)
def test_tiles_of_bfloat16_are_as_exact_as_a_convolution(name):
    if BEST != "amx":
        pytest.skip("this machine has no tiles")
    some = TILED[name].to(torch.bfloat16, torch.float32)
    error, plain_error = (
        (function() - exact).abs().max().item()
        for function, exact in (
            (lambda: deform_conv2d(*some.public), exact_output(some)),
            (lambda: plain_output(some), plain_output(some.to(torch.float64))),
        )
    )
    assert error <= 2 * plain_error
    with_one_thread = deform_conv2d(*some.public)
    torch.set_num_threads(3)
    assert deform_conv2d(*some.public).equal(with_one_thread)


def exact_output(some: Case) -> torch.Tensor:
    return deform_conv2d(*some.to(torch.float64).public, backend="reference")


def plain_output(some: Case) -> torch.Tensor:
    groups = some.input.shape[1] // some.weight.shape[1]
    return torch.nn.functional.conv2d(some.input, some.weight, some.bias, padding=1, groups=groups)


@pytest.mark.parametrize("name", CASES)
def test_the_bits_do_not_depend_on_the_number_of_threads(name):
    some = CASES[name].to(torch.float32)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(some, "cpu"))
    for result in results[1:]:
        for key, value in result.items():
            assert torch.equal(value, results[0][key]), key


# In a process of its own: the highest memory use of this one lies behind it.
MEMORY_OF_A_BATCH = """
import resource, torch
from deformnet.ops import deform_conv2d

def step(batch):
    x = torch.randn(batch, 32, 64, 64, requires_grad=True)
    offset = torch.randn(batch, 18, 64, 64, requires_grad=True)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    gradient = torch.randn(batch, 32, 64, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = deform_conv2d(x, offset, weight, padding=1)
    gradients = torch.autograd.grad(output, (x, offset, weight), gradient)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 - output.nbytes - sum(g.nbytes for g in gradients)

step(1)
print(step(48))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units")
def test_memory_does_not_grow_with_the_batch():
    command = [sys.executable, "-c", MEMORY_OF_A_BATCH]
    beyond_tensors = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # The columns of 48 images would be 226 MB, once in the forward pass and twice in the backward.
    assert beyond_tensors < 64 * 2**20


def test_coordinates_beyond_32_bits_are_refused():
    arguments = torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 1, 3), torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="expected padding to give at most 2147483647 columns"):
        deform_conv2d(*arguments, stride=(1, 2**32), padding=(0, 2**32), backend="cpu")
    # Rows have no such bound: only the middle one lies on the map.
    arguments = torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 3, 1), torch.ones(1, 1, 1, 1)
    found = deform_conv2d(*arguments, stride=(2**32, 1), padding=(2**32, 0), backend="cpu")
    assert found.flatten().tolist() == [0, 1, 0]


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
