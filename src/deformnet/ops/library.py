"""The operators as PyTorch knows them: schema, kernels, fakes, gradients, autocast.

The one module that imports the implementations. Everything is registered at import.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from deformnet.ops import triton
from deformnet.ops.cpu import loading as _loading
from deformnet.ops.deform_conv import cpu as _conv_cpu
from deformnet.ops.roi_pool import cpu as _pool_cpu
from deformnet.ops.deform_conv import reference as _conv_reference
from deformnet.ops.roi_pool import reference as _pool_reference
from deformnet.ops.checks import (
    Pair,
    check_image_indices,
    deform_conv2d_shape,
    roi_pool_shape,
)

_TensorOrNone = TypeVar("_TensorOrNone", Tensor, Tensor | None)

# Asked once: a compiler may then take the answer for a constant.
CPU_UNAVAILABLE: str | None = _loading.why_unavailable()
cpu = SimpleNamespace(instruction_set=_loading.instruction_set, select_instruction_set=_loading.select_instruction_set, deform_conv2d=_conv_cpu.deform_conv2d, deform_conv2d_backward=_conv_cpu.deform_conv2d_backward, roi_pool=_pool_cpu.roi_pool, roi_pool_backward=_pool_cpu.roi_pool_backward)

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, str border"
_library = Library("deformnet", "DEF")
_library.define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    f"{_GEOMETRY}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# `needs` says which gradients are wanted, in the order input, offset, weight, bias, mask; those
# and no others are returned.
_library.define(
    "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
    f"Tensor? mask, {_GEOMETRY}, bool[5] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)

_ROI_POOL = (
    "Tensor input, Tensor boxes, Tensor? offset, int[2] output_size, float spatial_scale, "
    "float gamma, str sampling, int samples_per_bin, bool position_sensitive"
)
_library.define(f"roi_pool({_ROI_POOL}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
# `needs` in the order input, offset; boxes have no gradient.
_library.define(
    f"roi_pool_backward(Tensor grad_output, {_ROI_POOL}, bool[2] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)

# The overloads, resolved once and not in every call.
deform_conv2d = torch.ops.deformnet.deform_conv2d.default
deform_conv2d_backward = torch.ops.deformnet.deform_conv2d_backward.default
roi_pool = torch.ops.deformnet.roi_pool.default
roi_pool_backward = torch.ops.deformnet.roi_pool_backward.default


def reference_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> Tensor:
    """The definition, with the memory format that the operator has."""
    output = _conv_reference.deform_conv2d(
        input, offset, weight, bias, mask, stride, padding, dilation, border
    )
    return output.contiguous(memory_format=_memory_format(input))


def reference_roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> Tensor:
    """The definition, for boxes of images that exist."""
    check_image_indices(boxes, input.shape[0])
    return _pool_reference.roi_pool(
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )


def autocast_roi_pool(
    device: str, input: Tensor, boxes: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors as autocast wants them: a map in its type, positions in float32."""
    low = torch.get_autocast_dtype(device)
    return _cast(input, low), _cast(boxes, torch.float32), _cast(offset, torch.float32)


