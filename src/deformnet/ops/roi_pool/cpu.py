"""Deformable RoI pooling on the CPU, plain and position-sensitive."""

import ctypes

import torch
from torch import Tensor

from deformnet.ops._arguments import check_sides
from deformnet.ops.cpu.loading import DTYPES, address, call, dense, fields
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.roi_pool.parts import of_bins, of_parts

# As `Sampling` of problem.h.
_SAMPLINGS = {"bins": 0, "msra": 1, "aligned": 2}


class _Problem(ctypes.Structure):
    """`RoiProblem` of problem.h, field by field."""

    _fields_ = [
        *fields(ctypes.c_int64, "batch in_h in_w boxes out_channels out_h out_w"),
        *fields(ctypes.c_int64, "groups samples_per_bin"),
        *fields(ctypes.c_double, "spatial_scale gamma"),
        *fields(ctypes.c_int32, "dtype boxes_dtype offset_dtype sampling position_sensitive"),
        *fields(ctypes.c_int32, "input_channels_last threads"),
    ]


class _ForwardTensors(ctypes.Structure):
    _fields_ = fields(ctypes.c_void_p, "input boxes offset output")


class _BackwardTensors(ctypes.Structure):
    _fields_ = fields(ctypes.c_void_p, "grad_output input boxes offset grad_input grad_offset")


def roi_pool(input: Tensor, boxes: Tensor, offset: Tensor | None, rule: Rule) -> Tensor:
    """Forward pass; the arguments are checked.

    Returns:
        [R, C, ph, pw], contiguous.
    """
    check_sides(input)
    output = input.new_empty((boxes.shape[0], rule.out_channels(input), *rule.output_size))
    if output.numel() == 0:
        return output
    input, channels_last = _map(input, rule)
    boxes = boxes.contiguous()
    if offset is not None:
        offset = of_bins(offset, rule.output_size).contiguous()
    problem = _problem(input, boxes, offset, rule, channels_last)
    call("roi_pool", problem, _ForwardTensors(*map(address, (input, boxes, offset, output))))
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
        call("roi_pool_backward", problem, _BackwardTensors(*map(address, tensors)))
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
) -> _Problem:
    batch, _, in_h, in_w = input.shape
    return _Problem(
        *(batch, in_h, in_w, boxes.shape[0]),
        *(rule.out_channels(input), *rule.output_size),
        *(1 if offset is None else offset.shape[1] // 2, rule.samples_per_bin),
        *(rule.spatial_scale, rule.gamma, DTYPES[input.dtype], DTYPES[boxes.dtype]),
        *(DTYPES[input.dtype if offset is None else offset.dtype], _SAMPLINGS[rule.sampling]),
        *(rule.position_sensitive, channels_last, torch.get_num_threads()),
    )
