"""Argument checks of deformable convolution."""

from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from deformnet.ops._arguments import (
    MOST,
    MOST_PADDING,
    Pair,
    check_input,
    check_most,
    check_pair,
    check_tensor,
    shape_text,
)

Border: TypeAlias = Literal["zeros", "msra2017"]
BORDERS = get_args(Border)


class Geometry(NamedTuple):
    """The arguments that are not tensors; pairs are (vertical, horizontal)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    border: str


def check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> tuple[int, int, int, int]:
    """Check all arguments of a convolution.

    Returns:
        The shape [N, C_out, Ho, Wo] of the output.

    Raises:
        TypeError: if an argument is not a tensor, or has the wrong dtype.
        ValueError: if anything else is wrong; the message names the argument.
    """
    batch, channels, height, width = check_input(input)
    check_tensor("weight", weight, 4, input)
    check_tensor("offset", offset, 4, input, True)
    if bias is not None:
        check_tensor("bias", bias, 1, input)
    if mask is not None:
        check_tensor("mask", mask, 4, input, True)
    stride, padding, dilation, border = geometry
    _check_range("stride", stride, 1)
    _check_range("padding", padding, 0)
    _check_range("dilation", dilation, 1)
    if border not in BORDERS:
        raise ValueError(f"expected border to be one of {', '.join(BORDERS)}, but got {border!r}")

    out_channels, group_channels, kh, kw = weight.shape
    if out_channels < 1 or group_channels < 1 or kh < 1 or kw < 1:
        raise ValueError(
            f"expected weight to have no dimension of size 0, but got shape {shape_text(weight)}"
        )
    if channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f"expected weight to have shape [C_out, {channels} / groups, kh, kw], where groups "
            f"divides C_out and the {channels} channels of input, "
            f"but got shape {shape_text(weight)}"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(
            f"expected bias to have shape [{out_channels}], but got shape {shape_text(bias)}"
        )

    out_height = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"expected input to be at least as large as the dilated kernel, "
            f"[{dilation[0] * (kh - 1) + 1}, {dilation[1] * (kw - 1) + 1}], "
            f"but got shape {shape_text(input)} with padding {tuple(padding)}"
        )

    taps = kh * kw
    offset_batch, offset_channels, offset_height, offset_width = offset.shape
    groups = offset_channels // (2 * taps)
    if (
        offset_batch != batch
        or offset_height != out_height
        or offset_width != out_width
        or groups < 1
        or groups * 2 * taps != offset_channels
        or channels % groups
    ):
        raise ValueError(
            f"expected offset to have shape [{batch}, {2 * taps} * G, {out_height}, {out_width}], "
            f"where G divides the {channels} channels of input, "
            f"but got shape {shape_text(offset)}"
        )
    if mask is not None:
        mask_batch, mask_channels, mask_height, mask_width = mask.shape
        if (
            mask_batch != batch
            or mask_channels != groups * taps
            or mask_height != out_height
            or mask_width != out_width
        ):
            raise ValueError(
                f"expected mask to have shape [{batch}, {groups * taps}, {out_height}, "
                f"{out_width}] ({groups} offset groups of {taps} taps), "
                f"but got shape {shape_text(mask)}"
            )
    return batch, out_channels, out_height, out_width


def _check_range(name: str, pair: Pair, least: int) -> None:
    check_pair(name, pair)
    first, second = pair
    if first < least or second < least:
        raise ValueError(f"expected {name} to be at least {least}, but got {tuple(pair)}")
    if first > MOST_PADDING or second > MOST_PADDING:
        raise ValueError(f"expected {name} to be at most {MOST_PADDING}, but got {tuple(pair)}")


def check_framed(input: Tensor) -> None:
    """Check that the map of the CPU kernels, with its frame, does not have too many pixels.

    See `Geometry` in sampling.h, whose map has at most two more.
    """
    _, _, height, width = input.shape
    size, what = (height + 4) * (width + 1), "pixels with a frame, (H + 4) * (W + 1)"
    check_most("input", what, size, MOST, height, width)
