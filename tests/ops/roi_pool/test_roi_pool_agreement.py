"""Every backend against other implementations, and the fast ones against the reference."""

import itertools
from dataclasses import replace

import pytest
import torch
import torchvision
from operator_testing import Normal, assert_same, differentiate
from roi_pool_cases import (
    EVERY_SAMPLING,
    ROI_OR_PS,
    Case,
    call,
    large_case,
    output_gradient,
    random_case,
    run,
)

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool


def run_torchvision(case: Case) -> dict[str, torch.Tensor]:
    rule = case.output_size, case.spatial_scale, case.samples_per_bin
    return differentiate(
        lambda input: torchvision.ops.roi_align(input, case.boxes, *rule, aligned=True),
        {"input": case.input},
        output_gradient(case),
    )


def right_side_out(case: Case) -> Case:
    low, high = case.boxes[:, 1:3], case.boxes[:, 3:]
    corners = [torch.minimum(low, high), torch.maximum(low, high)]
    return replace(case, boxes=torch.cat([case.boxes[:, :1], *corners], dim=1))


@pytest.mark.parametrize("samples_per_bin", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(25))
def test_aligned_without_offsets_is_roi_align(backend, seed, samples_per_bin):
    case = random_case(seed, "aligned", False, shifted=False)
    case = replace(case, samples_per_bin=samples_per_bin)
    if samples_per_bin == 0:
        # torchvision fails on a box inside out, where the number of samples would be negative.
        case = right_side_out(case)
    assert_same(run(case, backend), run_torchvision(case), 1e-10)


@pytest.mark.parametrize("samples_per_bin", [0, 3])
def test_aligned_without_offsets_is_roi_align_on_a_larger_map(backend, samples_per_bin):
    case = large_case("aligned", False, samples_per_bin=samples_per_bin)
    case = replace(right_side_out(case), offset=None)
    assert_same(run(case, backend), run_torchvision(case), 1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_whole_bins_are_means_of_slices(backend, seed):
    # "bins" without offsets is average pooling, of boxes inside the map.
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(2, 3, 9, 12, generator=generator, dtype=torch.float64)
    height, width = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
    y, x = (int(torch.randint(0, 4, (), generator=generator)) for _ in range(2))
    boxes = torch.tensor([[1, x, y, x + width - 1, y + height - 1]], dtype=torch.float64)
    found = deform_roi_pool(input, boxes, None, (3, 4), backend=backend)
    wanted = torch.nn.functional.adaptive_avg_pool2d(
        input[1:, :, y : y + height, x : x + width], (3, 4)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_offsets_are_no_offsets_bit_for_bit(backend, dtype, sampling, position_sensitive):
    cases = [random_case(seed, sampling, position_sensitive, shifted=True) for seed in range(10)]
    cases += [large_case(sampling, position_sensitive, groups=groups) for groups in (6, 42)]
    for case in cases:
        case = case.to(dtype)
        still = run(replace(case, offset=torch.zeros_like(case.offset)), backend)
        plain = run(replace(case, offset=None), backend)
        assert still["output"].equal(plain["output"])
        torch.testing.assert_close(
            still["grad_input"], plain["grad_input"], rtol=0, atol=8 * torch.finfo(dtype).eps
        )


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_fast_against_reference(fast, seed, sampling, position_sensitive):
    check_against_reference(random_case(seed, sampling, position_sensitive), fast)


def check_against_reference(case: Case, fast: str) -> None:
    assert_same(run(case, fast), run(case, "reference"), 1e-10)
    single = case.to(torch.float32)
    # Rounded to float32 first, so that both see the same positions; then exact arithmetic.
    assert_same(run(single, fast), run(single.to(torch.float64), "reference"), 2e-5)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 42])
def test_fast_against_reference_on_larger_maps(
    fast, groups, channels_last, sampling, position_sensitive
):
    case = large_case(sampling, position_sensitive, groups=groups, channels_last=channels_last)
    check_against_reference(case, fast)