def autocast(
    device: str,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors as autocast wants them: a convolution's in its type, positions in float32.

    float64 stays float64, as in PyTorch's own operators.
    """
    low = torch.get_autocast_dtype(device)
    return (
        _cast(input, low),
        _cast(offset, torch.float32),
        _cast(weight, low),
        _cast(bias, low),
        _cast(mask, torch.float32),
    )


def _cast(tensor: _TensorOrNone, dtype: torch.dtype) -> _TensorOrNone:
    # What is not a tensor at all is left for the checks to refuse.
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _memory_format(input: Tensor) -> torch.memory_format:
    if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _kernels(input: Tensor):  # noqa: ANN202 (a module, and a checker knows which)
    """The fast implementation for the device of a tensor.

    Raises:
        RuntimeError: if it cannot run.
    """
    reason = triton.why_unavailable() if input.is_cuda else CPU_UNAVAILABLE
    if reason is not None:
        raise RuntimeError(reason)
    if input.is_cuda:
        from deformnet.ops.deform_conv import triton as conv
        from deformnet.ops.roi_pool import triton as pool

        return SimpleNamespace(deform_conv2d=conv.deform_conv2d, deform_conv2d_backward=conv.deform_conv2d_backward, roi_pool=pool.roi_pool, roi_pool_backward=pool.roi_pool_backward)
    return cpu


def _fast(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> Tensor:
    kernels = _kernels(input)
    # Again, after the public function's: a compiled or exported program comes straight here.
    deform_conv2d_shape(input, offset, weight, bias, mask, stride, padding, dilation, border)
    return kernels.deform_conv2d(
        input, offset, weight, bias, mask, stride, padding, dilation, border
    )


def _fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> Tensor:
    shape = deform_conv2d_shape(
        input, offset, weight, bias, mask, stride, padding, dilation, border
    )
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input)
    )


def _fast_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
    needs: list[bool],
) -> list[Tensor]:
    kernels = _kernels(input)
    _check_backward(
        grad_output, input, offset, weight, mask, stride, padding, dilation, border, needs
    )
    gradients = kernels.deform_conv2d_backward(
        grad_output,
        input,
        offset,
        weight,
        mask,
        stride,
        padding,
        dilation,
        border,
        (needs[0], needs[1], needs[2], needs[3], needs[4]),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
    needs: list[bool],
) -> list[Tensor]:
    _check_backward(
        grad_output, input, offset, weight, mask, stride, padding, dilation, border, needs
    )
    gradients = []
    if needs[0]:
        gradients.append(torch.empty_like(input, memory_format=_memory_format(input)))
    if needs[1]:
        gradients.append(torch.empty_like(offset, memory_format=torch.contiguous_format))
    if needs[2]:
        gradients.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if needs[3]:
        gradients.append(weight.new_empty(weight.shape[0]))
    if mask is not None and needs[4]:
        gradients.append(torch.empty_like(mask, memory_format=torch.contiguous_format))
    return gradients


def _check_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
    needs: list[bool],
) -> None:
    shape = deform_conv2d_shape(
        input, offset, weight, None, mask, stride, padding, dilation, border
    )
    _check_gradient(grad_output, input, shape)
    if mask is None and needs[4]:
        raise ValueError("needs: want no gradient of mask where there is no mask, got True")


def _check_gradient(grad_output: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    if grad_output.dtype != input.dtype:
        raise TypeError(f"grad_output: want {input.dtype}, as input, got {grad_output.dtype}")
    if grad_output.device != input.device:
        raise ValueError(
            f"grad_output: want device {input.device}, as input, got {grad_output.device}"
        )
    if grad_output.dim() != 4 or grad_output.shape != shape:
        raise ValueError(f"grad_output: want {list(shape)}, got {list(grad_output.shape)}")


class _DeformConv2d(torch.autograd.Function):
    # Registered below by hand, as torch.library.register_autograd adds twice this overhead.

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        *geometry: Any,
    ) -> Tensor:
        # The inputs alone: what is interpolated from them is cheaper to compute again than to keep.
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.geometry = geometry
        with torch._C._AutoDispatchBelowAutograd():
            return deform_conv2d(input, offset, weight, bias, mask, *geometry)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, offset, weight, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        gradients = iter(
            deform_conv2d_backward(grad_output, input, offset, weight, mask, *ctx.geometry, needs)
        )
        return (*(next(gradients) if need else None for need in needs), None, None, None, None)


class _DeformConv2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(deform_conv2d_backward(*arguments))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(
            "deform_conv2d: the fast kernels have no second derivative; "
            'pass backend="reference" to differentiate twice'
        )


def _autograd(*arguments: Any) -> Tensor:
    _refuse_tangents("deform_conv2d", arguments[:5])
    if _needs_gradient(arguments[:5]):
        return _DeformConv2d.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return deform_conv2d(*arguments)


def _autograd_backward(*arguments: Any) -> list[Tensor]:
    _refuse_tangents("deform_conv2d", arguments[:5])
    if _needs_gradient(arguments[:5]):
        return list(_DeformConv2dBackward.apply(*arguments))
    with torch._C._AutoDispatchBelowAutograd():
        return deform_conv2d_backward(*arguments)


def _refuse_tangents(operator: str, tensors: tuple[Tensor | None, ...]) -> None:
    # Below autograd a tangent is dropped without a word, and the derivative would come out as zero.
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{operator}: the fast kernels have no forward-mode derivative; "
            'pass backend="reference" for torch.func.jvp, jacfwd and the like'
        )


def _needs_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _autocast_on(device: str) -> Callable[..., Tensor]:
    def kernel(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        border: str,
    ) -> Tensor:
        tensors = autocast(device, input, offset, weight, bias, mask)
        with torch.autocast(device, enabled=False):
            return deform_conv2d(*tensors, stride, padding, dilation, border)

    return kernel


def _fast_roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> Tensor:
    kernels = _kernels(input)
    arguments = (
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )
    # Again, after the public function's: a compiled or exported program comes straight here.
    roi_pool_shape(*arguments)
    check_image_indices(boxes, input.shape[0])
    return kernels.roi_pool(*arguments)


def _fake_roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> Tensor:
    shape = roi_pool_shape(
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )
    return input.new_empty(shape)


def _fast_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
    needs: list[bool],
) -> list[Tensor]:
    kernels = _kernels(input)
    arguments = (
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )
    _check_gradient(grad_output, input, roi_pool_shape(*arguments))
    _check_roi_pool_needs(offset, needs)
    check_image_indices(boxes, input.shape[0])
    gradients = kernels.roi_pool_backward(grad_output, *arguments, (needs[0], needs[1]))
    return [gradient for gradient in gradients if gradient is not None]


def _fake_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
    needs: list[bool],
) -> list[Tensor]:
    shape = roi_pool_shape(
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )
    _check_gradient(grad_output, input, shape)
    _check_roi_pool_needs(offset, needs)
    gradients = []
    if needs[0]:
        gradients.append(torch.empty_like(input, memory_format=_memory_format(input)))
    if offset is not None and needs[1]:
        gradients.append(torch.empty_like(offset, memory_format=torch.contiguous_format))
    return gradients


def _check_roi_pool_needs(offset: Tensor | None, needs: list[bool]) -> None:
    if offset is None and needs[1]:
        raise ValueError("needs: want no gradient of offset where there is no offset, got True")


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, boxes: Tensor, offset: Tensor | None, *rule: Any
    ) -> Tensor:
        ctx.save_for_backward(input, boxes, offset)
        ctx.rule = rule
        with torch._C._AutoDispatchBelowAutograd():
            return roi_pool(input, boxes, offset, *rule)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, boxes, offset = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        gradients = iter(roi_pool_backward(grad_output, input, boxes, offset, *ctx.rule, needs))
        by_input, by_offset = (next(gradients) if need else None for need in needs)
        return (by_input, None, by_offset, *(None for _ in ctx.rule))


class _RoIPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(roi_pool_backward(*arguments))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(
            "RoI pooling: the fast kernels have no second derivative; "
            'pass backend="reference" to differentiate twice'
        )


def _autograd_roi_pool(*arguments: Any) -> Tensor:
    # Boxes are no part of it: no derivative goes to them.
    input, _, offset = arguments[:3]
    _refuse_tangents("RoI pooling", (input, offset))
    if _needs_gradient((input, offset)):
        return _RoIPool.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return roi_pool(*arguments)


def _autograd_roi_pool_backward(*arguments: Any) -> list[Tensor]:
    grad_output, input, _, offset = arguments[:4]
    _refuse_tangents("RoI pooling", (grad_output, input, offset))
    if _needs_gradient((grad_output, input, offset)):
        return list(_RoIPoolBackward.apply(*arguments))
    with torch._C._AutoDispatchBelowAutograd():
        return roi_pool_backward(*arguments)


def _autocast_roi_pool_on(device: str) -> Callable[..., Tensor]:
    def kernel(input: Tensor, boxes: Tensor, offset: Tensor | None, *rule: Any) -> Tensor:
        tensors = autocast_roi_pool(device, input, boxes, offset)
        with torch.autocast(device, enabled=False):
            return roi_pool(*tensors, *rule)

    return kernel


_library.impl("deform_conv2d", _fast, "CPU")
_library.impl("deform_conv2d", _fast, "CUDA")
_library.impl("deform_conv2d", _autocast_on("cpu"), "AutocastCPU")
_library.impl("deform_conv2d", _autocast_on("cuda"), "AutocastCUDA")
_library.impl("deform_conv2d", _autograd, "Autograd")
_library.impl("deform_conv2d_backward", _fast_backward, "CPU")
_library.impl("deform_conv2d_backward", _fast_backward, "CUDA")
_library.impl("deform_conv2d_backward", _autograd_backward, "Autograd")
torch.library.register_fake("deformnet::deform_conv2d", _fake, lib=_library)
torch.library.register_fake("deformnet::deform_conv2d_backward", _fake_backward, lib=_library)

_library.impl("roi_pool", _fast_roi_pool, "CPU")
_library.impl("roi_pool", _fast_roi_pool, "CUDA")
_library.impl("roi_pool", _autocast_roi_pool_on("cpu"), "AutocastCPU")
_library.impl("roi_pool", _autocast_roi_pool_on("cuda"), "AutocastCUDA")
_library.impl("roi_pool", _autograd_roi_pool, "Autograd")
_library.impl("roi_pool_backward", _fast_roi_pool_backward, "CPU")
_library.impl("roi_pool_backward", _fast_roi_pool_backward, "CUDA")
_library.impl("roi_pool_backward", _autograd_roi_pool_backward, "Autograd")
torch.library.register_fake("deformnet::roi_pool", _fake_roi_pool, lib=_library)
torch.library.register_fake("deformnet::roi_pool_backward", _fake_roi_pool_backward, lib=_library)
