"""Layers in the graphs of torch.fx."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])


def one_node(forward: _Forward) -> _Forward:
    """Decorator for the forward pass of a layer that torch.fx records as a single node."""

    @wraps(forward)
    def traced_or_called(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        traced = any(isinstance(it, Proxy) for it in (*inputs, *named.values()))
        return (call_module if traced else forward)(layer, *inputs, **named)

    return traced_or_called  # pyright: ignore[reportReturnType]


def call_module(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """One node for a whole layer, which torch.fx creates by default only for PyTorch's layers.

    Args:
        layer: a layer whose forward pass torch.fx traces.
        inputs, named: its arguments, at least one of which is a proxy.

    Raises:
        ValueError: if the layer is not part of a model.
    """
    tracer: Any = next(it.tracer for it in (*inputs, *named.values()) if isinstance(it, Proxy))
    name = tracer.path_of_module(layer)
    if not name:
        raise ValueError(
            f"expected torch.fx to trace a model that contains the {type(layer).__name__}, "
            "but got the layer itself; wrap it in nn.Sequential"
        )
    return tracer.create_proxy("call_module", name, inputs, named)
