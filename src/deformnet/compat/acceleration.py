"""torchvision's deformable convolution on deformnet's kernels."""

from types import TracebackType

import torch
from torch import Tensor
from torch.library import Library

from deformnet.compat._operators import grouped_deform_conv2d
from deformnet.ops import backends
from deformnet.ops.deform_conv.operator import OPERATOR

_KEYS = {"cpu": ("CPU",), "triton": ("CUDA", "XPU")}  # dispatch keys of the backends

_active: "set[TorchvisionAcceleration]" = set()
_library: Library | None = None


class TorchvisionAcceleration:
    """Handle of `accelerate_torchvision`; as a context manager, it calls `remove` on exit."""

    def remove(self) -> None:
        """Undo this acceleration.

        torchvision's kernels are restored once all handles are removed, in any order. Removing a
        handle again has no effect.
        """
        global _library
        _active.discard(self)
        if not _active and _library is not None:
            _library._destroy()
            _library = None
            _forget_kernels()

    def __enter__(self) -> "TorchvisionAcceleration":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def accelerate_torchvision() -> TorchvisionAcceleration:
    """Run all calls of torchvision's `deform_conv2d` on deformnet's kernels from now on.

    All calls in this process are redirected, on every device that has kernels (CPU, GPU):
    `torchvision.ops.deform_conv2d` and `DeformConv2d`, however they were imported,
    `torch.ops.torchvision.deform_conv2d`, scripted modules, exported programs, and code that was
    compiled before. Outputs and gradients are equal up to rounding. Invalid arguments raise
    `ValueError` or `TypeError` instead of torchvision's `RuntimeError`.

        >>> accelerate_torchvision()

    Code that is compiled or exported while this is active may contain deformnet's operator. It
    keeps the operator after `remove`, and needs `import deformnet` before it is loaded.

    Returns:
        A handle whose `remove()` restores torchvision's kernels. It can be used as a context
        manager. After several calls, the kernels are restored once all handles are removed.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
        RuntimeError: If torchvision's operators cannot be loaded, or deformnet has no kernels for
            this machine.
    """
    global _library
    if _library is None:
        _library = _register()
    handle = TorchvisionAcceleration()
    _active.add(handle)
    return handle


def _register() -> Library:
    try:
        from torchvision.extension import _has_ops
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected torchvision to be installed, but got {error}; run pip install torchvision"
        ) from error
    if not _has_ops():
        raise RuntimeError(
            "expected torchvision's operators to be loaded, but they are not compatible with "
            f"PyTorch {torch.__version__}; reinstall torchvision"
        )
    reasons = {backend: backends.why_unavailable(backend) for backend in _KEYS}
    if all(reasons.values()):
        raise RuntimeError(
            "expected kernels for the CPU or the GPU, but got none: "
            + "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        )
    library = Library("torchvision", "IMPL")
    for backend, keys in _KEYS.items():
        for key in keys if reasons[backend] is None else ():
            library.impl("deform_conv2d", _forward, f"Autograd{key}")
            # For calls below autograd: inference mode, and code that was compiled before.
            library.impl("deform_conv2d", _forward, key)
            library.impl("_deform_conv2d_backward", _backward, key)
    _forget_kernels()
    return library


def _forget_kernels() -> None:
    """Make traces look up the operators' kernels again; PyTorch caches the keys that have one."""
    for operator in ("deform_conv2d", "_deform_conv2d_backward"):
        getattr(torch.ops.torchvision, operator).default._dispatch_cache.clear()


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """The kernel of torchvision::deform_conv2d, whose output is always contiguous."""
    return grouped_deform_conv2d(
        input,
        offset,
        weight,
        bias,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        mask if use_mask else None,
        groups,
        offset_groups,
    ).contiguous()


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> tuple[Tensor, ...]:
    """The kernel of torchvision::_deform_conv2d_backward: gradients of its first five tensors."""
    by_input, by_offset, by_weight, by_bias, *by_mask = OPERATOR.backward(
        grad,
        input,
        offset,
        weight,
        mask if use_mask else None,
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        "zeros",
        (True, True, True, True, use_mask),
    )
    gradients = (by_input, by_weight, by_offset, *(by_mask or (torch.zeros_like(mask),)), by_bias)
    return tuple(gradient.contiguous() for gradient in gradients)
