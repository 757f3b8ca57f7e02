"""One small call of every kernel on a GPU, to be run under NVIDIA's memory checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        .venv/bin/python -m pytest tests/ops/test_cuda_sanitizer.py -k sanitizer

Without the variable PyTorch hands out pieces of large blocks, and a read beyond a tensor's end
stays unseen; `--tool racecheck` and `--tool initcheck` do without it.
"""

from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from cuda_cases import Case, call, exact, leaves, needs_gpu, on, output_gradient
from operator_testing import assert_same

pytestmark = needs_gpu


def _convolution(channels: int, out_channels: int, group_channels: int) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    case = deform_conv_cases.Case(
        input=normal(2, channels, 7, 5),
        offset=3 * normal(2, 2 * 2 * 9, 7, 5),
        weight=normal(out_channels, group_channels, 3, 3) / 10,
        bias=normal(out_channels),
        mask=normal(2, 2 * 9, 7, 5),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    for k, far in enumerate((float("inf"), -float("inf"), 1e30, -(2.0**31), 2.0**63)):
        case.offset[k % 2, 3 * k, k, k] = far
    return case


def _roi_pool(sampling: str, position_sensitive: bool) -> Case:
    case = roi_pool_cases.large_case(sampling, position_sensitive)
    assert case.offset is not None
    case.offset[3, 1, 2, 4] = float("inf")
    return replace(case, boxes=case.boxes[:5], offset=case.offset[:5])


CONVOLUTIONS = {"matrix": _convolution(10, 18, 10), "narrow": _convolution(6, 12, 1)}
ROI_POOLS = {
    f"{sampling} {'ps' if sensitive else 'roi'}": _roi_pool(sampling, sensitive)
    for sampling in roi_pool_cases.SAMPLINGS
    for sensitive in (False, True)
}


def check(case: Case, *expected: str) -> None:
    """Computes the output, and the gradients named; those take one more kernel."""
    case = on("cuda", case.to(torch.float32))
    tensors = {name: leaf.requires_grad_(name in expected) for name, leaf in leaves(case).items()}
    output = call(replace(case, **tensors))
    found = {"output": output.detach()}
    for name in expected:
        (found[f"grad_{name}"],) = torch.autograd.grad(
            output, tensors[name], output_gradient(case), retain_graph=True
        )
    torch.cuda.synchronize()
    reference = exact(replace(case, **{name: leaf.detach() for name, leaf in tensors.items()}))
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert_same(found, {name: reference[name] for name in found}, 2e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sanitizer_convolution_forward(kind):
    check(CONVOLUTIONS[kind])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_sanitizer_convolution_backward_input_and_positions(kind, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(CONVOLUTIONS[kind], "input", "offset", "mask")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sanitizer_convolution_backward_weight(kind):
    check(CONVOLUTIONS[kind], "weight", "bias")


@pytest.mark.parametrize("kind", ROI_POOLS)
def test_sanitizer_roi_pool_forward(kind):
    check(ROI_POOLS[kind])


@pytest.mark.parametrize("kind", ROI_POOLS)
def test_sanitizer_roi_pool_backward(kind):
    check(ROI_POOLS[kind], "input", "offset")
