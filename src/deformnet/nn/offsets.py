"""Layers that predict offsets."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.ops._arguments import number
from deformnet.ops.backends import autocast_enabled

OffsetConv = Literal["dense", "separable"]
"""Kinds of convolutions that predict offsets."""


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
        weight, bias = self.weight, self.bias
        double = torch.float64 in (input.dtype, weight.dtype)
        dtype = torch.float64 if double else torch.float32
        bias = None if bias is None else _cast(bias, dtype)
        return self._compute(_cast(input, dtype), _cast(weight, dtype), bias)

    @abstractmethod
    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output, in the dtype of the arguments."""


class OffsetConv2d(OffsetLayer, nn.Conv2d):
    """Convolution, [N, in_channels, H, W] -> [N, out_channels, Ho, Wo]."""

    @property
    def spatial(self) -> "OffsetConv2d":
        """The convolution that has the geometry of the deformable layer."""
        return self

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, weight, bias)


class SeparableOffsetConv2d(OffsetConv2d):
    """Depthwise and 1x1 convolution, [N, in_channels, H, W] -> [N, out_channels, Ho, Wo].

    The 1x1 convolution is this layer, the depthwise one its child `depthwise`, whose weights are
    initialized as in `nn.Conv2d`: if both were zero, neither would have a gradient.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, device=device, dtype=dtype)
        self.depthwise = OffsetConv2d(
            in_channels,
            in_channels,
            kernel_size,
            groups=in_channels,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @property
    def spatial(self) -> OffsetConv2d:
        return self.depthwise

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The constructor of nn.Conv2d calls this before there is a depthwise convolution.
        if "depthwise" in self._modules:
            nn.Conv2d.reset_parameters(self.depthwise)

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._compute(self.depthwise(input), weight, bias)


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


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to takes a microsecond even if there is nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
