"""Layers in the graphs of torch.fx."""

from typing import Any

from torch import nn


def call_module(layer: nn.Module, *inputs: Any) -> Any:
    """One node for a whole layer, which torch.fx creates by default only for PyTorch's layers.

    Args:
        layer: a layer whose forward pass torch.fx traces.
        inputs: its arguments; the first is a proxy.

    Raises:
        ValueError: if the layer is not part of a model.
    """
    tracer = inputs[0].tracer
    name = tracer.path_of_module(layer)
    if not name:
        raise ValueError(
            f"expected torch.fx to trace a model that contains the {type(layer).__name__}, "
            "but got the layer itself; wrap it in nn.Sequential"
        )
    return tracer.create_proxy("call_module", name, inputs, {})
