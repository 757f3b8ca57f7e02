"""What the RoI poolings take and refuse: layouts, sizes, dtypes, autocast, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from operator_testing import HALVES, assert_same, bad, check_bad_input
from roi_pool_cases import (
    EVERY_SAMPLING,
    ROI_OR_PS,
    call,
    large_case,
    random_case,
)
from torch.utils._python_dispatch import TorchDispatchMode

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool
from deformnet.ops.roi_pool import reference


@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
@EVERY_SAMPLING
def test_map_of_one_pixel(backend, sampling, function):
    input = torch.full((1, 6, 1, 1), 3.0)
    boxes = torch.tensor([[0.0, 0, 0, 7, 7]])
    size = (2, 3) if function is deform_ps_roi_pool else (1, 1)
    found = function(input, boxes, None, size, 1 / 16, sampling=sampling, backend=backend)
    # Less than half of the pixel, which is all of it when rounded.
    assert found.unique().tolist() == [3]


@ROI_OR_PS
def test_a_list_of_boxes(backend, position_sensitive):
    case = large_case("aligned", position_sensitive)
    boxes = case.boxes[case.boxes[:, 0].sort(stable=True).indices]
    parts = [boxes[boxes[:, 0] == n, 1:] for n in (0, 1)]
    assert min(map(len, parts)) > 5
    wanted = call(replace(case, boxes=boxes), backend)
    assert call(replace(case, boxes=parts), backend).equal(wanted)
    assert call(replace(case, boxes=tuple(parts)), backend).equal(wanted)
    # Images without boxes, in the middle, at the end or left out.
    none = boxes[:0, 1:]
    second = replace(case, boxes=[none, parts[1]], offset=None)
    rows = boxes[boxes[:, 0] == 1]
    assert call(second, backend).equal(call(replace(second, boxes=rows), backend))
    assert call(replace(case, boxes=[none, none], offset=None), backend).shape[0] == 0
    assert call(replace(case, boxes=[], offset=None), backend).shape[0] == 0
    first = replace(case, boxes=[parts[0]], offset=None)
    rows = boxes[boxes[:, 0] == 0]
    assert call(first, backend).equal(call(replace(first, boxes=rows), backend))


def test_no_gradient_goes_to_boxes(backend):
    case = random_case(3, shifted=True)
    boxes = case.boxes.clone().requires_grad_()
    assert not call(replace(case, boxes=boxes), backend).requires_grad
    input = case.input.clone().requires_grad_()
    call(replace(case, input=input, boxes=boxes), backend).sum().backward()
    assert boxes.grad is None
    assert input.grad is not None


@pytest.mark.parametrize("boxes", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_boxes_may_be_more_precise_or_less(backend, dtype, boxes):
    case = large_case("bins", True).to(dtype)
    case = replace(case, boxes=case.boxes.to(torch.float32).to(boxes))
    wanted = call(case.to(torch.float64), "reference")
    found = call(case, backend)
    assert found.dtype == dtype
    assert_same({"": found}, {"": wanted}, max(1e-12, 2 * torch.finfo(dtype).eps))


@EVERY_SAMPLING
def test_boxes_are_not_rounded_to_the_dtype_of_the_map(backend, sampling):
    # A step from 0 to 1 in a map of 1200 columns; bfloat16 knows no number between 1024 and 1032.
    input = (torch.arange(1200) >= 1027).to(torch.bfloat16).reshape(1, 1, 1, 1200)
    boxes = torch.tensor([[0.0, 1028, 0, 1030, 0], [0, 1020, 0, 1024, 0]])
    found = deform_roi_pool(input, boxes, None, 1, sampling=sampling, backend=backend)
    assert found.flatten().tolist() == [1, 0]


def good() -> dict:
    """A right call, made of fresh tensors: whatever mode is on applies to them."""
    return {
        "input": torch.ones(2, 24, 7, 8),
        "boxes": torch.tensor([[0.0, 1, 1, 5, 5], [1, 0, 0, 3, 3], [1, 2, 2, 3, 3]]),
        "offset": torch.zeros(3, 4, 2, 3),
        "output_size": (2, 3),
        "spatial_scale": 0.5,
        "gamma": 0.1,
    }


def image_index(value: float) -> torch.Tensor:
    boxes = good()["boxes"]
    boxes[1, 0] = value
    return boxes


ones = torch.ones
OFFSET = (
    "to have shape [3, 2 * G, 2, 3], where G divides the ... channels of the output, but got shape "
)
MAP = "to have at least one channel, row and column, but got shape "
INTS = "to be an int or a pair of ints, but got "
BAD = [
    bad("input", lambda: ones(24, 7, 8), ValueError,
        "to be 4-dimensional, but got shape [24, 7, 8]"),
    bad("input", lambda: [1.0], TypeError, "to be a tensor, but got list"),
    bad("input", lambda: ones(2, 24, 7, 8).long(), TypeError, "...float32..., but got torch.int64"),
    bad("input", lambda: ones(2, 24, 0, 8), ValueError, f"{MAP}[2, 24, 0, 8]"),
    bad("input", lambda: ones(2, 0, 7, 8), ValueError, f"{MAP}[2, 0, 7, 8]"),
    bad("boxes", lambda: ones(3, 4), ValueError,
        "to have shape [R, 5] or to be a list of [r, 4], but got shape [3, 4]"),
    bad("boxes", lambda: ones(5), ValueError, "to be 2-dimensional, but got shape [5]"),
    bad("boxes", lambda: None, TypeError, "to be a tensor or a list of tensors, but got NoneType"),
    bad("boxes", lambda: ones(3, 5).long(), TypeError,
        "to be one of ...torch.float32, torch.float64, but got torch.int64"),
    bad("boxes", lambda: ones(3, 5, device="meta"), ValueError,
        "to be on cpu like input, but got meta"),
    bad("boxes", lambda: [ones(1, 4)] * 3, ValueError,
        "to have at most one tensor for each of the 2 images, but got 3"),
    bad("boxes", lambda: [ones(3, 5)], ValueError, "...to have shape [r, 4], but got shape [3, 5]"),
    bad("boxes", lambda: [1.0, 2.0], TypeError, "...to be a tensor, but got float"),
    bad("boxes", lambda: [ones(3, 4), ones(3, 4).double()], ValueError,
        "...to be torch.float32 on cpu like boxes[0], but got torch.float64 on cpu"),
    bad("offset", lambda: ones(3, 4), ValueError, "to be 4-dimensional, but got shape [3, 4]"),
    bad("offset", lambda: ones(3, 4, 2, 3).double(), TypeError,
        "to be torch.float32 like input or torch.float32, but got torch.float64"),
    bad("offset", lambda: ones(3, 4, 2, 3, device="meta"), ValueError,
        "to be on cpu like input, but got meta"),
    bad("offset", lambda: 0.0, TypeError, "to be a tensor, but got float"),
    bad("offset", lambda: ones(2, 4, 2, 3), ValueError, f"{OFFSET}[2, 4, 2, 3]"),
    bad("offset", lambda: ones(3, 4, 3, 3), ValueError, f"{OFFSET}[3, 4, 3, 3]"),
    bad("offset", lambda: ones(3, 3, 2, 3), ValueError, f"{OFFSET}[3, 3, 2, 3]"),
    bad("offset", lambda: ones(3, 0, 2, 3), ValueError, f"{OFFSET}[3, 0, 2, 3]"),
    bad("offset", lambda: ones(3, 14, 2, 3), ValueError, f"{OFFSET}[3, 14, 2, 3]"),
    bad("offset", lambda: ones(3, 4, 0, 3), ValueError,
        "to have shape [3, 2 * G, part_h, part_w], ... but got shape [3, 4, 0, 3]",
        sampling="msra"),
    bad("output_size", lambda: (0, 3), ValueError, "to be at least 1, but got (0, 3)"),
    bad("output_size", lambda: (1, 2, 3), ValueError, f"{INTS}3 values"),
    bad("output_size", lambda: 1.5, TypeError, f"{INTS}1.5"),
    bad("spatial_scale", lambda: 0.0, ValueError, "to be positive, but got 0.0"),
    bad("spatial_scale", lambda: float("nan"), ValueError, "to be positive, but got nan"),
    bad("spatial_scale", lambda: "1/16", TypeError, "to be a number, but got '1/16'"),
    bad("gamma", lambda: float("inf"), ValueError, "to be finite, but got inf"),
    bad("sampling", lambda: "paper", ValueError,
        "to be one of bins, msra, aligned, but got 'paper'"),
    bad("samples_per_bin", lambda: -1, ValueError, "to be at least 0, but got -1",
        sampling="aligned"),
    bad("samples_per_bin", lambda: 0, ValueError,
        "to be at least 1 (only \"aligned\" adapts with 0), but got 0 with 'msra'",
        sampling="msra"),
    bad("samples_per_bin", lambda: 0.5, TypeError, "to be an int, but got 0.5"),
    bad("backend", lambda: "cudnn", ValueError,
        "to be one of auto, reference, cpu, triton, but got 'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
def test_the_good_call_is_good(function):
    channels = 4 if function is deform_ps_roi_pool else 24
    assert function(**good()).shape == (3, channels, 2, 3)


@pytest.mark.parametrize(
    ("mode", "function"),
    [
        ("eager", deform_roi_pool),
        ("eager", deform_ps_roi_pool),
        ("fake", deform_ps_roi_pool),
        ("autocast", deform_ps_roi_pool),
        ("compiled", deform_roi_pool),
    ],
)
@pytest.mark.parametrize("row", BAD)
def test_bad_input(row, mode, function):
    check_bad_input(function, good, row, mode)


@pytest.mark.parametrize(
    "change",
    [
        {"output_size": [np.int64(2), np.int32(3)], "samples_per_bin": np.int16(4)},
        {"output_size": torch.Size([2, 3]), "samples_per_bin": torch.tensor(4)},
        {"spatial_scale": np.float32(0.5), "gamma": np.float64(0.1)},
    ],
    ids=["NumPy integers", "others", "NumPy floats"],
)
def test_numbers_are_taken_as_conv2d_takes_them(backend, change):
    expected = deform_roi_pool(**good(), sampling="msra", backend=backend)
    found = deform_roi_pool(**{**good(), **change}, sampling="msra", backend=backend)
    assert found.equal(expected)


def test_channels_that_the_bins_do_not_divide():
    call = {**good(), "input": torch.ones(2, 23, 7, 8), "offset": None}
    assert deform_roi_pool(**call).shape == (3, 23, 2, 3)
    message = r"expected input to have channels in multiples of the 2 \* 3 bins, but got .*23, 7, 8"
    with pytest.raises(ValueError, match=message):
        deform_ps_roi_pool(**call)


@pytest.mark.parametrize("mode", ["eager", "compiled", "operator", "backward"])
@pytest.mark.parametrize("value", [-1.0, 2.0, 0.5, 1e30, float("nan"), float("-inf")])
def test_boxes_of_images_that_are_not_there(backend, value, mode):
    boxes = image_index(value)
    input, offset = good()["input"], good()["offset"]
    rule = ((2, 3), 0.5, 0.1, "bins", 4, False)
    function = deform_roi_pool
    if mode == "compiled":
        if backend == "reference":
            pytest.skip("a compiler that traces the reference cannot see the values")
        torch._dynamo.reset()
        function = torch.compile(deform_roi_pool, fullgraph=True, backend="aot_eager")
    calls = {
        "operator": lambda: torch.ops.deformnet.roi_pool(input, boxes, offset, *rule),
        "backward": lambda: torch.ops.deformnet.roi_pool_backward(
            torch.ones(3, 24, 2, 3), input, boxes, offset, *rule, [True, True]
        ),
    }
    run = calls.get(mode, lambda: function(**{**good(), "boxes": boxes}, backend=backend))
    message = "expected the first column of boxes to be .* from 0 to 1, but got .* in row 1$"
    with pytest.raises(ValueError, match=message):
        run()


def test_the_reference_reads_nothing_of_images_that_are_not_there():
    # As on a device whose values nobody waits for: what a compiler makes of the reference.
    compiled = torch.compile(deform_roi_pool, backend="aot_eager", fullgraph=True)
    for value in (-1.0, 2.0, 1e30, float("nan")):
        found = compiled(**{**good(), "boxes": image_index(value)}, backend="reference")
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("boxes", torch.zeros(4, 5)),
        ("offset", torch.zeros(3, 4, 2, 2)),
        ("input", torch.ones(2, 23, 7, 8)),
        ("input", None),
        ("samples_per_bin", -4),
        ("output_size", (0, 3)),
        ("output_size", (2,)),
        ("output_size", (2, 3, 1)),
        ("grad_output", None),
        ("grad_output", torch.ones(3, 4, 2, 2)),
        ("grad_output", torch.ones(3, 4, 2, 3, dtype=torch.float64)),
    ],
)
def test_the_operators_themselves_refuse_what_would_be_read_out_of_bounds(fast, name, value):
    arguments = {
        **good(),
        "sampling": "bins",
        "samples_per_bin": 4,
        "position_sensitive": True,
        name: value,
    }
    operator = torch.ops.deformnet.roi_pool
    if name == "grad_output":
        operator = torch.ops.deformnet.roi_pool_backward
        arguments["needs"] = [True, True]
    # Two sizes that should agree: either may be named.
    named = "(boxes|offset)" if name == "boxes" else name
    with pytest.raises((ValueError, TypeError), match=f"expected {named} to"):
        operator(**arguments)


def test_the_gradient_of_no_offset_is_refused(fast):
    input, boxes = good()["input"], good()["boxes"]
    rule = ((2, 3), 0.5, 0.1, "bins", 4, True)
    with pytest.raises(ValueError, match="expected needs to be False for offset=None"):
        torch.ops.deformnet.roi_pool_backward(
            torch.ones(3, 4, 2, 3), input, boxes, None, *rule, [True, True]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lists_of_half_precision_boxes_count_images(backend, dtype):
    """257 is no number of bfloat16; from 2049 on float16 has every second one."""
    images = 258 if dtype == torch.bfloat16 else 2050
    maps = torch.zeros(images, 1, 1, 1, dtype=dtype)
    maps[-1] = 1
    boxes = [torch.zeros(0, 4, dtype=dtype)] * (images - 1)
    boxes.append(torch.tensor([[0.0, 0, 0, 0]], dtype=dtype))
    assert deform_roi_pool(maps, boxes, None, 1, backend=backend).tolist() == [[[[1]]]]
    with torch.autocast("cpu", dtype):
        assert deform_roi_pool(maps, boxes, None, 1, backend=backend).tolist() == [[[[1]]]]


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        assert getattr(output, "dtype", None) != torch.float64, function
        return output


@EVERY_SAMPLING
def test_the_reference_runs_without_float64(monkeypatch, sampling):
    case = large_case(sampling, True).to(torch.float32)
    expected = call(case, "reference")
    monkeypatch.setattr(reference, "_position_dtype", lambda boxes: torch.float32)
    with NoFloat64():
        found = call(case, "reference")
    # Boxes are rounded in float32, too; their corners are not close to halves.
    assert_same({"": found}, {"": expected}, 1e-4)
