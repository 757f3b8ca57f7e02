"""Plain and deformable convolution as differentiable calls on given tensors."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.shapes import Shape, Tensors
from deformnet.ops import deform_conv2d

PLAIN, TORCHVISION, OURS = "conv2d", "torchvision", "deformnet"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Maximum error of a result by dtype, relative to the largest value of the exact result."""

Forward = Callable[[], Tensor]


def differentiable(shape: Shape, t: Tensors) -> dict[str, Forward]:
    """All three calls, by name."""
    d = shape.dilation
    return {
        PLAIN: lambda: F.conv2d(t.input, t.weight, None, 1, d, d),
        OURS: lambda: deform_conv2d(t.input, t.offset, t.weight, None, 1, d, d),
        TORCHVISION: lambda: torchvision.ops.deform_conv2d(
            t.input, t.offset, t.weight, None, 1, d, d
        ),
    }


def require_close(what: str, found: Tensor, exact: Tensor) -> None:
    """Exits if the error of a result reaches the tolerance for its dtype."""
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    if not error < TOLERANCES[found.dtype]:
        raise SystemExit(
            f"{what}: expected an error below {TOLERANCES[found.dtype]:g} of the largest value, "
            f"but got {error:.2g}; not timed"
        )


def wanted_gradients(name: str, t: Tensors) -> list[Tensor]:
    """Tensors to differentiate with respect to; plain convolution has no offsets."""
    return [t.input, t.weight] if name == PLAIN else [t.input, t.weight, t.offset]


def seconds(call: Forward) -> float:
    """Time of one call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gradients(call: Forward, wanted: list[Tensor], grad_output: Tensor) -> Callable[[], object]:
    """Forward and backward pass."""
    return lambda: torch.autograd.grad(call(), wanted, grad_output)


def backward(call: Forward, wanted: list[Tensor], grad_output: Tensor) -> Callable[[], object]:
    """The backward pass alone."""
    output = call()
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)
