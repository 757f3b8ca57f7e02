"""Derivatives that only the reference has, and how it is chosen for layers: both operators."""

import contextlib
import threading
from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from cuda_cases import Case, call, leaves
from torch.autograd import forward_ad

from deformnet import DeformConv2d
from deformnet.ops import using

CASES = {
    "deform_conv2d": deform_conv_cases.random_case(3, whole=False, modulated=True),
    "roi_pool": roi_pool_cases.large_case("aligned", True),
}
NAMES = [(operator, name) for operator, case in CASES.items() for name in leaves(case)]


def function_of(case: Case, name: str, backend: str):
    return lambda value: call(replace(case, **{name: value}), backend)


@pytest.mark.parametrize("operator", CASES)
def test_the_fast_kernels_refuse_a_second_derivative(fast, operator):
    offset = CASES[operator].offset.clone().requires_grad_()
    for backend in (fast, "auto"):
        output = function_of(CASES[operator], "offset", backend)(offset)
        (gradient,) = torch.autograd.grad(output.sum(), offset, create_graph=True)
        message = 'no second derivative; pass backend="reference", or use deformnet.ops.using'
        with pytest.raises(NotImplementedError, match=message):
            gradient.sum().backward()


@pytest.mark.parametrize(("operator", "name"), NAMES)
def test_the_fast_kernels_refuse_tangents(fast, operator, name):
    value = leaves(CASES[operator])[name]
    function, tangent = function_of(CASES[operator], name, fast), torch.ones_like(value)
    refused = pytest.raises(NotImplementedError, match="no forward-mode derivative")
    with refused:
        torch.func.jvp(function, (value,), (tangent,))
    with forward_ad.dual_level(), refused:
        function(forward_ad.make_dual(value, tangent))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(function(value)).tangent is None


@pytest.mark.parametrize("by_context", [False, True], ids=["backend", "using"])
@pytest.mark.parametrize("operator", CASES)
def test_the_reference_has_forward_derivatives(operator, by_context):
    offset = CASES[operator].offset
    function = function_of(CASES[operator], "offset", "auto" if by_context else "reference")
    direction, step = torch.ones_like(offset), 1e-6
    with using("reference") if by_context else contextlib.nullcontext():
        _, slope = torch.func.jvp(function, (offset,), (direction,))
    change = function(offset + step * direction) - function(offset - step * direction)
    torch.testing.assert_close(slope, change / (2 * step), rtol=1e-6, atol=1e-6)
    assert slope.abs().max() > 0.1


def test_a_layer_has_second_derivatives_within_using():
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, padding=1, modulated=True).double()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    images = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    with using("reference"):
        assert torch.autograd.gradgradcheck(layer, (images,), fast_mode=True)
        _, slope = torch.func.jvp(layer, (images,), (torch.ones_like(images),))
    assert slope.abs().max() > 0
    (gradient,) = torch.autograd.grad(layer(images).sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_using_belongs_to_its_thread_and_is_undone():
    choices = []

    def second_derivative():
        offset = CASES["deform_conv2d"].offset.clone().requires_grad_()
        output = function_of(CASES["deform_conv2d"], "offset", "auto")(offset)
        (gradient,) = torch.autograd.grad(output.sum(), offset, create_graph=True)
        choices.append("reference" if "deform" not in type(gradient.grad_fn).__name__.lower()
                       else "kernels")  # fmt: skip

    with using("reference"):
        second_derivative()
        thread = threading.Thread(target=second_derivative)
        thread.start()
        thread.join()
        with using("auto"):
            second_derivative()
        second_derivative()
    second_derivative()
    assert choices == ["reference", "kernels", "kernels", "reference", "kernels"]


def test_using_compiles_once_for_each_choice(fresh_compiler):
    case = CASES["deform_conv2d"]
    compiled = torch.compile(
        lambda offset: call(replace(case, offset=offset)), fullgraph=True, backend="aot_eager"
    )
    expected = call(case, "reference")
    counted = []
    for choice in ("auto", "reference", "auto"):
        with using(choice):
            torch.testing.assert_close(compiled(case.offset), expected, rtol=0, atol=1e-12)
            graph = torch._dynamo.explain(lambda offset: call(replace(case, offset=offset)))(
                case.offset
            )
            counted.append(any("deformnet" in str(n.target) for n in graph.graphs[0].graph.nodes))
    assert counted == [True, False, True]
