"""Layers that predict offsets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.ops._arguments import number


class OffsetLayer(nn.Module):
    """Base class of layers that predict offsets.

    `parameter_groups` applies the learning rate of offsets to them, the paper's beta.
    """

    lr_scale = 1.0
    """Learning rate factor of this layer."""


class OffsetConv2d(OffsetLayer, nn.Conv2d):
    """Zero-initialized convolution that computes in float32 or better.

    Half precision would round sampling locations: an offset of 10 pixels has steps of 1/16 pixel in
    bfloat16. Neither autocast nor half-precision weights therefore apply here.
    """

    def reset_parameters(self) -> None:
        _zero(self)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, Ho, Wo], float32 or float64."""
        device = input.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        return self._conv_forward(*_full_precision(input, self))


class OffsetLinear(OffsetLayer, nn.Linear):
    """Zero-initialized fully connected layer that computes in float32 or better.

    Args:
        in_features: Number of input features.
        out_features: Number of output features.
        lr_scale: Learning rate factor of this layer, at least 0.

    Raises:
        ValueError: If `lr_scale` is negative.
    """

    def __init__(self, in_features: int, out_features: int, *, lr_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.lr_scale = non_negative("lr_scale", lr_scale)

    def reset_parameters(self) -> None:
        _zero(self)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or float64."""
        device = input.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        return F.linear(*_full_precision(input, self))


def autocast_enabled(device: str) -> bool:
    """Whether autocast is enabled for a device type."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def non_negative(name: str, value: float) -> float:
    """`value` as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative or NaN.
    """
    value = float(number(name, value))
    if not value >= 0:
        raise ValueError(f"expected {name} to be a number of at least 0, but got {value:g}")
    return value


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _full_precision(
    input: Tensor, layer: nn.Conv2d | nn.Linear
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in float64 if the input or weight is, else in float32."""
    double = torch.float64 in (input.dtype, layer.weight.dtype)
    dtype = torch.float64 if double else torch.float32
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return input.to(dtype), layer.weight.to(dtype), bias
