"""The layers that make offsets."""

import torch
from torch import Tensor, nn


class OffsetLayer(nn.Module):
    """Marks a layer whose output moves sampling locations.

    `parameter_groups` gives every such layer the learning rate of offsets, the paper's beta.
    """


class OffsetConv2d(OffsetLayer, nn.Conv2d):
    """Convolution that starts at zero and computes in float32 or better.

    Half precision would round the position of a sample: an offset of 10 pixels has steps of 1/16
    pixel in bfloat16. So neither autocast nor half-precision weights lower the precision here.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, Ho, Wo], float32 or float64."""
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input)
        double = torch.float64 in (input.dtype, self.weight.dtype)
        dtype = torch.float64 if double else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._conv_forward(input.to(dtype), self.weight.to(dtype), bias)
