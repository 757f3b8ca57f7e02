"""Layers that predict offsets."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.ops._arguments import number
from deformnet.ops.backends import autocast_enabled


class OffsetLayer(nn.Module):
    """Base class of layers that predict offsets, in float32 or better, and are initialized to zero.

    Half precision would round sampling locations: an offset of 10 pixels has steps of 1/16 pixel in
    bfloat16. Autocast and half-precision weights therefore do not apply here. `parameter_groups`
    applies the learning rate of offsets to these layers, the paper's beta.
    """

    weight: Tensor
    bias: Tensor | None
    lr_scale = 1.0
    """Learning rate factor of this layer."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer in float64 if the input or the weight is, else in float32."""
        device = input.device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        double = torch.float64 in (input.dtype, self.weight.dtype)
        dtype = torch.float64 if double else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._compute(input.to(dtype), self.weight.to(dtype), bias)

    @abstractmethod
    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output, in the dtype of the arguments."""


class OffsetConv2d(OffsetLayer, nn.Conv2d):
    """Convolution, [N, in_channels, H, W] -> [N, out_channels, Ho, Wo]."""

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class OffsetLinear(OffsetLayer, nn.Linear):
    """Fully connected layer, [..., in_features] -> [..., out_features].

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

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)


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
