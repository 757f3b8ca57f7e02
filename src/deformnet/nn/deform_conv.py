"""Deformable convolution as a layer that learns its own offsets."""

import math
from typing import Any, Literal, Never, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from deformnet.nn.graphs import call_module
from deformnet.nn.offsets import OffsetConv, OffsetConv2d, SeparableOffsetConv2d
from deformnet.ops import deform_conv2d
from deformnet.ops._arguments import IntOrPair, Pair, integer, number, one_of, pair, positive

_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# What `conv_offset` shares with its layer; the last is the padding of modes other than "zeros".
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")

_DCN_V2 = "conv_offset_mask"  # DCNv2's name of `conv_offset`
# Keys of the weight, or of its magnitude under weight norm (old and new API).
_MAGNITUDES = ("weight", "weight_g", "parametrizations.weight.original0")


class DeformConv2d(nn.Conv2d):
    """Deformable convolution that computes its offsets from its input.

    Dai et al. 2017, section 2.1 and Figure 2: the child `conv_offset`, a convolution with the same
    kernel size, stride, padding and dilation, predicts the offsets. Its weights and bias are
    initialized to zero, so a new layer computes what `nn.Conv2d` with the same weights does.
    (A loop that initializes all `nn.Conv2d` of a model also overwrites `conv_offset`; call
    `init_weights` afterwards.) Setting `stride`, `padding` or `dilation` of the layer also sets it
    in `conv_offset`.

    To read the offsets, register a forward hook on `conv_offset` and pass its output to
    `offsets_of`. With `modulated=True`, the output has G*K more channels, and the mask is their
    sigmoid times `mask_scale`.

    `load_state_dict` also accepts the weights of DCNv2's layer `DCN`: it renames `conv_offset_mask`
    and divides the weight by `mask_scale`, since the mask of `DCN` is a plain sigmoid.

    Args:
        in_channels: Number of input channels C.
        out_channels: Number of output channels.
        kernel_size: Height and width of the kernel, with K taps.
        stride: Stride of the convolution.
        padding: Padding added to all four sides, or "same" or "valid", as in `nn.Conv2d`.
        dilation: Spacing between kernel taps.
        groups: Groups of the main convolution. `conv_offset` has none; see `offset_conv`.
        bias: Whether the main convolution has a bias; `conv_offset` always has one.
        offset_groups: Number of offset groups G. The input channels are divided into G equal
            groups, each with its own offsets.
        modulated: Whether to also learn a mask, `mask_scale * sigmoid(.)` (Zhu et al. 2019).
        mask_scale: Upper bound of the mask. With 2, the mask is initially 1, so a new layer is a
            plain convolution; with 1, it is initially 0.5, as in mmcv, detectron2 and DCNv2.
        max_offset: Bound on the offsets in pixels, applied as
            `max_offset * tanh(offset / max_offset)`, which leaves small offsets nearly unchanged.
            None leaves the offsets unbounded.
        offset_in_channels: Number of channels of `offset_input`; None uses `in_channels`.
        offset_conv: Kind of `conv_offset`: "dense" as in the paper, or "separable", a 1x1
            convolution of a depthwise convolution (its child `depthwise`). For K taps, "dense" has
            2*G*K*K*C weights and "separable" has (2*G + 1)*K*C, which is the smaller by far next
            to a depthwise layer, of K*C weights.
        padding_mode: As in `nn.Conv2d`. Modes other than "zeros" pad the input by `padding` before
            sampling; beyond this margin the input is zero.

    Shape:
        Input [N, C, H, W] or [C, H, W]; optional `offset_input`, which replaces the input for
        computing the offsets, [N, offset_in_channels, H, W] or [offset_in_channels, H, W]; output
        [N, out_channels, Ho, Wo] or [out_channels, Ho, Wo], as in `nn.Conv2d`.

    Raises:
        TypeError: If an integer argument is not an integer, or another number is not a number.
        ValueError: If `offset_groups` does not divide `in_channels`, or `max_offset` or
            `mask_scale` is not positive and finite; see also `nn.Conv2d`.
    """

    _keeps_options = False  # in `deform_`; True for layers of other libraries

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: str | IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        mask_scale: float = 2.0,
        max_offset: float | None = None,
        offset_in_channels: int | None = None,
        offset_conv: OffsetConv = "dense",
        padding_mode: _PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            integer("in_channels", in_channels),
            integer("out_channels", out_channels),
            pair("kernel_size", kernel_size),
            pair("stride", stride),
            padding if isinstance(padding, str) else pair("padding", padding),
            pair("dilation", dilation),
            integer("groups", groups),
            bool(bias),
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.offset_groups = integer("offset_groups", offset_groups)
        self.modulated = bool(modulated)
        self.mask_scale = positive_number("mask_scale", mask_scale)
        self.max_offset = check_max_offset(max_offset)
        self.offset_conv: OffsetConv = offset_conv
        self.conv_offset = make_conv_offset(
            self, self.offset_groups, self.modulated, offset_conv, offset_in_channels
        )
        # Stored here, since tools such as peft wrap `conv_offset` and hide its attributes.
        self.offset_in_channels: int = self.conv_offset.in_channels

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _GEOMETRY and hasattr(self, "conv_offset"):
            setattr(self.conv_offset.spatial, name, value)

    def reset_parameters(self) -> None:
        """Reinitialize the weights as `nn.Conv2d` does, and set `conv_offset` to zero."""
        super().reset_parameters()
        # The constructor of nn.Conv2d calls this before there is a conv_offset.
        if hasattr(self, "conv_offset"):
            self.conv_offset.reset_parameters()

    def init_weights(self) -> None:
        """Set `conv_offset` to zero. mmengine calls this after initializing convolutions."""
        self.conv_offset.reset_parameters()

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # `state_dict` is a copy, so the caller's is not modified.
        theirs = f"{prefix}{_DCN_V2}."
        keys = [key for key in state_dict if key.startswith(theirs)]
        if keys and not hasattr(self, _DCN_V2):
            for key in keys:
                own = f"{prefix}conv_offset.{key.removeprefix(theirs)}"
                state_dict[own] = state_dict.pop(key)
            for key in (f"{prefix}{name}" for name in _MAGNITUDES):
                if key in state_dict:
                    state_dict[key] = state_dict[key] / self.mask_scale
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, input: Tensor, offset_input: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input, *(() if offset_input is None else (offset_input,)))
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected input to be [N, {self.in_channels}, H, W], but got {list(input.shape)}"
            )
        offset_input = self._check_offset_input(input, offset_input)
        if input.ndim == 3:
            return self.forward(input.unsqueeze(0), offset_input.unsqueeze(0)).squeeze(0)
        offset, mask = self._offset_and_mask(self.conv_offset(offset_input))
        input, padding = self._pad(input)
        stride, dilation = pair("stride", self.stride), pair("dilation", self.dilation)
        return deform_conv2d(input, offset, self.weight, self.bias, stride, padding, dilation, mask)

    def offsets_of(self, predicted: Tensor) -> Tensor:
        """Offsets [N, 2*G*K, Ho, Wo] from an output of `conv_offset`: (y, x) per tap, in pixels."""
        return self._offset_and_mask(predicted)[0]

    def _offset_and_mask(self, predicted: Tensor) -> tuple[Tensor, Tensor | None]:
        offset, mask = predicted, None
        if self.modulated:
            channels = predicted.shape[1] // 3
            offset, mask = predicted.split((2 * channels, channels), dim=1)
            # Inductor fails on the strides of the slice at batch size 1 with dynamic shapes.
            offset, mask = offset.contiguous(), self.mask_scale * mask.sigmoid()
        if self.max_offset is not None:
            offset = self.max_offset * torch.tanh(offset / self.max_offset)
        return offset, mask

    def _check_offset_input(self, input: Tensor, offset_input: Tensor | None) -> Tensor:
        channels = self.offset_in_channels
        if offset_input is None:
            if channels != self.in_channels:
                raise ValueError(
                    f"expected offset_input to be [N, {channels}, H, W], but got None; "
                    f"offset_in_channels={channels} differs from in_channels={self.in_channels}"
                )
            return input
        expected = (*input.shape[:-3], channels, *input.shape[-2:])
        if offset_input.shape != expected:
            raise ValueError(
                f"expected offset_input to be {list(expected)}, with the batch and spatial sizes "
                f"of input, but got {list(offset_input.shape)}"
            )
        return offset_input

    def _pad(self, input: Tensor) -> tuple[Tensor, Pair]:
        """The input, padded where the operator cannot, and the padding for the operator."""
        if self.padding_mode != "zeros":
            padding = self._reversed_padding_repeated_twice
            return F.pad(input, padding, mode=self.padding_mode), (0, 0)
        top, bottom, left, right = margins(self)
        if left == right and top == bottom:
            return input, (top, left)
        # "same" padding of an even kernel has one pixel more at the end.
        return F.pad(input, (left, right, top, bottom)), (0, 0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.offset_groups != 1:
            text += f", offset_groups={self.offset_groups}"
        if self.modulated:
            text += ", modulated=True"
            text += f", mask_scale={self.mask_scale:g}" if self.mask_scale != 2 else ""
        if self.max_offset is not None:
            text += f", max_offset={self.max_offset:g}"
        if self.offset_in_channels != self.in_channels:
            text += f", offset_in_channels={self.offset_in_channels}"
        if self.offset_conv != "dense":
            text += f", offset_conv={self.offset_conv}"
        return text

    def __prepare_scriptable__(self) -> Never:
        refuse_script(self)


def make_conv_offset(
    conv: nn.Conv2d,
    offset_groups: int,
    modulated: bool,
    offset_conv: OffsetConv,
    in_channels: int | None = None,
) -> OffsetConv2d:
    """The convolution that predicts offsets for `conv`, with its geometry, device and dtype.

    It has `in_channels` input channels; None uses the number of `conv`.
    """
    one_of("offset_conv", offset_conv, get_args(OffsetConv))
    if offset_groups < 1 or conv.in_channels % offset_groups:
        raise ValueError(
            f"expected offset_groups to be a divisor of the {conv.in_channels} input channels, "
            f"but got {offset_groups}"
        )
    height, width = kernel_size = pair("kernel_size", conv.kernel_size)
    channels = (3 if modulated else 2) * offset_groups * height * width
    inputs = int(conv.in_channels)
    if in_channels is not None:
        inputs = positive("offset_in_channels", in_channels)
    weight = conv.weight
    kind = SeparableOffsetConv2d if offset_conv == "separable" else OffsetConv2d
    offset = kind(inputs, channels, kernel_size, device=weight.device, dtype=weight.dtype)
    for name in _GEOMETRY:
        setattr(offset.spatial, name, getattr(conv, name))
    return offset


def check_max_offset(value: float | None) -> float | None:
    """`value` as a float, or None.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not positive and finite.
    """
    if value is None:
        return None
    return positive_number("max_offset", value, ", or None for no bound")


def positive_number(name: str, value: float, otherwise: str = "") -> float:
    """`value` as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not positive, or infinite.
    """
    value = float(number(name, value))
    if not 0 < value < math.inf:
        raise ValueError(f"expected {name} to be a positive number{otherwise}, but got {value:g}")
    return value


def margins(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Rows and columns that a convolution adds to its input: top, bottom, left and right."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding != "same":
        vertical, horizontal = pair("padding", conv.padding)
        return vertical, vertical, horizontal, horizontal
    kernel_size, dilation = pair("kernel_size", conv.kernel_size), pair("dilation", conv.dilation)
    vertical, horizontal = (
        step * (taps - 1) for step, taps in zip(dilation, kernel_size, strict=True)
    )
    return vertical // 2, vertical - vertical // 2, horizontal // 2, horizontal - horizontal // 2


def refuse_script(layer: nn.Module) -> Never:
    """Called by `torch.jit.script`, which would fail with a message about the layer's internals."""
    raise NotImplementedError(
        f"{type(layer).__name__} does not support torch.jit.script; use torch.export.export, "
        "torch.compile or torch.jit.trace"
    )
