"""torchvision's deformable convolution, recognized without importing torchvision."""

import sys
from typing import TypeGuard

from torch import Tensor, nn


class TorchvisionConv(nn.Module):
    """Typing of `torchvision.ops.DeformConv2d`, whose `forward(input, offset, mask=None)` is given
    its offsets."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    weight: Tensor


def is_torchvision_conv(layer: nn.Module) -> TypeGuard[TorchvisionConv]:
    """Whether a layer is a `torchvision.ops.DeformConv2d`."""
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(layer, ops.DeformConv2d)
