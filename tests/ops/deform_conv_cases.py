"""Random calls of deform_conv2d, shared by its tests."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from operator_testing import Normal, as_channels_last, differentiate
from torch import Tensor

from deformnet.ops import deform_conv2d

NAMES = ("input", "offset", "weight", "bias", "mask")
EVERY_BORDER = pytest.mark.parametrize("border", ["zeros", "msra2017"])


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def public(self) -> tuple:
        """In the order of the public function, which is torchvision's."""
        steps = self.stride, self.padding, self.dilation
        return (self.input, self.offset, self.weight, self.bias, *steps, self.mask)

    @property
    def operator(self) -> tuple:
        """In the order of the registered operator, less the border."""
        steps = self.stride, self.padding, self.dilation
        return (self.input, self.offset, self.weight, self.bias, self.mask, *steps)

    @property
    def tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def to(self, dtype: torch.dtype, positions: torch.dtype | None = None) -> "Case":
        """In another dtype; offset and mask in `positions`, if that is given."""
        small = {"offset", "mask"}
        return replace(
            self,
            **{
                name: tensor.to(positions if positions and name in small else dtype)
                for name, tensor in self.tensors.items()
            },
        )

    def output_size(self) -> tuple[int, int, int, int]:
        return (self.input.shape[0], self.weight.shape[0], *self.offset.shape[2:])


def random_case(seed: int, *, whole: bool | None = None, modulated: bool | None = None) -> Case:
    """A small random call in float64.

    Args:
        whole: offsets are whole numbers, or keep away from them; by default some are whole.
        modulated: with a mask or without one; by default either.
    """
    draw = random.Random(seed)
    normal = Normal(seed)
    groups, offset_groups = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 4])
    channels = groups * offset_groups * draw.choice([1, 2, 3])
    out_channels = groups * draw.choice([1, 2, 5])
    batch = draw.choice([1, 2, 3, 5])
    kernel = draw.choice([(1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (4, 1), (1, 7)])
    stride = draw.choice([(1, 1), (1, 1), (2, 2), (1, 3), (3, 2)])
    padding = draw.choice([(0, 0), (1, 1), (2, 2), (0, 3), (2, 1)])
    dilation = draw.choice([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2)])
    out = draw.randint(1, 7), draw.randint(1, 7)
    reach = [dilation[k] * (kernel[k] - 1) + 1 - 2 * padding[k] for k in (0, 1)]
    # The input that gives this output, and up to stride - 1 rows and columns that no tap needs.
    least = [(out[k] - 1) * stride[k] + reach[k] for k in (0, 1)]
    size = [max(1, least[k] + draw.randrange(stride[k])) for k in (0, 1)]
    out = tuple((size[k] - reach[k]) // stride[k] + 1 for k in (0, 1))
    taps = kernel[0] * kernel[1]

    input = as_channels_last(normal(batch, channels, *size), draw.random() < 0.5)
    offset = normal(batch, 2 * offset_groups * taps, *out) * draw.choice([0.3, 2, 20])
    if whole:
        offset = offset.round()
    elif whole is None:
        offset = torch.where(
            torch.rand(offset.shape, generator=normal.generator) < 0.2, offset.round(), offset
        )
    else:
        fraction = torch.rand(offset.shape, generator=normal.generator, dtype=torch.float64)
        offset = offset.floor() + 0.1 + 0.8 * fraction
    mask = normal(batch, offset_groups * taps, *out)
    has_mask = draw.random() < 0.5 if modulated is None else modulated
    return Case(
        input=input,
        offset=offset,
        weight=normal(out_channels, channels // groups, *kernel),
        bias=normal(out_channels) if draw.random() < 0.5 else None,
        mask=mask if has_mask else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def large_case(seed: int, *, channels_last: bool = False) -> Case:
    """A call that fills vectors and tiles and leaves remainders of all of them."""
    normal = Normal(seed)
    batch, groups, offset_groups, height, width = ((3, 1, 4, 9, 11), (2, 2, 1, 14, 7))[seed % 2]
    channels, out_channels = 2 * 4 * 13, 2 * 37
    return Case(
        input=as_channels_last(normal(batch, channels, height, width), channels_last),
        offset=normal(batch, 2 * offset_groups * 9, height, width) * 2,
        weight=normal(out_channels, channels // groups, 3, 3) / 30,
        bias=normal(out_channels),
        mask=normal(batch, offset_groups * 9, height, width).sigmoid(),
        stride=(1, 1),
        padding=(2, 2),
        dilation=(2, 2),
    )


def output_gradient(case: Case, seed: int = 0) -> Tensor:
    return Normal(seed)(*case.output_size()).to(case.input.dtype)


def run(
    case: Case, backend: str, border: str = "zeros", grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """The output and all gradients, by name."""

    def call(**leaves: Tensor) -> Tensor:
        return deform_conv2d(*replace(case, **leaves).public, border=border, backend=backend)

    grad_output = output_gradient(case) if grad_output is None else grad_output
    return differentiate(call, case.tensors, grad_output)
