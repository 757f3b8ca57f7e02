"""Deformable convolution as a layer that learns its own offsets."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.nn.offsets import OffsetConv2d
from deformnet.ops import deform_conv2d

_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class DeformConv2d(nn.Conv2d):
    """Convolution whose taps are moved by offsets that it computes from its input.

    Dai et al. 2017, section 2.1 and Figure 2: the child `conv_offset`, a convolution of the same
    kernel size, stride, padding and dilation, makes the offsets. It starts at zero, so a new layer
    computes what `nn.Conv2d` with the same weights does. (Initialise other convolutions by name,
    or call `reset_parameters` afterwards, if a loop over all `nn.Conv2d` of a model would
    overwrite `conv_offset`.)

    To see the offsets, put a forward hook on `conv_offset`: its output is
    [N, 2*G*K, Ho, Wo], per tap (y, x) in pixels of the input; with `modulated=True` G*K more
    channels follow, whose doubled sigmoid is the mask.

    Args:
        in_channels: channels C of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel, K taps together.
        stride: step between outputs.
        padding: pixels added on every side, or "same" or "valid", as in `nn.Conv2d`.
        dilation: distance between the taps at rest.
        groups: groups of the main convolution; `conv_offset` is dense in any case.
        bias: whether the main convolution has a bias; `conv_offset` always has one.
        offset_groups: G; each of G equal runs of input channels has its own offsets.
        modulated: also learn a factor 2*sigmoid(.) for each tap, 1 at the start (Zhu et al. 2019).
        padding_mode: as in `nn.Conv2d`. Other than "zeros" extends the input by `padding` before
            it is sampled; beyond that margin it is zero.

    Shape:
        input [N, in_channels, H, W] (or without N); output [N, out_channels, Ho, Wo], as of
        `nn.Conv2d`.

    Raises:
        ValueError: if `offset_groups` does not divide `in_channels`, and where `nn.Conv2d` does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        padding_mode: _PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.conv_offset = make_conv_offset(self, offset_groups, modulated)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as `nn.Conv2d` does, and set `conv_offset` to zero."""
        super().reset_parameters()
        # nn.Conv2d's constructor calls this before there is a conv_offset.
        if "conv_offset" in self._modules:
            self.conv_offset.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"input: wanted [N, {self.in_channels}, H, W], got {list(input.shape)}"
            )
        if input.ndim == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        offset, mask = self.conv_offset(input), None
        if self.modulated:
            taps = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
            offset, mask = offset.split((2 * taps, taps), dim=1)
            mask = 2 * mask.sigmoid()
        input, padding = self._pad(input)
        stride, dilation = _pair(self.stride), _pair(self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, stride, padding, dilation, mask)

    def _pad(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, extended where the operator cannot do it, and the padding that is left."""
        if self.padding_mode == "zeros":
            if not isinstance(self.padding, str):
                return input, _pair(self.padding)
            left, right, top, bottom = self._reversed_padding_repeated_twice
            if left == right and top == bottom:
                return input, (top, left)
        # "same" with an even kernel pads one pixel more at the end.
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.offset_groups != 1:
            text += f", offset_groups={self.offset_groups}"
        if self.modulated:
            text += ", modulated=True"
        return text


def make_conv_offset(conv: nn.Conv2d, offset_groups: int, modulated: bool) -> OffsetConv2d:
    """The convolution that makes offsets for `conv`, on its device and in its dtype.

    Raises:
        ValueError: if `offset_groups` does not divide the input channels of `conv`.
    """
    if offset_groups < 1 or conv.in_channels % offset_groups:
        raise ValueError(
            f"offset_groups: wanted a divisor of the {conv.in_channels} input channels, "
            f"got {offset_groups}"
        )
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return OffsetConv2d(
        conv.in_channels,
        (3 if modulated else 2) * offset_groups * taps,
        _pair(conv.kernel_size),
        _pair(conv.stride),
        conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
        _pair(conv.dilation),
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    """What `nn.Conv2d` keeps and types as a tuple of any length."""
    height, width = values
    return height, width
