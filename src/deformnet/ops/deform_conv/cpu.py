"""Deformable convolution on the CPU."""

from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from deformnet.ops.cpu.loading import DTYPES, call, dense
from deformnet.ops.deform_conv.checks import Geometry, check_framed

# As `Border` of problem.h.
_BORDERS = {"zeros": 0, "msra2017": 1}

# `Problem` of problem.h: 17 64-bit and 7 32-bit integers, padded to 64 bits.
_PROBLEM = Struct("17q7i0q")


class Plan(NamedTuple):
    """Arguments of the forward pass that depend only on its tensors' sizes, dtypes and strides."""

    shape: tuple[int, int, int, int]
    memory_format: torch.memory_format
    problem: bytes


def plan(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Plan:
    """The plan of the forward pass, for arguments that have been checked."""
    check_framed(input)
    _, channels_last = dense(input)
    batch, _, out_h, out_w = offset.shape
    return Plan(
        (batch, weight.shape[0], out_h, out_w),
        torch.channels_last if channels_last else torch.contiguous_format,
        _problem(input, offset, weight, mask, geometry, channels_last, channels_last),
    )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    plan: Plan,
) -> Tensor:
    """Forward pass.

    Returns:
        [N, C_out, Ho, Wo], channels-last if `input` is.
    """
    shape, memory_format, problem = plan
    output = torch.empty(shape, dtype=input.dtype, memory_format=memory_format)
    if output.numel() == 0:
        return output
    input = input.contiguous(memory_format=memory_format)
    offset, weight = offset.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    mask = None if mask is None else mask.contiguous()
    call("deform_conv2d", problem, input, offset, mask, weight, bias, output)
    return output


def deform_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, offset, weight, bias and mask, as far as `needs` says True."""
    check_framed(input)
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = needs
    input, input_channels_last = dense(input)
    grad_output, output_channels_last = dense(grad_output)
    offset, weight = offset.contiguous(), weight.contiguous()
    mask = None if mask is None else mask.contiguous()

    grad_bias = grad_output.sum((0, 2, 3)) if needs_bias else None
    # An empty batch runs no kernel: its gradients are zero.
    make = torch.zeros_like if grad_output.numel() == 0 else torch.empty_like
    grad_input = make(input) if needs_input else None
    grad_offset = make(offset) if needs_offset else None
    grad_weight = make(weight) if needs_weight else None
    grad_mask = make(mask) if needs_mask and mask is not None else None
    gradients = (grad_input, grad_offset, grad_weight, grad_bias, grad_mask)
    computed = (grad_input, grad_offset, grad_mask, grad_weight)
    if grad_output.numel() == 0 or all(gradient is None for gradient in computed):
        return gradients
    formats = input_channels_last, output_channels_last
    problem = _problem(input, offset, weight, mask, geometry, *formats)
    call("deform_conv2d_backward", problem, grad_output, input, offset, mask, weight, *computed)
    return gradients


def _problem(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    input_channels_last: bool,
    output_channels_last: bool,
) -> bytes:
    stride, padding, dilation, border = geometry
    batch, in_channels, in_h, in_w = input.shape
    out_channels, group_in, kernel_h, kernel_w = weight.shape
    _, offset_channels, out_h, out_w = offset.shape
    return _PROBLEM.pack(
        *(batch, in_channels, in_h, in_w, out_channels, out_h, out_w, kernel_h, kernel_w),
        *(*stride, *padding, *dilation),
        *(in_channels // group_in, offset_channels // (2 * kernel_h * kernel_w)),
        *(DTYPES[input.dtype], DTYPES[offset.dtype]),
        *(DTYPES[offset.dtype if mask is None else mask.dtype], _BORDERS[border]),
        *(input_channels_last, output_channels_last, torch.get_num_threads()),
    )
