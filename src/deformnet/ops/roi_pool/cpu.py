"""Deformable RoI pooling on the CPU, plain and position-sensitive."""

from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from deformnet.ops._arguments import check_sides
from deformnet.ops.cpu.loading import DTYPES, call, dense
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.roi_pool.parts import of_bins, of_parts

# As `Sampling` of problem.h.
_SAMPLINGS = {"bins": 0, "msra": 1, "aligned": 2}

# `RoiProblem` of problem.h: 9 64-bit integers, 2 doubles, 7 32-bit integers, padded to 64 bits.
_PROBLEM = Struct("9q2d7i0q")


class Plan(NamedTuple):
    """Arguments of the forward pass that depend only on its tensors' sizes, dtypes and strides."""

    rule: Rule
    shape: tuple[int, int, int, int]
    memory_format: torch.memory_format  # of the input
    problem: bytes


def plan(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Plan:
    """The plan of the forward pass, for arguments that have been checked."""
    check_sides(input)
    _, channels_last = _map(input, rule)
    offset = None if offset is None else of_bins(offset, rule.output_size)
    return Plan(
        rule,
        (boxes.shape[0], rule.out_channels(input), *rule.output_size),
        torch.channels_last if channels_last else torch.contiguous_format,
        _problem(input, boxes, offset, rule, channels_last),
    )


def roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, plan: Plan) -> Tensor:
    """Forward pass.

    Returns:
        [R, C, ph, pw], contiguous.
    """
    rule, shape, memory_format, problem = plan
    output = input.new_empty(shape)
    if output.numel() == 0:
        return output
    input, boxes = input.contiguous(memory_format=memory_format), boxes.contiguous()
    if offset is not None:
        offset = of_bins(offset, rule.output_size).contiguous()
    call("roi_pool", problem, input, boxes, offset, output)
    return output


def roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    rule: Rule,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and offset, as far as `needs` says True."""
    check_sides(input)
    needs_input, needs_offset = needs
    dense_input, channels_last = _map(input, rule)
    boxes, grad_output = boxes.contiguous(), grad_output.contiguous()
    shifts = None if offset is None else of_bins(offset, rule.output_size).contiguous()

    # Without boxes no kernel runs: the gradients are zero.
    make = torch.zeros_like if grad_output.numel() == 0 else torch.empty_like
    grad_input = make(dense_input) if needs_input else None
    grad_shifts = make(shifts) if needs_offset and shifts is not None else None
    if grad_output.numel() > 0 and (grad_input is not None or grad_shifts is not None):
        problem = _problem(dense_input, boxes, shifts, rule, channels_last)
        tensors = (grad_output, dense_input, boxes, shifts, grad_input, grad_shifts)
        call("roi_pool_backward", problem, *tensors)
    # In the memory format of the input, where the kernel has it in another one.
    if grad_input is not None and not channels_last and dense(input)[1]:
        grad_input = grad_input.contiguous(memory_format=torch.channels_last)
    if grad_shifts is None or offset is None:
        return grad_input, None
    return grad_input, of_parts(grad_shifts, offset)


def _map(input: Tensor, rule: Rule) -> tuple[Tensor, bool]:
    """The input in a memory format that the kernel takes, and whether that is channels-last."""
    return (input.contiguous(), False) if rule.position_sensitive else dense(input)


def _problem(
    input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule, channels_last: bool
) -> bytes:
    batch, _, in_h, in_w = input.shape
    return _PROBLEM.pack(
        *(batch, in_h, in_w, boxes.shape[0]),
        *(rule.out_channels(input), *rule.output_size),
        *(1 if offset is None else offset.shape[1] // 2, rule.samples_per_bin),
        *(rule.spatial_scale, rule.gamma, DTYPES[input.dtype], DTYPES[boxes.dtype]),
        *(DTYPES[input.dtype if offset is None else offset.dtype], _SAMPLINGS[rule.sampling]),
        *(rule.position_sensitive, channels_last, torch.get_num_threads()),
    )
