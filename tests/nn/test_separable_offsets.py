import pytest
import torch
from torch import nn

from deformnet import DeformConv2d, deform_, parameter_groups

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1, "groups": 8, "offset_groups": 2},
    {"kernel_size": (3, 5), "padding": (2, 4), "dilation": 2, "stride": (1, 2), "modulated": True},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


def build(**options):
    torch.manual_seed(0)
    return DeformConv2d(8, 8, **{"offset_conv": "separable", **options})


@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_offsets_are_those_of_the_dense_convolution_that_it_factorizes(arguments):
    layer, dense = (
        build(offset_conv=kind, **arguments).double() for kind in ("separable", "dense")
    )
    nn.init.normal_(layer.conv_offset.weight)
    nn.init.normal_(layer.conv_offset.bias)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.bias.copy_(layer.bias)
        dense.conv_offset.bias.copy_(layer.conv_offset.bias)
        product = layer.conv_offset.weight * layer.conv_offset.depthwise.weight[:, 0]
        dense.conv_offset.weight.copy_(product)
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    torch.testing.assert_close(layer.conv_offset(x), dense.conv_offset(x))
    torch.testing.assert_close(layer(x), dense(x))


def test_state_dict_keys_and_number_of_weights():
    taps, channels, groups = 9, 8, 2
    layer = build(kernel_size=3, groups=8, offset_groups=groups)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (8, 1, 3, 3),
        "bias": (8,),
        "conv_offset.weight": (2 * groups * taps, channels, 1, 1),
        "conv_offset.bias": (2 * groups * taps,),
        "conv_offset.depthwise.weight": (channels, 1, 3, 3),
    }
    weights = [p.numel() for p in layer.conv_offset.parameters() if p.ndim > 1]
    assert sum(weights) == (2 * groups + 1) * taps * channels
    assert "offset_conv=separable" in repr(layer)


def test_all_parameters_learn_from_zero_offsets():
    layer = build(kernel_size=3, padding=1, groups=8)
    groups = {group["name"]: group for group in parameter_groups(layer, 0.1, offset_lr_scale=0.5)}
    assert len(groups["offset weights"]["params"]) == 2
    assert groups["offset weights"]["lr"] == 0.05
    optimizer = torch.optim.SGD(parameter_groups(layer, 0.1), 0.1)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for _ in range(2):  # the depthwise weights have a gradient once the offsets are not zero
        optimizer.zero_grad()
        layer(torch.randn(2, 8, 6, 6)).square().sum().backward()
        optimizer.step()
    after = layer.state_dict()
    assert not any(torch.equal(after[key], value) for key, value in before.items())
    layer.reset_parameters()
    assert not layer.conv_offset.weight.any()
    assert layer.conv_offset.depthwise.weight.any()


def test_offsets_are_float32_under_autocast():
    layer = build(kernel_size=3, padding=1, groups=8)
    nn.init.normal_(layer.conv_offset.weight)
    x, seen = torch.randn(1, 8, 6, 6), []
    expected = layer.conv_offset(x)
    layer.conv_offset.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(seen[0], expected)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_changed_geometry():
    layer = build(kernel_size=3, padding=1)
    layer.stride, layer.dilation, layer.padding = 2, 3, (3, 3)
    assert layer.conv_offset(torch.randn(1, 8, 9, 9)).shape == (1, 18, 5, 5)
    assert layer(torch.randn(1, 8, 9, 9)).shape == (1, 8, 5, 5)


def test_conversion():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    assert deform_(model, "1", offset_conv="separable") == ["1"]
    torch.testing.assert_close(model(x), expected)
    assert deform_(model, "*", offset_conv="separable") == ["0"]
    assert model(x).shape == expected.shape


def test_mistakes():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"expected offset_conv to be one of .*, but got 'x'"):
        deform_(model, "0", offset_conv="x")
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match=r"expected offset_conv to be one of .*, but got 'x'"):
        DeformConv2d(4, 4, 3, offset_conv="x")
    deform_(model, "0")
    with pytest.raises(ValueError, match=r"already deformable with .* and offset_conv=dense"):
        deform_(model, "0", offset_conv="separable")
    other = build(kernel_size=3)
    with pytest.raises(RuntimeError, match=r"conv_offset\.depthwise\.weight"):
        other.load_state_dict(build(kernel_size=3, offset_conv="dense").state_dict())
