"""Layers to time, and their tensors."""

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A 3x3 layer: N images, C input and output channels, stride 1, padding equal to dilation."""

    batch: int
    channels: int
    height: int
    width: int
    dilation: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}"

    @property
    def positions(self) -> int:
        """Output positions of the whole batch."""
        return self.batch * self.height * self.width

    @property
    def forward_flops(self) -> int:
        """FLOPs of the matrix product that every implementation needs."""
        return 2 * 9 * self.channels**2 * self.positions


SHAPES = (
    Shape(1, 512, 38, 63, dilation=2, offset_groups=4),  # conv5 of a detector, 600x1000 pixels
    Shape(1, 64, 56, 56),
    Shape(1, 128, 64, 128),
    Shape(8, 128, 28, 28),
    Shape(37, 32, 16, 16),  # a batch size that 32 does not divide
)


class Offsets(StrEnum):
    """Kinds of offsets, from best to worst for caches; `normal` is the standard deviation."""

    ZERO = "zero"
    LEARNED = "learned-like"
    NORMAL = "normal, 1 pixel"
    WIDE = "normal, 4 pixels"


@dataclass(frozen=True)
class Tensors:
    """Arguments of a call; `offset_weight` belongs to the offset convolution."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    offset_weight: Tensor
    grad_output: Tensor
    grad_offset: Tensor


def make_tensors(shape: Shape, offsets: Offsets = Offsets.NORMAL) -> Tensors:
    """Random float32 tensors from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    size = (shape.batch, shape.channels, shape.height, shape.width)
    offset = _offset(shape, offsets, generator)
    scale = 1 / (3 * shape.channels**0.5)
    return Tensors(
        input=normal(*size).requires_grad_(),
        offset=offset.requires_grad_(),
        weight=(scale * normal(shape.channels, shape.channels, 3, 3)).requires_grad_(),
        offset_weight=(scale * normal(offset.shape[1], shape.channels, 3, 3)).requires_grad_(),
        grad_output=normal(*size),
        grad_offset=normal(*offset.shape),
    )


def _offset(shape: Shape, kind: Offsets, generator: torch.Generator) -> Tensor:
    """[N, 2*G*9, H, W], (y, x) for each tap."""

    def field(channels: int, height: int, width: int) -> Tensor:
        return torch.randn(shape.batch, channels, height, width, generator=generator)

    channels = 18 * shape.offset_groups
    if kind == Offsets.ZERO:
        return torch.zeros(shape.batch, channels, shape.height, shape.width)
    noise = field(channels, shape.height, shape.width)
    if kind == Offsets.NORMAL:
        return noise
    if kind == Offsets.WIDE:
        return 4 * noise

    # As in trained networks, the kernel is scaled and shifted by about its own size, smoothly over
    # the image, and every tap also moves a little by itself.
    def smooth(channels: int) -> Tensor:
        size = (shape.height, shape.width)
        return F.interpolate(field(channels, 5, 5), size, mode="bicubic")

    row, column = torch.meshgrid(*[torch.arange(-1.0, 2)] * 2, indexing="ij")
    taps = shape.dilation * torch.stack([row.flatten(), column.flatten()], 1).view(1, 1, 9, 2, 1, 1)
    groups = (shape.batch, shape.offset_groups, 1)
    stretch = smooth(shape.offset_groups).view(*groups, 1, shape.height, shape.width)
    shift = smooth(2 * shape.offset_groups).view(*groups, 2, shape.height, shape.width)
    return (taps * stretch + shift).reshape(noise.shape) + 0.1 * noise
