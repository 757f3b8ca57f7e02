"""Sizes of more than 2**31 numbers, as tensors without data: on the device meta and as FakeTensors.

`test_cuda_large_sizes.py` computes with such sizes.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

# More than these cannot be counted in 32 bits.
MOST = 2**31 - 1
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


@pytest.fixture(params=["meta", "fake"])
def make(request):
    """Makes tensors without data that require a gradient."""
    device = "meta" if request.param == "meta" else "cpu"

    def empty(*shape: int, memory_format=torch.contiguous_format) -> torch.Tensor:
        tensor = torch.empty(
            shape, dtype=torch.bfloat16, device=device, memory_format=memory_format
        )
        return tensor.requires_grad_()

    with contextlib.nullcontext() if request.param == "meta" else FakeTensorMode():
        yield empty


def assert_like(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    # Not the strides themselves, which mean nothing along an axis of one.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        alike = found.is_contiguous(memory_format=memory_format)
        assert alike == expected.is_contiguous(memory_format=memory_format)
    assert found.dtype == expected.dtype
    assert found.device == expected.device


def check(output: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    assert_like(output, expected)
    gradients = torch.autograd.grad(output, leaves, expected)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_like(gradient, leaf)


@FORMATS
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "out_channels", "taps", "offset_groups"),
    [
        (3, 256, 2048, 2048, 256, 3, 4),  # map, offsets and output
        (1, 1, 50000, 50000, 1, 1, 1),  # one plane
        (1, 4, 1, MOST + 7, 4, 1, 1),  # one row
        (MOST + 7, 1, 1, 1, 1, 1, 1),  # the batch
    ],
)
def test_deform_conv2d(
    make, memory_format, batch, channels, height, width, out_channels, taps, offset_groups
):
    input = make(batch, channels, height, width, memory_format=memory_format)
    offset = make(batch, 2 * offset_groups * taps**2, height, width)
    mask = make(batch, offset_groups * taps**2, height, width)
    weight, bias = make(out_channels, channels, taps, taps), make(out_channels)
    output = deform_conv2d(input, offset, weight, bias, 1, taps // 2, 1, mask)
    assert output.numel() > MOST
    expected = make(batch, out_channels, height, width, memory_format=memory_format)
    check(output, expected, input, offset, weight, bias, mask)


@FORMATS
@pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "count"),
    [
        (3, 21, 6000, 7000, 1000),  # the map
        (1, 400, 38, 63, 200_000),  # the output
        (1, 1, 50000, 50000, 10),  # one plane
    ],
)
def test_roi_pooling(
    make, memory_format, position_sensitive, batch, channels, height, width, count
):
    planes = 49 if position_sensitive else 1
    input = make(batch, channels * planes, height, width, memory_format=memory_format)
    boxes, offset = make(count, 5).detach(), make(count, 2, 7, 7)
    pool = deform_ps_roi_pool if position_sensitive else deform_roi_pool
    output = pool(input, boxes, offset, 7, 1 / 16)
    assert max(input.numel(), output.numel()) > MOST
    check(output, make(count, channels, 7, 7), input, offset)
