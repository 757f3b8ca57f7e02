"""Plain calls go straight to the kernels; calls that others intercept use the dispatcher."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from both_operators import with_tensors
from cuda_cases import Case, call, differentiable, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from deformnet.ops import deform_conv2d, deform_roi_pool, registration
from deformnet.ops.deform_conv.operator import OPERATOR as CONVOLUTION
from deformnet.ops.roi_pool.operator import OPERATOR as POOLING

OPERATORS = {
    "convolution": (CONVOLUTION, deform_conv_cases.random_case(3, modulated=True)),
    "pooling": (POOLING, roi_pool_cases.random_case(0, "bins", False, shifted=True)),
}
EVERY_OPERATOR = pytest.mark.parametrize("name", OPERATORS)


class DispatchedError(Exception):
    pass


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A call of an operator that raises `DispatchedError` if it goes through the dispatcher."""
    operator, case = OPERATORS[request.param]

    def dispatched(*_: object) -> None:
        raise DispatchedError

    monkeypatch.setattr(operator, "forward", dispatched)
    monkeypatch.setattr(operator, "backward", dispatched)
    return case


negative_view: Callable[[Tensor], Tensor] = torch._neg_view  # pyright: ignore[reportPrivateImportUsage]
zeros_in_no_memory: Callable[..., Tensor] = torch._efficientzerotensor  # pyright: ignore[reportPrivateImportUsage]


def of_input(case: Case) -> Callable[[Tensor], Tensor]:
    return lambda value: call(replace(case, input=value), "auto")


def with_mode(case: Case) -> None:
    with FlopCounterMode(display=False):
        call(case, "auto")


def with_fakes(case: Case) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        call(case, "auto")


def profiled(case: Case) -> None:
    with torch.autograd.profiler.profile():
        call(case, "auto")


def batched(case: Case) -> None:
    torch.vmap(of_input(case))(case.input[None])


def transformed(case: Case) -> None:
    torch.func.grad(lambda value: of_input(case)(value).sum())(case.input)


def functionalized(case: Case) -> None:
    torch.func.functionalize(of_input(case))(case.input)


def with_tangent(case: Case) -> None:
    with forward_ad.dual_level():
        of_input(case)(forward_ad.make_dual(case.input, case.input))


def traced(case: Case) -> None:
    torch.jit.trace(of_input(case), case.input)


def negated(case: Case) -> None:
    call(with_tensors(case, negative_view), "auto")


def with_zeros_in_no_memory(case: Case) -> None:
    of_input(case)(zeros_in_no_memory(case.input.shape, dtype=case.input.dtype))


def twice_differentiable(case: Case) -> None:
    case = differentiable(case)
    torch.autograd.grad(call(case, "auto").sum(), case.input, create_graph=True)


OBSERVED = [
    *(with_mode, with_fakes, profiled, batched, transformed, functionalized, with_tangent, traced),
    *(negated, with_zeros_in_no_memory, twice_differentiable),
]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("observed", OBSERVED)
def test_an_observed_call_is_dispatched(case: Case, observed: Callable[[Case], None]) -> None:
    with pytest.raises(DispatchedError):
        observed(case)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_plain_call_is_not(case: Case, mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        call(case, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        call(case, "auto")
    case = differentiable(case)
    call(case, "auto").sum().backward()
    assert all(tensor.grad is not None for tensor in leaves(case).values())


@EVERY_OPERATOR
def test_negative_views(name: str) -> None:
    case = OPERATORS[name][1]
    names = [name for name, value in vars(case).items() if isinstance(value, Tensor)]
    negative = replace(case, **{it: negative_view(-getattr(case, it)) for it in names})
    assert torch.equal(call(negative, "auto"), call(case, "auto"))


@EVERY_OPERATOR
def test_inference_mode_with_gradients_enabled(name: str) -> None:
    case = differentiable(OPERATORS[name][1])
    with torch.inference_mode(), torch.enable_grad():
        output = call(case, "auto")
        fresh = call(with_tensors(case, torch.clone), "auto")
    assert not output.requires_grad
    assert torch.equal(output, fresh)


@EVERY_OPERATOR
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_registered_operators_check_their_arguments(name: str, needs_gradient: bool) -> None:
    operator, case = OPERATORS[name]
    registered = getattr(torch.ops.deformnet, operator.name).default
    settings = ("zeros",) if name == "convolution" else ()
    arguments = [*case.operator, *settings]
    arguments[0] = arguments[0].clone().requires_grad_(needs_gradient)
    registered(*arguments)
    for place in (1, 2):  # offset and weight, or boxes and offset
        bad = [*arguments]
        bad[place] = arguments[place][:, :-1]
        with pytest.raises(ValueError, match="expected"):
            registered(*bad)
        bad[place] = arguments[place].to(torch.float16)
        with pytest.raises(TypeError, match="expected"):
            registered(*bad)


@EVERY_OPERATOR
def test_registered_backward_operators_check_the_number_of_needs(name: str) -> None:
    operator, case = OPERATORS[name]
    grad_output = torch.ones_like(call(case, "reference"))
    arguments = [grad_output, *case.operator]
    if name == "convolution":
        del arguments[4]  # bias
        arguments.append("zeros")
    count = 5 if name == "convolution" else 2
    operator.backward(*arguments, [True] * count)
    for wrong in (0, count - 1, count + 1):
        with pytest.raises(ValueError, match=f"expected needs to have {count} values"):
            operator.backward(*arguments, [True] * wrong)


# ----------------------------------------------------------------------------------- cached plans


@EVERY_OPERATOR
def test_calls_of_other_kinds_have_other_plans(name: str) -> None:
    case = OPERATORS[name][1]
    expected = call(case, "auto")
    # The same sizes in other layouts, and then in another dtype.
    for layout in (
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ):
        torch.testing.assert_close(call(with_tensors(case, layout), "auto"), expected)
    single = call(with_tensors(case, lambda t: t.float()), "auto")
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="expected offset to be"):
        call(replace(case, offset=case.offset.to(torch.int64)), "auto")
    with pytest.raises(ValueError, match="expected offset to have shape"):
        call(replace(case, offset=case.offset[:, :-1]), "auto")


@EVERY_OPERATOR
def test_threads_share_plans(name: str) -> None:
    case = OPERATORS[name][1]
    cases = [replace(case, input=case.input * factor) for factor in range(64)]
    expected = [call(case, "reference") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(call, cases)), expected)


@EVERY_OPERATOR
def test_the_number_of_plans_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, case = OPERATORS[name]
    monkeypatch.setattr(operator, "_plans", {})
    monkeypatch.setattr(registration, "_MOST_PLANS", 2)
    for count in range(1, 6):  # of images, which need not have boxes
        repeated = {"input": torch.cat([case.input] * count)}
        if name == "convolution":
            repeated["offset"] = torch.cat([case.offset] * count)
            repeated["mask"] = torch.cat([case.mask] * count)
        call(replace(case, **repeated), "auto")
        assert 1 <= len(operator._plans) <= 2


def test_unhashable_settings_are_rejected_by_name() -> None:
    map, offset = torch.zeros(1, 1, 3, 3), torch.zeros(1, 18, 3, 3)
    border: Any = ["zeros"]
    sampling: Any = ["bins"]
    with pytest.raises(ValueError, match="expected border to be one of"):
        deform_conv2d(map, offset, torch.zeros(1, 1, 3, 3), padding=1, border=border)
    with pytest.raises(ValueError, match="expected sampling to be one of"):
        deform_roi_pool(map, torch.zeros(1, 5), None, 1, sampling=sampling)
