import copy
import pickle

import pytest
import torch
from torch import nn

from deformnet import DeformConv2d
from deformnet.ops import deform_conv2d

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 3},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": 1, "groups": 4, "offset_groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 8, "bias": False},
]


def shake(layer: DeformConv2d, scale: float = 0.2) -> DeformConv2d:
    """Give the layer offsets that matter."""
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=scale)
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"modulated": True}, {"modulated": True, "offset_conv": "separable"}], ids=str
)
@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_new_layer_equals_the_plain_convolution(arguments, options):
    torch.manual_seed(0)
    layer = DeformConv2d(8, 16, dtype=torch.float64, **arguments, **options)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    geometry = {name: value for name, value in arguments.items() if name != "offset_groups"}
    plain = nn.Conv2d(8, 16, dtype=torch.float64, **geometry)
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-10)


def test_state_dict_keys_and_shapes():
    layer = DeformConv2d(8, 16, 3, padding=1, offset_groups=4, modulated=True)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (16, 8, 3, 3),
        "bias": (16,),
        "conv_offset.weight": (108, 8, 3, 3),
        "conv_offset.bias": (108,),
    }
    without_bias = DeformConv2d(8, 16, 3, bias=False)
    assert list(without_bias.state_dict()) == ["weight", "conv_offset.weight", "conv_offset.bias"]


def test_conv_offset_is_dense_and_has_the_same_geometry():
    layer = DeformConv2d(8, 8, (3, 5), (2, 1), (2, 4), 2, groups=8, offset_groups=2)
    offsets = layer.conv_offset
    assert offsets.groups == 1
    assert offsets.out_channels == 2 * 2 * 15
    for name in ("kernel_size", "stride", "padding", "dilation"):
        assert getattr(offsets, name) == getattr(layer, name)


def test_offsets_come_first_and_the_mask_is_a_doubled_sigmoid():
    torch.manual_seed(0)
    layer = shake(DeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulated=True).double())
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    seen = []
    layer.conv_offset.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    result = layer(x)
    (raw,) = seen
    assert raw.shape == (2, 3 * 2 * 9, 6, 5)
    offset, mask = raw[:, :36], 2 / (1 + (-raw[:, 36:]).exp())
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask)
    torch.testing.assert_close(result, expected)


def test_padding_mode_extends_what_is_sampled():
    # A constant map, extended by copies of its border, is constant under offsets that stay within
    # the margin; extended by zeros it is not.
    x = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    outputs = {}
    for mode in ("replicate", "zeros"):
        layer = DeformConv2d(1, 1, 3, padding=1, bias=False, padding_mode=mode).double()
        nn.init.constant_(layer.weight, 1 / 9)
        layer.conv_offset.bias.data.view(9, 2)[4] = torch.tensor([0.7, -0.6]).double()
        outputs[mode] = layer(x)
    torch.testing.assert_close(outputs["replicate"], x)
    assert (outputs["zeros"] - x).abs().max() > 0.1


def test_an_image_without_batch_dimension():
    layer = shake(DeformConv2d(3, 4, 3, padding=1))
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_an_empty_batch():
    assert DeformConv2d(3, 4, 3, padding=1)(torch.empty(0, 3, 6, 5)).shape == (0, 4, 6, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_are_float32_under_autocast_and_with_half_weights(dtype):
    torch.manual_seed(0)
    layer = shake(DeformConv2d(4, 6, 3, padding=1, modulated=True))
    x = torch.randn(2, 4, 6, 5)
    exact = layer.conv_offset(x)
    seen = []
    layer.conv_offset.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=dtype):
        result = layer(x)
    assert result.dtype == dtype
    assert torch.equal(seen.pop(), exact)

    half = layer.to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    assert seen.pop().dtype == torch.float32


def test_gradients_reach_everything():
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulated=True)
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_reset_parameters_keeps_the_offsets_at_zero():
    torch.manual_seed(0)
    layer = shake(DeformConv2d(4, 6, 3))
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert all(not parameter.any() for parameter in layer.conv_offset.parameters())


def test_initial_weights_are_those_of_the_plain_layer():
    torch.manual_seed(7)
    layer = DeformConv2d(4, 6, 3)
    torch.manual_seed(7)
    plain = nn.Conv2d(4, 6, 3)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies(copied):
    torch.manual_seed(0)
    layer = shake(DeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulated=True))
    x = torch.randn(2, 4, 6, 5)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    assert other.conv_offset.weight is not layer.conv_offset.weight


def test_repr_tells_what_differs_from_a_convolution():
    assert "offset_groups" not in repr(DeformConv2d(4, 6, 3))
    text = repr(DeformConv2d(4, 6, 3, offset_groups=2, modulated=True))
    assert "offset_groups=2, modulated=True" in text


def test_compiles_in_one_graph_and_exports():
    torch.manual_seed(0)
    layer = shake(DeformConv2d(4, 6, 3, padding="same", modulated=True))
    x = torch.randn(2, 4, 6, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_a_meta_layer_computes_shapes():
    layer = DeformConv2d(4, 6, 3, stride=2, device="meta")
    assert layer(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 6, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"offset_groups": 3},
            r"expected offset_groups .* divisor of the 4 input channels, .* got 3",
        ),
        ({"offset_groups": 0}, r"expected offset_groups .* got 0"),
        ({"offset_groups": -1}, r"expected offset_groups .* got -1"),
        ({"padding_mode": "reflection"}, r"padding_mode.*reflection"),
        ({"padding": "full"}, r"padding.*full"),
        ({"padding": "same", "stride": 2}, r"padding='same'"),
        ({"groups": 3}, r"groups"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformConv2d(4, 6, 3, **arguments)


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (5, 6, 6), (4, 6), (1, 2, 4, 6, 6)])
def test_wrong_input(shape):
    with pytest.raises(ValueError, match=r"expected input to be \[N, 4, H, W\], but got"):
        DeformConv2d(4, 6, 3)(torch.randn(shape))