@ROI_OR_PS
@EVERY_SAMPLING
def test_groups_are_calls_of_their_own(backend, sampling, position_sensitive):
    # Each run of output channels is pooled as if it were alone with its own offsets.
    case = large_case(sampling, position_sensitive, groups=3)
    whole = call(case, backend)
    inputs, outputs = case.input.chunk(3, dim=1), whole.chunk(3, dim=1)
    for g in range(3):
        alone = replace(case, input=inputs[g], offset=case.offset[:, 2 * g : 2 * g + 2])
        torch.testing.assert_close(call(alone, backend), outputs[g], rtol=0, atol=1e-12)


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("groups", [2, 42])
def test_boxes_are_calls_of_their_own(backend, groups, sampling, position_sensitive):
    case = large_case(sampling, position_sensitive, groups=groups)
    whole = call(case, backend)
    for r in range(whole.shape[0]):
        rows = slice(r, r + 1)
        alone = replace(case, boxes=case.boxes[rows], offset=case.offset[rows])
        torch.testing.assert_close(call(alone, backend), whole[rows], rtol=0, atol=1e-12)


@EVERY_SAMPLING
def test_position_sensitive_is_a_choice_of_channels(backend, sampling):
    # The plain pooling of all channels, of which each output takes its own.
    case = large_case(sampling, True)
    ph, pw = case.output_size
    found = call(case, backend)
    every = call(replace(case, position_sensitive=False), backend)
    for c, i, j in itertools.product(range(found.shape[1]), range(ph), range(pw)):
        wanted = every[:, (c * ph + i) * pw + j, i, j]
        torch.testing.assert_close(found[:, c, i, j], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
def test_each_bin_and_group_has_its_own_offset(backend, function):
    # One bin of one group at a time is moved by (x 2, y 1) onto the only pixel that is not zero.
    ps = function is deform_ps_roi_pool
    boxes = torch.tensor([[0, 0, 0, 2, 1]], dtype=torch.float64)
    for g, i, j in itertools.product(range(2), range(2), range(3)):
        # Output channel 2*g + 1, of two groups of two.
        channel = ((2 * g + 1) * 2 + i) * 3 + j if ps else 2 * g + 1
        input = torch.zeros(1, 24 if ps else 4, 8, 9, dtype=torch.float64)
        input[0, channel, i + 1, j + 2] = 5
        offset = torch.full((1, 4, 2, 3), 100.0, dtype=torch.float64)
        offset[0, 2 * g, i, j], offset[0, 2 * g + 1, i, j] = 2 / 3, 1 / 2
        found = function(input, boxes, offset, (2, 3), 1.0, 1.0, backend=backend)
        assert found[0, 2 * g + 1, i, j] == pytest.approx(5)
        assert found.count_nonzero() == 1


@ROI_OR_PS
def test_parts_of_another_size_than_the_bins(backend, position_sensitive):
    case = large_case("msra", position_sensitive, groups=2)
    offset = Normal(5)(23, 4, 2, 7)
    case = replace(case, offset=offset)
    # 3 x 5 bins of 2 x 7 parts: bins 0, 1, 2 are of parts 0, 0, 1; bins 0 .. 4 of these.
    spread = offset[:, :, [0, 0, 1]][:, :, :, [0, 1, 2, 4, 5]]
    found, wanted = run(case, backend), run(replace(case, offset=spread), backend)
    # The gradient of a part is the sum over its bins; parts 3 and 6 move none.
    by_bin, by_part = wanted["grad_offset"], torch.zeros_like(offset)
    for (i, k), (j, m) in itertools.product(enumerate([0, 0, 1]), enumerate([0, 1, 2, 4, 5])):
        by_part[:, :, k, m] += by_bin[:, :, i, j]
    assert_same(found, {**wanted, "grad_offset": by_part}, 1e-12)
