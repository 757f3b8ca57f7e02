"""Calls of all operators with tensors on a GPU, shared by their tests."""

import os
from dataclasses import fields, replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from torch import Tensor

from deformnet.ops import backends, deform_conv2d

Case = deform_conv_cases.Case | roi_pool_cases.Case

WHY_NOT = backends.why_unavailable("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    WHY_NOT = "TRITON_INTERPRET=1 is set: kernels do not run on the GPU"
# For `pytestmark`.
needs_gpu = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def _depthwise() -> deform_conv_cases.Case:
    case = deform_conv_cases.large_case(0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.input.shape[1], 1, 3, 3, generator=generator, dtype=torch.float64)
    return replace(case, weight=weight, bias=None)


CASES: dict[str, Case] = {
    "convolution": deform_conv_cases.large_case(0),
    "two groups": deform_conv_cases.large_case(1),
    "depthwise": _depthwise(),
    "roi": roi_pool_cases.large_case("bins", False),
    "ps": roi_pool_cases.large_case("aligned", True, groups=3),
}
EVERY_CASE = pytest.mark.parametrize("name", list(CASES))


def on(device: str, case: Case) -> Case:
    """The call with all its tensors on a device."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return replace(case, **{name: tensor.to(device) for name, tensor in tensors.items()})


def leaves(case: Case) -> dict[str, Tensor]:
    """What has a gradient, by name."""
    return case.tensors if isinstance(case, deform_conv_cases.Case) else case.leaves


def differentiable(case: Case) -> Case:
    return replace(case, **{name: t.detach().requires_grad_() for name, t in leaves(case).items()})


def call(case: Case, backend: str = "auto") -> Tensor:
    """The public function of the case."""
    if isinstance(case, deform_conv_cases.Case):
        return deform_conv2d(*case.public, backend=backend)
    return roi_pool_cases.call(case, backend)


def output_gradient(case: Case) -> Tensor:
    convolution = isinstance(case, deform_conv_cases.Case)
    gradient = (deform_conv_cases if convolution else roi_pool_cases).output_gradient(case)
    return gradient.to(case.input.device)


def run(case: Case, gradient: Tensor | None = None, backend: str = "auto") -> dict[str, Tensor]:
    """The output and all gradients, by name, where the case has its tensors."""
    case = differentiable(case)
    output = call(case, backend)
    gradient = output_gradient(case) if gradient is None else gradient
    gradients = torch.autograd.grad(output, list(leaves(case).values()), gradient)
    names = (f"grad_{name}" for name in leaves(case))
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def exact(case: Case) -> dict[str, Tensor]:
    """What the reference gives on the CPU in float64, for the numbers that the case has."""
    gradient = output_gradient(case).cpu().double()
    return run(on("cpu", case).to(torch.float64), gradient, "reference")


def to_cpu(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in results.items()}
