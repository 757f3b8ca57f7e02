"""What the tests of all operators share: comparison, layouts, bad input."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops.deform_conv.operator import OPERATOR as DEFORM_CONV
from deformnet.ops.roi_pool.operator import OPERATOR as ROI_POOL

HALVES = [torch.bfloat16, torch.float16]
OPERATORS = [DEFORM_CONV, ROI_POOL]


class Normal:
    """float64 tensors of normal numbers, one after the other from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def differentiate(
    function: Callable[..., Tensor], leaves: dict[str, Tensor], grad_output: Tensor
) -> dict[str, Tensor]:
    """The output of a function of named tensors and all gradients, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    names = (f"grad_{name}" for name in leaves)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, **options: bool
) -> None:
    """Equal by name, to `tolerance` of the largest value of each tensor, or absolutely below 1."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value[value.isfinite()].abs().max().item() if value.isfinite().any() else 0.0
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=tolerance * max(1.0, largest),
            check_dtype=False,
            msg=lambda text, name=name: f"{name}: {text}",
            **options,
        )


def assert_nan_at(
    found: dict[str, Tensor], clean: dict[str, Tensor], reached: dict[str, Tensor], tolerance: float
) -> None:
    """NaN exactly where `reached` says so, and elsewhere what a clean run has."""
    for name, value in found.items():
        assert value.isnan().equal(reached[name]), name
        elsewhere = ~reached[name]
        torch.testing.assert_close(
            value[elsewhere], clean[name][elsewhere], rtol=tolerance, atol=tolerance
        )


def assert_same_where_finite(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal where the expected numbers are finite, and not finite elsewhere."""
    for name, value in expected.items():
        exact = value.isfinite()
        torch.testing.assert_close(found[name][exact], value[exact], rtol=1e-10, atol=1e-10)
        assert not found[name][~exact].isfinite().any(), name


def assert_same_bits_for_any_number_of_threads(run: Callable[[], dict[str, Tensor]]) -> None:
    results = []
    for threads in (1, 1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run())
    for result in results[1:]:
        for name, value in result.items():
            assert value.equal(results[0][name]), name


def as_channels_last(tensor: Tensor, enabled: bool = True) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if enabled else tensor


def with_bad_pixels(input: Tensor, seed: int) -> Tensor:
    """Some of a map replaced by NaN, some by infinity."""
    pick = torch.rand(input.shape, generator=torch.Generator().manual_seed(seed))
    return input.masked_fill(pick < 0.04, float("nan")).masked_fill(pick > 0.97, float("inf"))


def strided(tensor: Tensor) -> Tensor:
    """Every second element of a transposed tensor: neither contiguous nor channels-last."""
    room = torch.full((*reversed(tensor.shape[:-1]), 2 * tensor.shape[-1]), float("nan"))
    order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
    view = room.to(tensor.dtype)[..., ::2].permute(order)
    view.copy_(tensor)
    return view


# An argument, its bad value (made in the mode of the test), the error and its message after the
# name of the argument ("..." stands for anything), and changes of other arguments.
BadRow = tuple[str, Callable[[], Any], type[Exception], str, dict[str, Any]]


def bad(
    argument: str, value: Callable[[], Any], error: type[Exception], text: str, **others: Any
) -> Any:
    """A row of bad input."""
    return pytest.param((argument, value, error, text, others), id=f"{argument} {text}"[:70])


def check_bad_input(
    function: Callable[..., Tensor], good: Callable[[], dict[str, Any]], row: BadRow, mode: str
) -> None:
    """Call a function with one bad argument, in one of four modes."""
    argument, value, error, text, others = row
    if mode == "autocast" and "torch." in text:
        pytest.skip("autocast makes the dtypes agree")
    if mode == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="eager")
    context = {
        "fake": FakeTensorMode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }.get(mode, torch.no_grad)
    message = re.escape(f"expected {argument} {text}").replace(re.escape("..."), ".*")
    message = message.replace(r"\ .*", ".*")
    with context(), pytest.raises(error, match=message) as caught:
        function(**{**good(), **others, argument: value()})
    assert "\n" not in str(caught.value)
