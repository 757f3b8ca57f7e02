"""Test cases of mmcv, run on `deformnet.compat.mmcv`, with the numbers that mmcv expects."""

import pytest
import torch
from torch import Tensor, nn

from deformnet.compat import mmcv

# From tests/test_ops: test_deform_conv.py, test_modulated_deform_conv.py, test_deform_roi_pool.py.
INPUT = [[1, 2, 3], [0, 1, 2], [3, 5, 2]]
OFFSET_WEIGHT = [
    *([0.1, 0.4, 0.6, 0.1], [0.3, 0.2, 0.1, 0.3], [0.5, 0.5, 0.2, 0.8], [0.8, 0.3, 0.9, 0.1]),
    *([0.3, 0.1, 0.2, 0.5], [0.3, 0.7, 0.5, 0.3], [0.6, 0.2, 0.5, 0.3], [0.4, 0.1, 0.8, 0.4]),
]
OFFSET_BIAS = [0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7]
INPUT_GRADIENT = [[-0.666, 0.204, 0], [0.030, -0.416, 0.012], [0, 0.252, 0.129]]
OFFSET_BIAS_GRADIENT = [1.44, -0.72, 0, 0, -0.10, -0.08, -0.54, -0.54]


def equal(found: Tensor | None, numbers: object, tolerance: float = 1e-3) -> None:
    assert found is not None
    expected = torch.tensor(numbers, dtype=found.dtype).reshape(-1)
    torch.testing.assert_close(found.detach().reshape(-1), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-3), (torch.float32, 1e-2)])
def test_plain_convolution(dtype, tolerance):
    layer = mmcv.DeformConv2dPack(1, 1, 2, im2col_step=2).to(dtype)
    parameters = {
        "weight": [0.4, 0.2, 0.1, 0.9],
        "conv_offset.weight": OFFSET_WEIGHT,
        "conv_offset.bias": OFFSET_BIAS,
    }
    for name, parameter in layer.named_parameters():
        parameter.data = torch.tensor(parameters[name], dtype=dtype).reshape(parameter.shape)
    image = torch.tensor(INPUT, dtype=dtype).expand(10, 1, 3, 3).clone().requires_grad_()
    output = layer(image)
    output.sum().backward()
    equal(output[3], [1.65, 0, 0, 0], tolerance)
    equal(image.grad[3], INPUT_GRADIENT, tolerance)
    equal(layer.weight.grad / 10, [3.62, 0, 0.40, 0.18], tolerance)
    equal(layer.conv_offset.bias.grad / 10, OFFSET_BIAS_GRADIENT, tolerance)
    # Each offset convolution sees [[1, 2], [0, 1]] at the only position with a gradient.
    by_tap = torch.tensor(OFFSET_BIAS_GRADIENT)[:, None] * torch.tensor([1, 2, 0, 1])
    equal(layer.conv_offset.weight.grad / 10, by_tap.tolist(), tolerance)


def test_modulated_convolution():
    """Except for offset gradients: at -1, mmcv's derivative is 0, ours is that from the right."""
    layer = mmcv.ModulatedDeformConv2dPack(1, 1, (2, 2), padding=1, bias=False).double()
    nn.init.ones_(layer.weight)
    image = torch.tensor([[1.0, 2, 3]], dtype=torch.float64).expand(1, 1, 3, 3).clone()
    output = layer(image.requires_grad_())
    output.sum().backward()
    edge, inside = [0.5, 1.5, 2.5, 1.5], [1, 3, 5, 3]
    equal(output, [edge, inside, inside, edge])
    equal(image.grad, [[2, 2, 2]] * 3)
    equal(layer.weight.grad, [9, 9, 9, 9])
    masks = [10.5, 6, 7, 4], [6, 10.5, 4, 7], [7, 4, 10.5, 6], [4, 7, 6, 10.5]
    equal(layer.conv_offset.weight.grad[8:], masks)
    equal(layer.conv_offset.bias.grad[8:], [4.5] * 4)
    offsets = [-3, -1.5] * 4
    assert not torch.allclose(layer.conv_offset.bias.grad[:8], layer.weight.new_tensor(offsets))


ROI_CASES = {
    "one channel": (
        [[[1, 2], [3, 4]]],
        [[1, 1.25], [1.5, 1.75]],
        [[3.0625, 0.4375], [0.4375, 0.0625]],
    ),
    "two channels": (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
    ),
    "larger": (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        [[1.9375, 4.75], [7.5625, 10.375]],
        [
            [0.47265625, 0.4296875, 0.4296875, 0.04296875],
            *[[0.4296875, 0.390625, 0.390625, 0.0390625]] * 2,
            [0.04296875, 0.0390625, 0.0390625, 0.00390625],
        ],
    ),
}


@pytest.mark.parametrize("case", ROI_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roi_pooling(case, dtype):
    numbers, outputs, gradient = ROI_CASES[case]
    maps = torch.tensor([numbers], dtype=dtype, requires_grad=True)
    last = maps.shape[-1] - 1
    boxes = torch.tensor([[0, 0, 0, last, last]], dtype=dtype)
    pool = mmcv.DeformRoIPoolPack((2, 2), maps.shape[1], spatial_scale=1.0, sampling_ratio=2)
    output = pool.to(dtype)(maps, boxes)
    output.sum().backward()
    equal(output, outputs)
    equal(maps.grad, gradient)
