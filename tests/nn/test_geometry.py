"""Geometry and sizes as users set them: ints in place of pairs, NumPy numbers, later changes."""

import numpy as np
import pytest
import torch
from torch import nn

from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, deform_, parameter_groups

CHANGES = [
    {"stride": 1},
    {"stride": 2},
    {"stride": (1, 2)},
    {"stride": np.int64(2)},
    {"padding": 1},
    {"padding": (2, 0)},
    {"padding": "valid"},
    {"stride": 1, "padding": "same"},
    {"dilation": 1},
    {"dilation": 2},
    {"dilation": [2, 1]},
    {"kernel_size": 3},
]


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=3, padding=2, dilation=2))


def change(layer, attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["after conversion", "before conversion"])
@pytest.mark.parametrize("attributes", CHANGES, ids=str)
def test_changed_geometry_acts_as_in_conv2d(attributes, before, modulated):
    plain, model = convolution(), convolution()
    change(plain[0], attributes)
    if before:
        change(model[0], attributes)
    deform_(model, "0", modulated=modulated)
    if not before:
        change(model[0], attributes)
    x = torch.randn(2, 4, 13, 11)
    output = model(x)
    torch.testing.assert_close(output, plain(x), rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert model[0].conv_offset.weight.grad.any()


def test_changed_padding_of_another_mode_acts_as_in_conv2d():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    plain[0].padding = 2  # nn.Conv2d pads by 1 as before
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model[0] = plain[0]
    x = torch.randn(2, 4, 7, 8)
    expected = plain(x).detach()
    deform_(model, "0")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_numpy_integers_in_a_convolution():
    sizes = [np.int64(value) for value in (4, 6, 3, 2, 1, 1, 2)]
    layer = DeformConv2d(*sizes, offset_groups=np.int32(2), modulated=np.bool_(True))
    same = DeformConv2d(4, 6, 3, 2, 1, 1, 2, offset_groups=2, modulated=True)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(layer(x), same(x))
    assert repr(layer) == repr(same)


def test_a_convolution_built_with_numpy_integers_converts():
    model = nn.Sequential(nn.Conv2d(*(np.int64(value) for value in (4, 6, 3, 2, 1, 2))))
    x = torch.randn(1, 4, 9, 9)
    expected = nn.functional.conv2d(x, model[0].weight, model[0].bias, 2, 1, 2)
    assert deform_(model, "0", offset_groups=np.int64(2)) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", ["bins", "msra", "aligned"])
def test_numpy_numbers_in_pooling(sampling):
    x, boxes = torch.randn(1, 36, 9, 9), torch.tensor([[0, 3.0, 5, 90, 70]])
    numbers = {"gamma": np.float32(0.5), "samples_per_bin": np.int64(2), "sampling": sampling}
    sizes = np.int64(36), np.int64(3), np.float64(0.1)
    pool = DeformRoIPool2d(*sizes, beta=np.float32(0.5), **numbers)
    ps_pool = DeformPSRoIPool2d(*sizes, offset_groups=np.int8(2), **numbers)
    assert pool(x, boxes).shape == (1, 36, 3, 3)
    assert ps_pool(x, x, boxes).shape == (1, 4, 3, 3)
    assert type(pool.fc_offset.lr_scale) is float


def test_numpy_numbers_in_parameter_groups():
    model = DeformConv2d(3, 4, 3)
    numbers = {"offset_lr_scale": np.float64(0.1), "weight_decay": np.float32(0.5)}
    groups = parameter_groups(model, np.float64(0.25), **numbers)
    assert [group["lr"] for group in groups] == [0.25, 0.25, 0.025, 0.025]
    assert all(type(group[name]) is float for group in groups for name in ("lr", "weight_decay"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeformConv2d(4.0, 6, 3), "expected in_channels to be an int, but got 4.0"),
        (lambda: DeformConv2d(4, 6, 3.0), "expected kernel_size to be an int or a pair of ints"),
        (lambda: DeformConv2d(4, 6, 3, stride="1"), "expected stride to be an int or a pair"),
        (lambda: DeformConv2d(4, 6, 3, offset_groups=1.0), "expected offset_groups to be an int"),
        (lambda: DeformRoIPool2d(4, 7.0), "expected output_size to be an int or a pair of ints"),
        (lambda: DeformRoIPool2d(4, 7, "1"), "expected spatial_scale to be a number"),
        (lambda: DeformPSRoIPool2d(4, 7, gamma=None), "expected gamma to be a number"),
        (lambda: deform_(convolution(), "0", offset_groups=1.5), "expected offset_groups to be an"),
        (lambda: parameter_groups(nn.Linear(2, 2), "0.1"), "expected lr to be a number"),
    ],
)
def test_wrong_types(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    "layer", [DeformConv2d(4, 6, 3), DeformRoIPool2d(4, 7), DeformPSRoIPool2d(4, 7)], ids=repr
)
def test_script_says_what_to_use(layer):
    message = rf"{type(layer).__name__} does not support torch.jit.script; use torch.export"
    for module in (layer, nn.Sequential(nn.Identity(), layer)):
        with pytest.raises(NotImplementedError, match=message):
            torch.jit.script(module)


def test_trace_works():
    layer, x = DeformConv2d(4, 6, 3, modulated=True), torch.randn(1, 4, 7, 9)
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
def test_compiles_with_dynamic_shapes(modulated, batch):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, padding=1, modulated=modulated)
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    # With Inductor's layout optimization, PyTorch 2.14 fails at a second image size for a single
    # nn.Conv2d, too, as it takes the strides of saved tensors from the first one.
    options = {} if modulated else {"layout_optimization": False}
    compiled = torch.compile(layer, dynamic=True, options=options)
    for size in ((9, 11), (8, 6)):
        x = torch.randn(batch, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(call(x).square().sum(), [*layer.parameters()])
            for call in (compiled, layer)
        ]
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
