"""What the RoI poolings take and refuse: layouts, sizes, dtypes, autocast, bad input."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from operator_testing import assert_same
from roi_pool_cases import SAMPLINGS, Case, call, large_case, output_gradient, random_case, run
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops import backends, deform_ps_roi_pool, deform_roi_pool, library

HALVES = [torch.bfloat16, torch.float16]
ROI_OR_PS = pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
EVERY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS)

# ----------------------------------------------------------------------------- sizes and layouts


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_no_boxes(backend, shifted, channels_last, sampling, position_sensitive):
    case = large_case(sampling, position_sensitive, channels_last=channels_last)
    offset = case.offset[:0] if shifted else None
    found = run(replace(case, boxes=case.boxes[:0], offset=offset), backend)
    assert found["output"].shape == (0, 42, 3, 5)
    assert found["grad_input"].shape == case.input.shape
    assert found["grad_input"].count_nonzero() == 0
    if shifted:
        assert found["grad_offset"].shape == (0, 2, 3, 5)


@EVERY_SAMPLING
def test_no_images(backend, sampling):
    case = large_case(sampling, True)
    found = run(
        replace(case, input=case.input[:0], boxes=case.boxes[:0], offset=case.offset[:0]), backend
    )
    assert found["output"].shape == (0, 42, 3, 5)
    assert found["grad_input"].shape == (0, 42 * 15, 14, 19)


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


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Every second element of a transposed tensor: neither contiguous nor channels-last."""
    room = torch.full((*reversed(tensor.shape[:-1]), 2 * tensor.shape[-1]), float("nan"))
    order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
    view = room.to(tensor.dtype)[..., ::2].permute(order)
    view.copy_(tensor)
    return view


@ROI_OR_PS
@EVERY_SAMPLING
def test_layouts(backend, sampling, position_sensitive):
    case = large_case(sampling, position_sensitive, groups=2)
    wanted = run(case, backend)
    last = case.input.contiguous(memory_format=torch.channels_last)
    assert_same(run(replace(case, input=last), backend), wanted, 1e-12)
    views = replace(
        case, input=strided(case.input), boxes=strided(case.boxes), offset=strided(case.offset)
    )
    assert not views.boxes.is_contiguous()
    found = run(views, backend, grad_output=strided(output_gradient(case)))
    assert_same(found, wanted, 1e-12)


def test_expanded_tensors(backend):
    case = random_case(11, "aligned", True, shifted=True)
    offset = case.offset[:1, :, :1, :1].expand_as(case.offset)
    grad_output = torch.ones((), dtype=torch.float64).expand(case.output_size_of())
    found = run(replace(case, offset=offset), backend, grad_output)
    wanted = run(replace(case, offset=offset.contiguous()), backend, grad_output.contiguous())
    assert_same(found, wanted, 1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_formats(fast, channels_last):
    for position_sensitive in (False, True):
        case = large_case("bins", position_sensitive, channels_last=channels_last)
        found = run(case, fast)
        assert found["output"].is_contiguous()
        assert found["grad_input"].stride() == case.input.stride()
        assert found["grad_offset"].is_contiguous()


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("name", ["input", "offset"])
def test_one_gradient_of_two(backend, name, sampling, position_sensitive):
    case = large_case(sampling, position_sensitive, groups=3)
    wanted = run(case, "reference")
    leaf = case.leaves[name].detach().requires_grad_()
    call(replace(case, **{name: leaf}), backend).backward(output_gradient(case))
    assert_same({name: leaf.grad}, {name: wanted[f"grad_{name}"]}, 1e-10)


def test_no_gradient_goes_to_boxes(backend):
    case = random_case(3, shifted=True)
    boxes = case.boxes.clone().requires_grad_()
    assert not call(replace(case, boxes=boxes), backend).requires_grad
    input = case.input.clone().requires_grad_()
    call(replace(case, input=input, boxes=boxes), backend).sum().backward()
    assert boxes.grad is None
    assert input.grad is not None


def test_no_gradient_is_recorded_where_none_is_wanted(backend):
    case = random_case(0, shifted=True)
    assert not call(case, backend).requires_grad
    leaf = case.offset.clone().requires_grad_()
    with torch.no_grad():
        assert not call(replace(case, offset=leaf), backend).requires_grad
    with torch.inference_mode():
        output = call(case, backend)
    assert output.equal(call(case, backend))


# ------------------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_every_number_is_written(fast, dtype, monkeypatch):
    # Fresh memory holds NaN, so that what is never written shows.
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def poisoned(*args, create=create, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)
    assert torch.empty(3).isnan().all()
    cases = [random_case(seed) for seed in range(40)]
    cases += [large_case(s, ps, groups=2) for s in SAMPLINGS for ps in (False, True)]
    # Samples all outside: their gradients, too, have to be written.
    cases.append(replace(cases[-1], offset=torch.full_like(cases[-1].offset, 1e4)))
    cases.append(replace(cases[-1], boxes=cases[-1].boxes[:0], offset=None))
    for case in cases:
        for name, tensor in run(case.to(dtype), fast).items():
            assert tensor.isfinite().all(), name


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(fast, dtype, sampling, position_sensitive):
    case = large_case(sampling, position_sensitive, groups=2).to(dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case, fast))
    for result in results[1:]:
        for name, value in result.items():
            assert value.equal(results[0][name]), name


