"""Layouts, dtypes, autocast and reproducibility of both operators."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from both_operators import (
    EVERY_LARGE,
    FORMATS,
    LARGE,
    empty,
    random_cases,
    registered,
    with_format,
    with_tensors,
)
from cuda_cases import call, differentiable, exact, leaves, output_gradient, run
from operator_testing import (
    HALVES,
    assert_same,
    assert_same_bits_for_any_number_of_threads,
    differentiate,
    strided,
)


@EVERY_LARGE
def test_layouts(backend, name):
    assert not strided(LARGE[name].input).is_contiguous()
    for case in (LARGE[name], *random_cases(name, 6)):
        expected = run(case, backend=backend)
        assert_same(run(with_format(case, True), backend=backend), expected, 1e-12)
        views = with_tensors(case, strided)
        assert_same(run(views, strided(output_gradient(case)), backend), expected, 1e-12)


@EVERY_LARGE
def test_expanded_tensors(backend, name):
    case = LARGE[name]
    case = replace(case, offset=case.offset[:1, :, :1, :1].expand_as(case.offset))
    gradient = torch.ones((), dtype=torch.float64).expand_as(output_gradient(case))
    expected = run(with_tensors(case, torch.Tensor.contiguous), gradient.contiguous(), backend)
    assert_same(run(case, gradient, backend), expected, 1e-12)


@FORMATS
@EVERY_LARGE
def test_memory_formats(backend, name, channels_last):
    case = with_format(LARGE[name], channels_last)
    found = run(case, backend=backend)
    assert name.startswith("deform_conv2d") or found["output"].is_contiguous()
    if backend != "reference":
        assert found["grad_input"].stride() == case.input.stride()
        others = found.keys() - {"output", "grad_input"}
        assert all(found[key].is_contiguous() for key in others)
    given = differentiable(case)
    call(given, backend).sum().backward()
    assert all(leaf.grad.stride() == leaf.stride() for leaf in leaves(given).values())


@FORMATS
@EVERY_LARGE
def test_no_images_or_boxes(backend, name, channels_last):
    case = empty(with_format(LARGE[name], channels_last))
    calls = [case]
    if not name.startswith("deform_conv2d"):
        calls += replace(case, offset=None), replace(case, input=case.input[:0])
    for given in calls:
        found = run(given, backend=backend)
        assert found["output"].shape == (0, *output_gradient(LARGE[name]).shape[1:])
        for key, leaf in leaves(given).items():
            assert found[f"grad_{key}"].shape == leaf.shape
            assert found[f"grad_{key}"].count_nonzero() == 0


@EVERY_LARGE
def test_any_subset_of_gradients(backend, name):
    case = LARGE[name]
    expected = run(case, backend="reference")
    for count in range(1, len(leaves(case)) + 1):
        for some in combinations(leaves(case).items(), count):
            found = differentiate(
                lambda **given: call(replace(case, **given), backend),
                dict(some),
                output_gradient(case),
            )
            assert_same(found, {key: expected[key] for key in found}, 1e-10)


@EVERY_LARGE
def test_no_gradient_is_recorded_where_none_is_needed(backend, name):
    case = LARGE[name]
    assert not call(case, backend).requires_grad
    with torch.no_grad():
        assert not call(differentiable(case), backend).requires_grad
    with torch.inference_mode():
        output = call(case, backend)
    assert output.equal(call(case, backend))


@EVERY_LARGE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_every_number_is_written(fast, dtype, name, poisoned_memory):
    assert torch.empty(3).isnan().all()
    large = LARGE[name]
    # Samples all outside: their gradients, too, have to be written.
    outside = replace(large, offset=torch.full_like(large.offset, 1e4))
    for case in (large, outside, empty(large), *random_cases(name, 30)):
        for key, tensor in run(case.to(dtype), backend=fast).items():
            assert tensor.isfinite().all(), key


@EVERY_LARGE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(fast, dtype, name):
    case = LARGE[name].to(dtype)
    assert_same_bits_for_any_number_of_threads(lambda: run(case, backend=fast))


@EVERY_LARGE
@pytest.mark.parametrize("positions", [None, torch.float32], ids=["halves", "float32 positions"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_rounds_once(backend, dtype, positions, name):
    # Against exact arithmetic on the rounded numbers, error is a few roundings of the result.
    for case in (LARGE[name], *random_cases(name, 6)):
        case = case.to(dtype, positions)
        found = run(case, backend=backend)
        for key, value in exact(case).items():
            owner = leaves(case).get(key.removeprefix("grad_"), case.input)
            assert found[key].dtype == owner.dtype, key
            error = (found[key].double() - value).abs().max() / value.abs().max().clamp_min(1e-3)
            assert error <= 2 * torch.finfo(dtype).eps, key


@EVERY_LARGE
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend, dtype, name):
    case = LARGE[name].to(torch.float32)
    # The input as an earlier layer leaves it; offset and mask, too.
    low = {key: t.to(dtype) for key, t in leaves(case).items() if key not in ("weight", "bias")}
    for given in (case, replace(case, **low)):
        given = differentiable(given)
        expected = call(given.to(dtype, torch.float32), backend)
        with torch.autocast("cpu", dtype=dtype):
            outputs = [call(given, backend)]
            if backend != "reference":
                operator, arguments = registered(given)
                outputs.append(operator(*arguments))
        for output in outputs:
            assert output.dtype == dtype
            assert output.equal(expected)
            output.sum().backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves(given).values())


@EVERY_LARGE
def test_autocast_leaves_float64_alone(backend, name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(LARGE[name], backend)
    assert found.equal(call(LARGE[name], backend))
