"""Tensors of more than 2**31 numbers on a GPU, against the reference on the corner that is last.

All else of the gradient of the output is zero, so that gradients, too, depend on that corner alone.
"""

import pytest
import torch
from cuda_cases import needs_gpu
from torch import Tensor

from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

pytestmark = needs_gpu

MOST = 2**31 - 1
# Rows and columns of the corner, and of what is cut out for the reference: a tap reaches less far.
CORNER, CUT = 20, 40


@pytest.fixture(autouse=True)
def _memory():
    torch.cuda.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def skip_without(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"this takes {gigabytes:g} GB of the GPU's memory, {free:.0f} GB are free")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def offsets(*shape: int) -> Tensor:
    """Up to two pixels, and so few digits that they are added to positions without rounding."""
    return normal(*shape).clamp_(-2, 2).mul_(64).round_().div_(64)


def last(tensor: Tensor, size: int) -> Tensor:
    """The last rows and columns of the last image."""
    return tensor[-1:, :, -size:, -size:]


def exactly(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().requires_grad_()


def assert_close(found: Tensor, expected: Tensor) -> None:
    expected = expected.detach()
    tolerance = 2e-2 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        found.detach().cpu().double(), expected, rtol=0, atol=tolerance, check_dtype=False
    )


@pytest.mark.parametrize(
    ("gigabytes", "batch", "side", "channels", "group_channels", "taps"),
    [
        (40, 3, 3500, 64, 64, 3),
        (40, 3, 3500, 64, 1, 3),
        (60, 1, 47000, 1, 1, 1),  # a plane of so many pixels
    ],
    ids=["matrix", "depthwise", "plane"],
)
def test_deform_conv2d(gigabytes, batch, side, channels, group_channels, taps):
    skip_without(gigabytes)
    input = normal(batch, side, side, channels).permute(0, 3, 1, 2).requires_grad_()
    assert input.numel() > MOST
    offset = offsets(batch, 2 * taps**2, side, side).requires_grad_()
    weight = (normal(channels, group_channels, taps, taps) / (3 * group_channels**0.5)).detach()
    weight.requires_grad_()
    output = deform_conv2d(input, offset, weight, padding=taps // 2)
    gradient = torch.zeros_like(output)
    last(gradient, CORNER).copy_(normal(1, channels, CORNER, CORNER))
    by_input, by_offset, by_weight = torch.autograd.grad(output, (input, offset, weight), gradient)

    cut = [exactly(last(tensor, CUT)) for tensor in (input, offset)] + [exactly(weight)]
    expected = deform_conv2d(*cut, padding=taps // 2, backend="reference")
    assert_close(last(output, CORNER), last(expected, CORNER))
    gradients = torch.autograd.grad(expected, cut, exactly(last(gradient, CUT)).detach())
    assert_close(last(by_input, CUT), gradients[0])
    assert_close(last(by_offset, CUT), gradients[1])
    assert_close(by_weight, gradients[2])
    # Nothing is anywhere else.
    last(by_input, CUT).zero_()
    assert not by_input.any()
    last(by_offset, CUT).zero_()
    assert not by_offset.any()
    del by_input, by_offset, gradient

    # The first image must not have been read or written in place of the last.
    first = [exactly(tensor[:1, :, :CUT, :CUT]) for tensor in (input, offset)]
    expected = deform_conv2d(*first, cut[2], padding=taps // 2, backend="reference")
    assert_close(output[:1, :, :CORNER, :CORNER], expected[:, :, :CORNER, :CORNER])


@pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
def test_roi_pooling(position_sensitive):
    skip_without(40)
    pool = deform_ps_roi_pool if position_sensitive else deform_roi_pool
    batch, channels, side, cut = 3, 16 * 49, 1000, 64
    input = normal(batch, side, side, channels).permute(0, 3, 1, 2).requires_grad_()
    assert input.numel() > MOST
    # Eight boxes within the last pixels of the last image, on quarters.
    corners = (torch.rand(8, 2) * 40).round() / 2 + 8
    sizes = (torch.rand(8, 2) * 80).round() / 4 + 1
    boxes = torch.cat([torch.zeros(8, 1), corners, corners + sizes], dim=1)
    moved = boxes + (side - cut)
    moved[:, 0] = batch - 1
    offset = (offsets(8, 2, 7, 7) / 2).requires_grad_()
    output = pool(input, moved.cuda(), offset, 7, sampling="aligned")
    gradient = normal(*output.shape)
    by_input, by_offset = torch.autograd.grad(output, (input, offset), gradient)

    leaves = exactly(last(input, cut)), exactly(offset)
    expected = pool(
        leaves[0], boxes.double(), leaves[1], 7, sampling="aligned", backend="reference"
    )
    assert_close(output, expected)
    gradients = torch.autograd.grad(expected, leaves, exactly(gradient).detach())
    assert_close(last(by_input, cut), gradients[0])
    assert_close(by_offset, gradients[1])
    last(by_input, cut).zero_()
    assert not by_input.any()
