"""What only the C++ kernels of RoI pooling have: blocks, pieces, threads and instruction sets."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from operator_testing import assert_same
from roi_pool_cases import (
    SAMPLINGS,
    Case,
    large_case,
    output_gradient,
    random_boxes,
    random_case,
    run,
)

from deformnet.ops import backends, cpu

if backends.why_unavailable("cpu"):
    pytest.skip(str(backends.why_unavailable("cpu")), allow_module_level=True)

BEST = cpu.instruction_set()


def case(
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
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    planes = bins[0] * bins[1] if position_sensitive else 1
    return Case(
        input=normal(batch, channels * planes, *size),
        boxes=random_boxes(random.Random(0), boxes, batch, size[0] * 4, size[1] * 4),
        offset=normal(boxes, 2 * groups, *bins),
        output_size=bins,
        spatial_scale=0.25,
        gamma=0.1,
        sampling=sampling,
        samples_per_bin=samples_per_bin,
        position_sensitive=position_sensitive,
    )


CASES = {
    "bins in several blocks": case(1040, (9, 8), (6, 6), position_sensitive=False, boxes=3),
    "a channel for every thread": case(7, (9, 8), (2, 2), position_sensitive=False, groups=7),
    "wide groups": case(78, (9, 8), (2, 3), position_sensitive=False, groups=2),
    "planes in several pieces": case(3, (320, 420), (1, 2), position_sensitive=True),
    "bins wider than vectors": case(2, (20, 150), (2, 2), position_sensitive=True, groups=2),
    "images without boxes": case(3, (9, 8), (2, 2), position_sensitive=True, batch=9, boxes=4),
    "samples by the dozen": case(
        3, (9, 31), (2, 1), position_sensitive=True, sampling="aligned", samples_per_bin=29
    ),
    "samples by the dozen, adapting": case(
        18, (30, 90), (2, 1), position_sensitive=False, sampling="aligned", samples_per_bin=0
    ),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_way_through_the_kernels_agrees_with_the_reference(name, channels_last):
    some = CASES[name]
    if channels_last:
        some = replace(some, input=some.input.contiguous(memory_format=torch.channels_last))
    assert_same(run(some, "cpu"), run(some, "reference"), 1e-11)


@pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_instruction_set_agrees_with_the_reference(
    instructions, sampling, position_sensitive
):
    assert cpu.instruction_set() == instructions
    cases = [random_case(seed, sampling, position_sensitive) for seed in range(2000, 2008)]
    cases.append(large_case(sampling, position_sensitive, groups=3))
    for some in cases:
        assert_same(run(some, "cpu"), run(some, "reference"), 1e-11)
        single = some.to(torch.float32)
        assert_same(run(single, "cpu"), run(single.to(torch.float64), "reference"), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
def test_halves_are_rounded_once(instructions, position_sensitive, dtype):
    some = large_case("bins", position_sensitive).to(dtype, torch.float32)
    gradient = output_gradient(some)
    found = run(some, "cpu", gradient)
    exact = run(some.to(torch.float64), "reference", gradient.double())
    for name in ("output", "grad_input"):
        error = (found[name].double() - exact[name]).abs()
        # Half of the last bit, and what sums in float32 lose.
        bound = exact[name].abs() * torch.finfo(dtype).eps * 0.51 + 1e-5
        assert (error <= bound).all(), name


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


@pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_is_not_read_does_not_matter(instructions, sampling, position_sensitive):
    """One box in the middle of a map that is NaN everywhere else."""
    some = case(
        2, (12, 40), (2, 2), position_sensitive=position_sensitive, batch=1, sampling=sampling
    )
    boxes = torch.tensor([[0, 9 * 4, 4 * 4, 13 * 4, 7 * 4.0]], dtype=torch.float64)
    some = replace(some, boxes=boxes, offset=some.offset[:1].clamp(-1, 1)).to(torch.float32)
    reads = run(some, "reference", torch.ones(some.output_size_of()))["grad_input"]
    # Read with a weight of zero is read, too: a margin.
    near = torch.nn.functional.max_pool2d((reads != 0).float(), 3, 1, 1) > 0
    assert 0 < near.sum() < near.numel() / 2
    hidden = replace(some, input=torch.where(near, some.input, torch.nan))
    for name, value in run(hidden, "cpu").items():
        assert_same({name: value}, {name: run(some, "cpu")[name]}, 1e-6)


# In a process of its own: the highest memory use of this one lies behind it.
MEMORY = """
import resource, torch
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool

def step(pool, channels, batch, boxes):
    x = torch.randn(batch, channels, 64, 64, requires_grad=True)
    corners = torch.rand(boxes, 2) * 40
    image = torch.randint(0, batch, (boxes, 1))
    boxes = torch.cat([image, corners, corners + torch.rand(boxes, 2) * 30], 1)
    offset = torch.randn(len(boxes), 2, 3, 3, requires_grad=True)
    gradient = torch.randn(len(boxes), 36 if pool is deform_roi_pool else 4, 3, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = pool(x, boxes, offset, 3)
    gradients = torch.autograd.grad(output, (x, offset), gradient)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 - output.nbytes - sum(g.nbytes for g in gradients)

for pool in (deform_roi_pool, deform_ps_roi_pool):
    step(pool, 36, 1, 10)
    print(step(pool, 36, 96, 6000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units")
def test_memory_grows_neither_with_the_batch_nor_with_the_boxes():
    command = [sys.executable, "-c", MEMORY]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The maps in another layout would be 57 MB; the 9 bins of all boxes with 3x3 pixels, 70 MB.
    assert max(map(int, printed.split())) < 24 * 2**20
