"""Second derivatives, forward mode, and how the reference is chosen for layers: both operators."""

import contextlib
import threading
from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from both_operators import POOLINGS as KINDS
from cuda_cases import Case, call, differentiable, leaves, output_gradient
from operator_testing import Normal, assert_same
from torch import Tensor
from torch.autograd import forward_ad

from deformnet import DeformConv2d
from deformnet.ops import deform_conv2d, using
from deformnet.ops.deform_conv.checks import BORDERS

CASES = {
    "deform_conv2d": deform_conv_cases.random_case(3, whole=False, modulated=True),
    "roi_pool": roi_pool_cases.large_case("aligned", True),
}
# Positions keep away from the kinks, where finite differences fail.
SMALL = {
    "deform_conv2d": deform_conv_cases.Case(
        input=Normal(0)(1, 2, 3, 4),
        offset=Normal(1)(1, 2 * 4, 2, 3).floor() + 0.3,
        weight=Normal(2)(4, 1, 2, 2),
        bias=Normal(3)(4),
        mask=Normal(4)(1, 4, 2, 3),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
    ),
    "roi_pool": roi_pool_cases.random_case(0, "bins", False, shifted=True),
}
NAMES = [(operator, name) for operator, case in CASES.items() for name in leaves(case)]


def function_of(case: Case, name: str, backend: str):
    return lambda value: call(replace(case, **{name: value}), backend)


EVERY_KIND = pytest.mark.parametrize("kind", [*BORDERS, *KINDS])


def cases(kind: str | tuple[str, bool], count: int) -> list[Case]:
    """Random calls with a border rule or with a pooling, all differentiable."""
    if isinstance(kind, str):
        found = [deform_conv_cases.random_case(seed) for seed in range(count)]
    else:
        found = [roi_pool_cases.random_case(seed, *kind) for seed in range(count)]
    return [differentiable(case) for case in found]


def compute(case: Case, kind: str | tuple[str, bool], backend: str) -> Tensor:
    if isinstance(kind, str):
        return deform_conv2d(*case.public, border=kind, backend=backend)
    return call(case, backend)


def second_derivatives(case: Case, kind: str | tuple[str, bool], backend: str) -> dict[str, Tensor]:
    """All derivatives of a random combination of all gradients, by name."""
    tensors = leaves(case)
    grad_output = output_gradient(case).requires_grad_()
    output = compute(case, kind, backend)
    gradients = torch.autograd.grad(output, list(tensors.values()), grad_output, create_graph=True)
    normal = Normal(2)
    total = sum((gradient * normal(*gradient.shape)).sum() for gradient in gradients)
    wanted = {"grad_output": grad_output, **tensors}
    found = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


@EVERY_KIND
def test_second_derivatives_are_those_of_the_reference(fast, kind):
    for case in cases(kind, 4):
        found, expected = (second_derivatives(case, kind, name) for name in (fast, "reference"))
        assert_same(found, expected, 1e-10)


@EVERY_KIND
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_second_derivatives_of_what_is_not_finite(fast, kind, bad):
    case = next(case for case in cases(kind, 99) if case.offset is not None)
    for name in ("input", "offset"):
        tensor = leaves(case)[name].detach().clone()
        tensor[tuple(size // 2 for size in tensor.shape)] = bad
        broken = differentiable(replace(case, **{name: tensor}))
        found, expected = (second_derivatives(broken, kind, n) for n in (fast, "reference"))
        assert any(not tensor.isfinite().all() for tensor in expected.values()) or bad > 0
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("operator", CASES)
def test_gradgradcheck(fast, operator):
    case = SMALL[operator]
    names, values = zip(*leaves(differentiable(case)).items(), strict=True)

    def function(*values: Tensor) -> Tensor:
        return call(replace(case, **dict(zip(names, values, strict=True))), fast)

    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradcheck(function, values, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("operator", CASES)
def test_third_derivatives(fast, operator):
    offset = SMALL[operator].offset

    def third(backend: str) -> Tensor:
        function = function_of(SMALL[operator], "offset", backend)
        derivative = function
        for _ in range(3):
            derivative = torch.func.grad(lambda value, f=derivative: f(value).square().sum())
        return derivative(offset)

    expected = third("reference")
    assert expected.abs().max() > 0
    torch.testing.assert_close(third(fast), expected, rtol=1e-9, atol=1e-9)


def test_half_precision_and_autocast_have_second_derivatives(fast):
    case = differentiable(SMALL["deform_conv2d"].to(torch.bfloat16, torch.float32))
    expected = second_derivatives(case, "zeros", "reference")
    for name, tensor in second_derivatives(case, "zeros", fast).items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=0.05, atol=0.05)

    case = differentiable(SMALL["deform_conv2d"].to(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = torch.func.grad(lambda value: call(replace(case, input=value), fast).sum())
        slope = torch.func.grad(lambda offset: gradient_norm(case, offset, fast))(case.offset)
    assert gradient(case.input).dtype == slope.dtype == torch.float32
    assert slope.abs().max() > 0


@pytest.mark.parametrize("operator", CASES)
def test_a_second_backward_pass_under_autocast_keeps_its_precision(fast, operator):
    values = {name: it.float().requires_grad_() for name, it in leaves(CASES[operator]).items()}
    output = call(replace(CASES[operator].to(torch.float32), **values), fast)
    tensors = list(values.values())
    first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    norm = sum(it.square().sum() for it in first)
    expected = torch.autograd.grad(norm, tensors, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(norm, tensors), expected, rtol=0, atol=0)


def gradient_norm(case: Case, offset: Tensor, backend: str) -> Tensor:
    def total(value: Tensor) -> Tensor:
        return call(replace(case, input=value, offset=offset), backend).sum()

    return torch.func.grad(total)(case.input).square().sum()


@pytest.mark.parametrize(("operator", "name"), NAMES)
def test_forward_mode(fast, operator, name):
    value = leaves(CASES[operator])[name]
    tangent = torch.ones_like(value)
    results = []
    for backend in (fast, "reference"):
        function = function_of(CASES[operator], name, backend)
        results.append(torch.func.jvp(function, (value,), (tangent,)))
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))))
            assert forward_ad.unpack_dual(function(value)).tangent is None
    for output, slope in results:
        torch.testing.assert_close(output, results[-1][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(slope, results[-1][1], rtol=0, atol=1e-10)
    assert slope.abs().max() > 0


def test_the_backward_operator_itself_refuses_tangents(fast):
    case = CASES["roi_pool"]
    operator = torch.ops.deformnet.roi_pool_backward
    with forward_ad.dual_level():
        gradient = forward_ad.make_dual(output_gradient(case), output_gradient(case))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            operator(gradient, *case.operator, [True, True])


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


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_layer_has_second_derivatives(choice):
    torch.manual_seed(0)
    layer = DeformConv2d(2, 3, 3, padding=1, modulated=True).double()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    images = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    with using(choice):
        assert torch.autograd.gradgradcheck(layer, (images,), fast_mode=True)
        _, slope = torch.func.jvp(layer, (images,), (torch.ones_like(images),))
    assert slope.abs().max() > 0


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