# --------------------------------------------------------------------------------------- dtypes


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("positions", [None, torch.float32], ids=["halves", "float32 positions"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_rounds_once(backend, dtype, positions, sampling, position_sensitive):
    # Against exact arithmetic on the rounded numbers, error is a few roundings of the result.
    cases = [random_case(seed, sampling, position_sensitive, shifted=True) for seed in range(4)]
    cases.append(large_case(sampling, position_sensitive, groups=2))
    for case in cases:
        case = case.to(dtype, positions)
        found, wanted = run(case, backend), run(case.to(torch.float64), "reference")
        for name, value in wanted.items():
            expected = case.offset.dtype if name == "grad_offset" else dtype
            assert found[name].dtype == expected, name
            error = (found[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-3)
            assert error <= 2 * torch.finfo(dtype).eps, name


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


# ------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend, dtype):
    check_autocast(dtype, lambda case: call(case, backend), backend)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_of_the_registered_operator(fast, dtype):
    check_autocast(dtype, lambda case: torch.ops.deformnet.roi_pool(*case.operator), fast)


def check_autocast(dtype: torch.dtype, pool: Callable[[Case], torch.Tensor], backend: str) -> None:
    for position_sensitive in (False, True):
        case = large_case("bins", position_sensitive).to(torch.float32)
        # The map as an earlier layer leaves it; offsets, too.
        low = case.offset.to(dtype)
        mixed = replace(case, input=case.input.to(dtype), offset=low)
        for given in (case, mixed):
            offset = given.offset.clone().requires_grad_()
            wanted = call(
                replace(given, input=given.input.to(dtype), offset=given.offset.float()), backend
            )
            with torch.autocast("cpu", dtype=dtype):
                found = pool(replace(given, offset=offset))
            assert found.dtype == dtype
            assert found.equal(wanted)
            found.sum().backward()
            assert offset.grad.dtype == given.offset.dtype


def test_autocast_leaves_float64_alone(backend):
    case = random_case(5, shifted=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(case, backend)
    assert found.equal(call(case, backend))


# ------------------------------------------------------------------------------------- backends


def test_auto_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(library, "CPU_UNAVAILABLE", "the file is gone")
    monkeypatch.setattr(backends, "_warned", set())
    case = large_case("bins", True)
    with pytest.warns(RuntimeWarning, match="reference.*the file is gone") as caught:
        found = [call(case, "auto") for _ in range(3)]
    assert len([w for w in caught if "deformnet" in str(w.message)]) == 1
    assert found[0].equal(call(case, "reference"))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: the file is gone"):
        call(case, "cpu")
    with pytest.raises(RuntimeError, match="the file is gone"):
        torch.ops.deformnet.roi_pool(*case.operator)


def test_auto_takes_the_kernels(fast):
    # Only they refuse a second derivative.
    case = large_case("bins", True)
    offset = case.offset.clone().requires_grad_()
    output = call(replace(case, offset=offset), "auto")
    (gradient,) = torch.autograd.grad(output.sum(), offset, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------ bad input


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


# What is changed, the error, its message.
BAD = {
    "input of rank 3": (
        lambda: {"input": torch.ones(24, 7, 8)},
        ValueError,
        r"input: want 4 dimensions, got \[24, 7, 8\]",
    ),
    "input is a list": (lambda: {"input": [1.0]}, TypeError, r"input: want a tensor, got list"),
    "integer input": (
        lambda: {"input": torch.ones(2, 24, 7, 8, dtype=torch.int64)},
        TypeError,
        r"input: want one of .*float32.*, got torch.int64",
    ),
    "input without rows": (
        lambda: {"input": torch.ones(2, 24, 0, 8)},
        ValueError,
        r"input: want at least one channel, row and column, got \[2, 24, 0, 8\]",
    ),
    "input without channels": (
        lambda: {"input": torch.ones(2, 0, 7, 8)},
        ValueError,
        r"input: want at least one channel, row and column, got \[2, 0, 7, 8\]",
    ),
    "boxes of four numbers": (
        lambda: {"boxes": torch.ones(3, 4)},
        ValueError,
        r"boxes: want \[R, 5\] or a list of \[r, 4\], got \[3, 4\]",
    ),
    "boxes of rank 1": (
        lambda: {"boxes": torch.ones(5)},
        ValueError,
        r"boxes: want 2 dimensions, got \[5\]",
    ),
    "no boxes": (
        lambda: {"boxes": None},
        TypeError,
        r"boxes: want a tensor or a list of them, got NoneType",
    ),
    "integer boxes": (
        lambda: {"boxes": torch.ones(3, 5, dtype=torch.int64)},
        TypeError,
        r"boxes: want one of .*torch.float32, torch.float64, got torch.int64",
    ),
    "boxes on another device": (
        lambda: {"boxes": torch.ones(3, 5, device="meta")},
        ValueError,
        r"boxes: want device cpu, as input, got meta",
    ),
    "more lists than images": (
        lambda: {"boxes": [torch.ones(1, 4)] * 3},
        ValueError,
        r"boxes: want at most one tensor for each of the 2 images, got 3",
    ),
    "a list of five numbers each": (
        lambda: {"boxes": [torch.ones(3, 5)]},
        ValueError,
        r"boxes: want \[r, 4\] for each image, got \[3, 5\]",
    ),
    "a list of numbers": (
        lambda: {"boxes": [1.0, 2.0]},
        TypeError,
        r"boxes: want tensors, got float at 0",
    ),
    "a list of two dtypes": (
        lambda: {"boxes": [torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64)]},
        ValueError,
        r"boxes: want all on one device and in one dtype, got torch.float64 on cpu at 1 and",
    ),
    "offset of rank 2": (
        lambda: {"offset": torch.ones(3, 4)},
        ValueError,
        r"offset: want 4 dimensions, got \[3, 4\]",
    ),
    "offset of another dtype": (
        lambda: {"offset": torch.zeros(3, 4, 2, 3, dtype=torch.float64)},
        TypeError,
        r"offset: want torch.float32, as input, or torch.float32, got torch.float64",
    ),
    "offset on another device": (
        lambda: {"offset": torch.zeros(3, 4, 2, 3, device="meta")},
        ValueError,
        r"offset: want device cpu, as input, got meta",
    ),
    "offset is a number": (
        lambda: {"offset": 0.0},
        TypeError,
        r"offset: want a tensor, got float",
    ),
    "offset of other boxes": (
        lambda: {"offset": torch.zeros(2, 4, 2, 3)},
        ValueError,
        r"offset: want \[3, 2 \* G, 2, 3\].* got \[2, 4, 2, 3\]",
    ),
    "offset of other bins": (
        lambda: {"offset": torch.zeros(3, 4, 3, 3)},
        ValueError,
        r"offset: want \[3, 2 \* G, 2, 3\].* got \[3, 4, 3, 3\]",
    ),
    "offset of half a pair": (
        lambda: {"offset": torch.zeros(3, 3, 2, 3)},
        ValueError,
        r"offset: want \[3, 2 \* G, 2, 3\].* got \[3, 3, 2, 3\]",
    ),
    "offset without channels": (
        lambda: {"offset": torch.zeros(3, 0, 2, 3)},
        ValueError,
        r"offset: want .* got \[3, 0, 2, 3\]",
    ),
    "offset groups that do not divide the channels": (
        lambda: {"offset": torch.zeros(3, 14, 2, 3)},
        ValueError,
        r"offset: want .* G dividing the (24|4) channels of the output, got \[3, 14, 2, 3\]",
    ),
    "offset without parts": (
        lambda: {"offset": torch.zeros(3, 4, 0, 3), "sampling": "msra"},
        ValueError,
        r"offset: want \[3, 2 \* G, part_h, part_w\].* got \[3, 4, 0, 3\]",
    ),
    "no bins": (
        lambda: {"output_size": (0, 3)},
        ValueError,
        r"output_size: want at least 1, got \(0, 3\)",
    ),
    "three sizes": (
        lambda: {"output_size": (1, 2, 3)},
        ValueError,
        r"output_size: want an int or a pair of ints, got 3 of them",
    ),
    "a fraction of a bin": (
        lambda: {"output_size": 1.5},
        TypeError,
        r"output_size: want an int or a pair of ints, got 1.5",
    ),
    "scale of zero": (
        lambda: {"spatial_scale": 0.0},
        ValueError,
        r"spatial_scale: want a positive number, got 0.0",
    ),
    "scale of NaN": (
        lambda: {"spatial_scale": float("nan")},
        ValueError,
        r"spatial_scale: want a positive number, got nan",
    ),
    "scale by name": (
        lambda: {"spatial_scale": "1/16"},
        TypeError,
        r"spatial_scale: want a number, got '1/16'",
    ),
    "infinite gamma": (
        lambda: {"gamma": float("inf")},
        ValueError,
        r"gamma: want a finite number, got inf",
    ),
    "unknown sampling": (
        lambda: {"sampling": "paper"},
        ValueError,
        r"sampling: want one of bins, msra, aligned, got 'paper'",
    ),
    "less than no samples": (
        lambda: {"samples_per_bin": -1, "sampling": "aligned"},
        ValueError,
        r"samples_per_bin: want at least 0, got -1",
    ),
    "adaptive samples": (
        lambda: {"samples_per_bin": 0, "sampling": "msra"},
        ValueError,
        r'samples_per_bin: want at least 1 \(0 adapts in "aligned" alone\), got 0 with .msra',
    ),
    "half a sample": (
        lambda: {"samples_per_bin": 0.5},
        TypeError,
        r"samples_per_bin: want an int, got 0.5",
    ),
    "unknown backend": (
        lambda: {"backend": "cudnn"},
        ValueError,
        r"backend: want one of auto, reference, cpu, triton, got 'cudnn'",
    ),
}


@pytest.mark.parametrize("function", [deform_roi_pool, deform_ps_roi_pool])
def test_the_good_call_is_good(function):
    channels = 4 if function is deform_ps_roi_pool else 24
    assert function(**good()).shape == (3, channels, 2, 3)


# Autocast makes the dtypes agree, so there they cannot be wrong.
ROWS = [
    (what, mode, function)
    for what, (_, _, message) in BAD.items()
    for mode, function in (
        ("eager", deform_roi_pool),
        ("eager", deform_ps_roi_pool),
        ("fake", deform_ps_roi_pool),
        ("autocast", deform_ps_roi_pool),
        ("compiled", deform_roi_pool),
    )
    if not (mode == "autocast" and "want torch." in message)
]


@pytest.mark.parametrize(("what", "mode", "function"), ROWS)
def test_bad_input(what, mode, function):
    change, error, message = BAD[what]
    if mode == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager")
    context = {
        "fake": FakeTensorMode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }.get(mode, torch.no_grad)
    with context(), pytest.raises(error, match=message) as caught:
        function(**{**good(), **change()})
    assert "\n" not in str(caught.value)


def test_channels_that_the_bins_do_not_divide():
    call = {**good(), "input": torch.ones(2, 23, 7, 8), "offset": None}
    assert deform_roi_pool(**call).shape == (3, 23, 2, 3)
    message = r"input: want channels in multiples of the 2 \* 3 bins, got \[2, 23, 7, 8\]"
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
    message = "boxes: want an image's index, a whole number below 2, in the first column, got .*"
    with pytest.raises(ValueError, match=message + "in row 1$"):
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
        ("samples_per_bin", -4),
        ("output_size", (0, 3)),
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
    with pytest.raises((ValueError, TypeError), match=f"{named}: want"):
        operator(**arguments)


def test_the_gradient_of_no_offset_is_refused(fast):
    input, boxes = good()["input"], good()["boxes"]
    rule = ((2, 3), 0.5, 0.1, "bins", 4, True)
    with pytest.raises(ValueError, match="needs: want no gradient of offset"):
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
