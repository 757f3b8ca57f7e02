"""Small networks of deformnet's, torchvision's and plain layers, with offsets of any kind."""

import torch
import torchvision
from torch import nn

from deformnet import DeformConv2d


class Foreign(nn.Module):
    """torchvision's layer as users write it: with a convolution beside it that makes offsets."""

    def __init__(self, ours: DeformConv2d, *, by_name: bool = False):
        super().__init__()
        window = ours.kernel_size, ours.stride, ours.padding, ours.dilation
        self.offset = nn.Conv2d(ours.in_channels, ours.conv_offset.out_channels, *window)
        self.offset.load_state_dict(ours.conv_offset.state_dict())
        channels, bias = (ours.in_channels, ours.out_channels), ours.bias is not None
        self.conv = torchvision.ops.DeformConv2d(*channels, *window, ours.groups, bias)
        own = {k: v for k, v in ours.state_dict().items() if not k.startswith("conv_offset")}
        self.conv.load_state_dict(own)
        self.taps = ours.offset_groups * ours.kernel_size[0] * ours.kernel_size[1]
        self.modulated = ours.modulated
        self.by_name = by_name

    def forward(self, x):
        offset = self.offset(x)
        if self.modulated:
            offset, mask = offset.split((2 * self.taps, self.taps), dim=1)
            return self.conv(x, offset, 2 * mask.sigmoid())
        return self.conv(input=x, offset=offset) if self.by_name else self.conv(x, offset)


def set_offsets(layer: DeformConv2d, values) -> None:
    """Makes a layer's offsets those values [2*G*K] at every unit."""
    with torch.no_grad():
        layer.conv_offset.bias.copy_(torch.as_tensor(values).flatten())


def random_offsets(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Offsets of a few pixels that differ from place to place."""
    for layer in model.modules():
        if isinstance(layer, DeformConv2d):
            nn.init.normal_(layer.conv_offset.weight, std=0.3 * scale)
            nn.init.normal_(layer.conv_offset.bias, std=0.8 * scale)
    return model


def pair_of_networks(**options) -> tuple[nn.Module, nn.Module]:
    """The same network twice: with deformnet's layers and with torchvision's."""
    torch.manual_seed(3)
    ours = random_offsets(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, padding=1),
            DeformConv2d(4, 4, 3, padding=2, dilation=2, **options),
            nn.ReLU(),
            DeformConv2d(4, 4, 3, 2, padding=1, **options),
        )
    )
    theirs = nn.Sequential(ours[0], Foreign(ours[1], by_name=True), ours[2], Foreign(ours[3]))
    return ours.eval(), theirs.eval()


def scaling_offsets(kernel: int, dilation: int, factor: float) -> torch.Tensor:
    """Offsets [2*K] that move each tap away from the center: to `factor` times its distance."""
    along = (torch.arange(kernel) - (kernel - 1) / 2) * dilation * (factor - 1)
    return torch.stack(torch.meshgrid(along, along, indexing="ij"), -1).flatten()
