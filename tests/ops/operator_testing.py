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
