"""Infinities and NaN: nothing is read out of bounds, and nothing is touched that they do not feed.

torchvision's kernel is not run here: it crashes on the first case.
"""

from dataclasses import replace

import pytest
import torch
from both_operators import check_bad_gradients
from deform_conv_cases import EVERY_BORDER, Case, output_gradient, random_case, run
from operator_testing import (
    Normal,
    assert_nan_at,
    assert_same,
    assert_same_where_finite,
    with_bad_pixels,
)

from deformnet.ops import deform_conv2d

NAN, INF = float("nan"), float("inf")
# Where one sample of `a_case` is taken: image, offset group, tap, output row and column.
N, GROUP, TAP, ROW, COLUMN = 1, 1, 4, 2, 3


def a_case(*, modulated: bool = True, groups: int = 2, offset_scale: float = 0.4) -> Case:
    """A map 7 wide, all samples within it, off the whole numbers."""
    normal = Normal()
    return Case(
        input=normal(2, 8, 6, 7),
        offset=normal(2, 2 * 2 * 9, 6, 7).clamp(-2, 2) * offset_scale,
        weight=normal(6, 8 // groups, 3, 3),
        bias=normal(6),
        mask=normal(2, 2 * 9, 6, 7) if modulated else None,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )


def with_offset(case: Case, y: float | None, x: float | None) -> Case:
    offset = case.offset.clone()
    channel = 2 * (GROUP * 9 + TAP)
    for k, value in enumerate((y, x)):
        if value is not None:
            offset[N, channel + k, ROW, COLUMN] = value
    return replace(case, offset=offset)


def fed(case: Case, results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a NaN position of that one sample reaches, as masks."""
    reached = {name: torch.zeros(value.shape, dtype=bool) for name, value in results.items()}
    out_channels = case.weight.shape[0]
    groups = case.input.shape[1] // case.weight.shape[1]
    # The second offset group is the second half of the channels: the second group, or that half.
    outs = slice(out_channels // 2, None) if groups == 2 else slice(None)
    ins = slice(None) if groups == 2 else slice(case.weight.shape[1] // 2, None)
    channel = 2 * (GROUP * 9 + TAP)
    reached["output"][N, outs, ROW, COLUMN] = True
    reached["grad_offset"][N, channel : channel + 2, ROW, COLUMN] = True
    reached["grad_weight"].flatten(2)[outs, ins, TAP] = True
    if case.mask is not None:
        reached["grad_mask"][N, GROUP * 9 + TAP, ROW, COLUMN] = True
    return reached


@EVERY_BORDER
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("modulated", "groups"), [(True, 2), (False, 1), (True, 1)])
@pytest.mark.parametrize(
    ("y", "x"), [(NAN, None), (None, NAN), (NAN, NAN), (NAN, INF), (-INF, NAN), (1e30, NAN)]
)
def test_nan_offset(backend, y, x, modulated, groups, dtype, border):
    case = a_case(modulated=modulated, groups=groups).to(dtype)
    found = run(with_offset(case, y, x), backend, border)
    # All else is as if that sample were taken outside.
    clean = run(with_offset(case, 1e4, 1e4), backend, border)
    assert_nan_at(found, clean, fed(case, found), 1e-6)


def test_all_offsets_nan(backend):
    case = a_case()
    found = run(replace(case, offset=torch.full_like(case.offset, NAN)), backend)
    for name in ("output", "grad_offset", "grad_weight", "grad_mask"):
        assert found[name].isnan().all(), name
    assert found["grad_input"].count_nonzero() == 0
    assert found["grad_bias"].isfinite().all()


@EVERY_BORDER
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [INF, -INF, 1e10, -1e10, 2.0**31, -(2.0**31), 2.0**63, 3e38])
def test_infinite_and_huge_offsets_read_outside(backend, value, dtype, border):
    case = a_case().to(dtype)
    clean = run(with_offset(case, 1e4, 1e4), backend, border)
    for y, x in [(value, None), (None, value), (value, -value)]:
        found = run(with_offset(case, y, x), backend, border)
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert_same(found, clean, 0.0)
    channel = 2 * (GROUP * 9 + TAP)
    assert not clean["grad_offset"][N, channel : channel + 2, ROW, COLUMN].any()
    assert clean["grad_mask"][N, GROUP * 9 + TAP, ROW, COLUMN] == 0


def test_all_offsets_infinite_leave_the_bias(backend):
    case = a_case()
    found = run(replace(case, offset=torch.full_like(case.offset, INF)), backend)
    assert found["output"].equal(case.bias[:, None, None].expand_as(found["output"]))
    for name in ("grad_input", "grad_offset", "grad_weight", "grad_mask"):
        assert found[name].count_nonzero() == 0, name


def test_nan_mask(backend):
    case = a_case()
    mask = case.mask.clone()
    at = N, GROUP * 9 + TAP, ROW, COLUMN
    mask[at] = 0
    clean = run(replace(case, mask=mask.clone()), backend)
    mask[at] = NAN
    found = run(replace(case, mask=mask), backend)
    reached = fed(case, found)
    # The derivative by the mask does not hold the mask; the one by the input does.
    reached["grad_mask"].zero_()
    y = ROW + TAP // 3 - 1 + case.offset[N, 2 * at[1], ROW, COLUMN].item()
    x = COLUMN + TAP % 3 - 1 + case.offset[N, 2 * at[1] + 1, ROW, COLUMN].item()
    rows, columns = int(y // 1), int(x // 1)
    reached["grad_input"][N, 4:, rows : rows + 2, columns : columns + 2] = True
    assert_nan_at(found, clean, reached, 1e-12)


@EVERY_BORDER
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_corners_outside_are_zero_whatever_the_map_holds(backend, bad, border):
    # Samples half outside on each side, and wholly outside. Every pixel but those of the one
    # inner corner is bad: a corner that is clamped into the map and multiplied by zero shows.
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for y, x, inner in [
        (-0.5, 2.0, (0, 2)),
        (-0.25, -0.5, (0, 0)),
        (3.5, 2.0, (3, 2)),
        (1.0, 4.75, (1, 4)),
        (3.5, 4.75, (3, 4)),
        (3.75, -0.25, (3, 0)),
    ]:
        inside = min(y, 3 - 1e-9) >= 0 and x >= 0
        input = torch.full((1, 1, 4, 5), bad, dtype=torch.float64)
        # Whole coordinates weigh the next pixel with zero, which is a product like any other.
        input[0, 0, inner[0] : inner[0] + 2, inner[1] : inner[1] + 2] = 1
        offset = torch.tensor([y, x], dtype=torch.float64).reshape(1, 2, 1, 1)
        found = deform_conv2d(
            input, offset, weight, stride=9, border=border, backend=backend
        ).item()
        if border == "msra2017":
            wanted = 1.0 if inside else 0.0
        else:
            wanted = max(0, 1 - abs(y - min(max(y, 0), 3))) * max(0, 1 - abs(x - min(max(x, 0), 4)))
        assert found == pytest.approx(wanted, abs=1e-12), (y, x)

    everywhere = torch.full((1, 1, 4, 5), bad, dtype=torch.float64)
    for y, x in [(-1.5, 2.0), (4.0, 2.0), (1.0, -7.0), (1.0, 5.0), (INF, 1.0), (-9e9, 1.0)]:
        offset = torch.tensor([y, x], dtype=torch.float64).reshape(1, 2, 1, 1)
        found = deform_conv2d(everywhere, offset, weight, stride=9, border=border, backend=backend)
        assert found.item() == 0


@EVERY_BORDER
@pytest.mark.parametrize("seed", range(20))
def test_bad_pixels_touch_only_what_reads_them(fast, seed, border):
    case = random_case(seed)
    case = replace(case, input=with_bad_pixels(case.input, seed))
    wanted, found = run(case, "reference", border), run(case, fast, border)
    if border == "msra2017":
        # The derivative by a coordinate held at the border, zero times what the map holds there,
        # is left open.
        del wanted["grad_offset"]
    assert_same_where_finite(found, wanted)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_gradients_stay_where_they_belong(backend, bad):
    check_bad_gradients(a_case(groups=1), backend, (N, slice(None), ROW, COLUMN), bad)


@EVERY_BORDER
@pytest.mark.parametrize("infinite", ["weight", "mask", "grad_output"])
def test_what_lies_outside_has_no_slope_whatever_it_is_multiplied_with(backend, infinite, border):
    case = a_case()
    case = replace(case, offset=torch.full_like(case.offset, 100.0))
    gradient = torch.ones_like(output_gradient(case))
    if infinite == "grad_output":
        gradient[:] = INF
    else:
        case = replace(case, **{infinite: torch.full_like(getattr(case, infinite), INF)})
    found = run(case, backend, border, gradient)
    assert not found["grad_offset"].any()
    assert not found["grad_input"].any()


def test_the_2017_kernel_has_no_slope_where_it_stays_at_the_last_cell(backend):
    offset = torch.full((1, 2, 4, 5), 0.25, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    image = torch.ones(1, 1, 4, 5, dtype=torch.float64)
    output = deform_conv2d(image, offset, one, border="msra2017", backend=backend)
    output.backward(torch.full_like(output, INF))
    assert offset.grad is not None
    assert not offset.grad[0, 0, -1].any()
    assert not offset.grad[0, 1, :, -1].any()
    assert offset.grad[0, :, :-1, :-1].isnan().all()  # an infinity times a slope of zero


@pytest.mark.parametrize("width", [1, 6, 7, 8, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_width_survives_any_offset(backend, width, dtype):
    values = torch.tensor([NAN, INF, -INF, 0.0, -1.0, width, 1e10, -1e10, 3e38, 0.5])
    normal = Normal(width)
    shape = (2, 18, 5, width)
    offset = values[torch.randint(len(values), shape, generator=normal.generator)].to(dtype)
    input = normal(2, 3, 5, width).to(dtype).requires_grad_()
    weight = normal(4, 3, 3, 3).to(dtype).requires_grad_()
    offset.requires_grad_()
    output = deform_conv2d(input, offset, weight, padding=1, backend=backend)
    output.backward(torch.ones_like(output))
    assert input.grad.isfinite().all()
    nan = (offset.detach().isnan()).reshape(2, 9, 2, 5, width).any((1, 2))
    assert output.isnan().all(1).equal(nan)
    assert output.isnan().any(1).equal(nan)
