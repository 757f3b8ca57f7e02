"""The layers that make offsets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OffsetLayer(nn.Module):
    """Marks a layer whose output moves sampling locations.

    `parameter_groups` gives every such layer the learning rate of offsets, the paper's beta.
    """

    lr_scale = 1.0
    """The layer's own factor on its learning rate."""


class OffsetConv2d(OffsetLayer, nn.Conv2d):
    """Convolution that starts at zero and computes in float32 or better.

    Half precision would round the position of a sample: an offset of 10 pixels has steps of 1/16
    pixel in bfloat16. So neither autocast nor half-precision weights lower the precision here.
    """

    def reset_parameters(self) -> None:
        _zero(self)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, Ho, Wo], float32 or float64."""
        device = input.device.type
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        return self._conv_forward(*_precise(input, self))


class OffsetLinear(OffsetLayer, nn.Linear):
    """Fully connected layer that starts at zero and computes in float32 or better.

    Args:
        in_features: numbers that it takes.
        out_features: numbers that it makes.
        lr_scale: its own factor on its learning rate, 0 or more.

    Raises:
        ValueError: if `lr_scale` is negative.
    """

    def __init__(self, in_features: int, out_features: int, *, lr_scale: float = 1.0) -> None:
        if not lr_scale >= 0:
            raise ValueError(f"lr_scale: wanted a number of at least 0, got {lr_scale}")
        super().__init__(in_features, out_features)
        self.lr_scale = float(lr_scale)

    def reset_parameters(self) -> None:
        _zero(self)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], float32 or float64."""
        device = input.device.type
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        return F.linear(*_precise(input, self))


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _precise(input: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in float32, or in float64 where one of the first two is."""
    double = torch.float64 in (input.dtype, layer.weight.dtype)
    dtype = torch.float64 if double else torch.float32
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return input.to(dtype), layer.weight.to(dtype), bias
