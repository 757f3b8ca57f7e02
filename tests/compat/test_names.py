"""The modules under other libraries' names: signatures, state-dict keys, and what they compute."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from deformnet import deform_, deform_roi_pool
from deformnet.analysis import OffsetObserver
from deformnet.compat import dcn_v2, mmcv
from deformnet.ops import deform_conv2d

X = torch.randn(2, 6, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0, 3.0, 5, 60, 70], [1, 0.4, 0, 33, 18]], dtype=torch.float64)


def shaken(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.double()


def theirs(layer: nn.Module, offset_conv: nn.Conv2d, *, modulated: bool, dilation=1) -> Tensor:
    """Their layer, in plain PyTorch: predict, split, sigmoid, convolve."""
    own = nn.functional.conv2d(X, offset_conv.weight, offset_conv.bias, 2, 1 + dilation, dilation)
    offset, mask = own, None
    if modulated:
        first, second, mask = own.chunk(3, dim=1)
        offset, mask = torch.cat((first, second), 1), mask.sigmoid()
    return deform_conv2d(X, offset, layer.weight, layer.bias, 2, 1 + dilation, dilation, mask)


def test_names():
    assert set(mmcv.__all__) == {
        *("deform_conv2d", "DeformConv2d", "DeformConv2dPack", "modulated_deform_conv2d"),
        *("ModulatedDeformConv2d", "ModulatedDeformConv2dPack", "deform_roi_pool"),
        *("DeformRoIPool", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"),
    }
    assert set(dcn_v2.__all__) == {
        *("DCN", "DCNv2", "dcn_v2_conv", "DCNPooling", "DCNv2Pooling", "dcn_v2_pooling")
    }


CONVOLUTION = "kernel_size stride padding dilation groups deform_groups bias"
POOLING = "spatial_scale pooled_size output_dim no_trans group_size part_size sample_per_part"
SIGNATURES = {
    mmcv.DeformConv2dPack: f"in_channels out_channels {CONVOLUTION} im2col_step",
    mmcv.ModulatedDeformConv2dPack: f"in_channels out_channels {CONVOLUTION}",
    mmcv.deform_conv2d: "input offset weight stride padding dilation groups deform_groups bias "
    "im2col_step",
    mmcv.modulated_deform_conv2d: "input offset mask weight bias stride padding dilation groups "
    "deform_groups",
    mmcv.deform_roi_pool: "input rois offset output_size spatial_scale sampling_ratio gamma",
    mmcv.DeformRoIPoolPack: "output_size output_channels deform_fc_channels spatial_scale "
    "sampling_ratio gamma",
    dcn_v2.DCN: "in_channels out_channels kernel_size stride padding dilation deformable_groups",
    dcn_v2.dcn_v2_conv: "input offset mask weight bias stride padding dilation deformable_groups",
    dcn_v2.dcn_v2_pooling: f"input rois offset {POOLING} trans_std",
    dcn_v2.DCNPooling: f"{POOLING} trans_std deform_fc_dim",
}


@pytest.mark.parametrize("name", SIGNATURES, ids=lambda it: it.__name__)
def test_signatures(name):
    assert list(inspect.signature(name).parameters) == SIGNATURES[name].split()


WITH_BIAS = ["weight", "bias"]
FC3 = [f"{i}.{name}" for i in (0, 2, 4) for name in WITH_BIAS]
KEYS = [
    (mmcv.DeformConv2d(6, 8, 3), ["weight"]),
    (mmcv.DeformConv2dPack(6, 8, 3), ["weight", "conv_offset.weight", "conv_offset.bias"]),
    (mmcv.ModulatedDeformConv2d(6, 8, 3, bias=False), ["weight"]),
    (
        mmcv.ModulatedDeformConv2dPack(6, 8, 3),
        [*WITH_BIAS, "conv_offset.weight", "conv_offset.bias"],
    ),
    (mmcv.DeformRoIPoolPack(7, 6, 16), [f"offset_fc.{key}" for key in FC3]),
    (
        mmcv.ModulatedDeformRoIPoolPack(7, 6, 16),
        [f"offset_fc.{key}" for key in FC3] + [f"mask_fc.{key}" for key in FC3[:4]],
    ),
    (dcn_v2.DCNv2(6, 8, 3, 1, 1), WITH_BIAS),
    (dcn_v2.DCN(6, 8, 3, 1, 1), [*WITH_BIAS, "conv_offset_mask.weight", "conv_offset_mask.bias"]),
    (
        dcn_v2.DCNPooling(1.0, 7, 6, False, deform_fc_dim=16),
        [f"offset_mask_fc.{key}" for key in FC3],
    ),
    (dcn_v2.DCNPooling(1.0, 7, 6, True), []),
]


@pytest.mark.parametrize(("layer", "keys"), KEYS, ids=lambda it: type(it).__name__)
def test_state_dict_keys_and_zero_offsets(layer, keys):
    assert list(layer.state_dict()) == keys
    last = [it for name, it in layer.named_parameters() if "offset" in name][-2:]
    assert not any(it.any() for it in last)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_layers_that_predict_their_offsets(groups, dilation):
    geometry = {"stride": 2, "padding": 1 + dilation, "dilation": dilation}
    plain = shaken(mmcv.DeformConv2dPack(6, 8, 3, groups=2, deform_groups=groups, **geometry))
    expected = theirs(plain, plain.conv_offset, modulated=False, dilation=dilation)
    torch.testing.assert_close(plain(X), expected, rtol=0, atol=1e-10)
    pack = shaken(mmcv.ModulatedDeformConv2dPack(6, 8, 3, deform_groups=groups, **geometry))
    dcn = shaken(dcn_v2.DCN(6, 8, 3, deformable_groups=groups, **geometry))
    for layer in (pack, dcn):
        expected = theirs(layer, layer.conv_offset, modulated=True, dilation=dilation)
        torch.testing.assert_close(layer(X), expected, rtol=0, atol=1e-10)
    # A new layer: half of the plain convolution.
    new = mmcv.ModulatedDeformConv2dPack(6, 8, 3, deform_groups=groups, **geometry).double()
    half = nn.functional.conv2d(X, new.weight, None, *geometry.values()) / 2
    torch.testing.assert_close(new(X), half, rtol=0, atol=1e-10)
    with OffsetObserver(nn.Sequential(dcn)) as observer:
        dcn(X).sum().backward()
    assert observer.health()[0].mean_shift > 0


def test_layers_that_are_given_their_offsets():
    offset, mask = torch.randn(2, 36, 9, 7).double(), torch.rand(2, 18, 9, 7).double()
    plain = mmcv.DeformConv2d(6, 8, 3, padding=1, deform_groups=2).double()
    expected = deform_conv2d(X, offset, plain.weight, padding=1)
    torch.testing.assert_close(plain(X, offset), expected, rtol=0, atol=0)
    for layer in (
        mmcv.ModulatedDeformConv2d(6, 8, 3, padding=1, deform_groups=2).double(),
        dcn_v2.DCNv2(6, 8, 3, 1, 1, deformable_groups=2).double(),
    ):
        expected = deform_conv2d(X, offset, layer.weight, layer.bias, padding=1, mask=mask)
        torch.testing.assert_close(layer(X, offset, mask), expected, rtol=0, atol=0)
        called = dcn_v2.dcn_v2_conv(X, offset, mask, layer.weight, layer.bias, 1, 1, 1, 2)
        torch.testing.assert_close(called, expected, rtol=0, atol=0)


def test_mmcv_computes_in_the_dtype_of_the_offset():
    x, offset, weight = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 3, 3), torch.randn(4, 2, 3, 3)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        output = mmcv.deform_conv2d(x, offset.to(dtype), weight, im2col_step=64)
        assert output.dtype == dtype
        arguments = (x.to(dtype), offset.to(dtype), weight.to(dtype))
        assert torch.equal(output, deform_conv2d(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        assert mmcv.deform_conv2d(x, offset, weight).dtype == torch.float32
        assert mmcv.DeformConv2dPack(2, 4, 3)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(2, 5), (1, 1), (5, 2)])
def test_inputs_smaller_than_the_kernel_are_as_if_padded(size):
    """mmcv pads input and offset at the end, and crops the output."""
    layer = mmcv.DeformConv2d(6, 8, 3, padding=1).double()
    x, offset = X[:, :, : size[0], : size[1]], torch.randn(2, 18, *size).double()
    more = (0, max(3 - size[1], 0), 0, max(3 - size[0], 0))
    padded = layer(nn.functional.pad(x, more), nn.functional.pad(offset, more))
    expected = padded[:, :, : size[0], : size[1]]
    torch.testing.assert_close(layer(x, offset), expected, rtol=0, atol=1e-12)


def test_derivative_at_minus_one_is_from_the_right():
    """Documented: mmcv and DCNv2 have 0 there."""
    layer = mmcv.DeformConv2d(1, 1, 1, padding=1).double()
    offset = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    output = layer(torch.ones(1, 1, 1, 1, dtype=torch.float64), offset)
    (gradient,) = torch.autograd.grad(output[0, 0, 0, 1], offset)
    assert gradient[0, 0, 0, 1] == layer.weight.item()  # y = -1, x = 0


def test_roi_pooling():
    offset = torch.randn(2, 2, 3, 3).double()
    aligned = mmcv.deform_roi_pool(X, BOXES, offset, 3, 1 / 8, 2, 0.2)
    expected = deform_roi_pool(
        X, BOXES, offset, 3, 1 / 8, 0.2, sampling="aligned", samples_per_bin=2
    )
    assert torch.equal(aligned, expected)
    assert torch.equal(mmcv.DeformRoIPool(3, 1 / 8, 2, 0.2)(X, BOXES, offset), expected)
    plain = deform_roi_pool(X, BOXES, None, 3, 1 / 8, sampling="aligned", samples_per_bin=0)
    assert torch.equal(mmcv.deform_roi_pool(X, BOXES, X.new_zeros(0), 3, 1 / 8), plain)
    assert torch.equal(mmcv.DeformRoIPoolPack(3, 6, 8, 1 / 8).double()(X, BOXES), plain)
    modulated = mmcv.ModulatedDeformRoIPoolPack(3, 6, 8, 1 / 8).double()
    torch.testing.assert_close(modulated(X, BOXES), plain / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group_size", [1, 3])
def test_pooling_of_dcn_v2(group_size):
    x = torch.randn(2, 4 * group_size**2, 9, 7, dtype=torch.float64)
    offset = torch.randn(2, 2, 3, 3).double()
    pooled = dcn_v2.dcn_v2_pooling(x, BOXES, offset, 1 / 8, 3, 4, False, group_size, None, 4, 0.1)
    from deformnet import deform_ps_roi_pool

    pool = deform_roi_pool if group_size == 1 else deform_ps_roi_pool
    assert torch.equal(pooled, pool(x, BOXES, offset, 3, 1 / 8, sampling="msra"))
    plain = dcn_v2.dcn_v2_pooling(x, BOXES, offset, 1 / 8, 3, 4, True, group_size)
    assert torch.equal(plain, pool(x, BOXES, None, 3, 1 / 8, sampling="msra"))
    if group_size == 1:
        new = dcn_v2.DCNPooling(1 / 8, 3, 4, False, trans_std=0.1, deform_fc_dim=8).double()
        torch.testing.assert_close(new(x, BOXES), plain / 2, rtol=0, atol=1e-12)
        assert torch.equal(dcn_v2.DCNPooling(1 / 8, 3, 4, True)(x, BOXES), plain)


def test_wrong_arguments():
    offset, weight = torch.zeros(2, 18, 9, 7).double(), torch.zeros(8, 6, 3, 3).double()
    with pytest.raises(ValueError, match="expected bias to be False"):
        mmcv.DeformConv2d(6, 8, 3, bias=True)
    with pytest.raises(ValueError, match=r"expected offset groups to be 1, .* but got 2"):
        mmcv.deform_conv2d(X, offset, weight, 1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="expected group_size to be 1 or pooled_size, 7"):
        dcn_v2.dcn_v2_pooling(X, BOXES, offset, 1.0, 7, 6, False, 3)
    with pytest.raises(ValueError, match=r"expected offset to be .*5, 5.* but got"):
        dcn_v2.dcn_v2_pooling(X, BOXES, offset, 1.0, 7, 6, False, 1, 5)


def test_pooling_without_boxes_has_gradients():
    """Of all weights: distributed training waits for each of them."""
    layers = (mmcv.ModulatedDeformRoIPoolPack(3, 6, 8), dcn_v2.DCNPooling(1.0, 3, 6, False))
    for layer in layers:
        layer.double()(X, BOXES[:0]).sum().backward()
        assert all(it.grad is not None and not it.grad.any() for it in layer.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        mmcv.DeformRoIPoolPack(3, 6, 8),
        mmcv.ModulatedDeformRoIPoolPack(3, 6, 8),
        dcn_v2.DCNPooling(1.0, 3, 6, False, deform_fc_dim=8),
    ],
    ids=lambda it: type(it).__name__,
)
def test_pooling_in_half_precision_stays_there(layer):
    low = copy.deepcopy(layer).bfloat16()
    output = low(X.bfloat16(), BOXES.float())
    assert output.dtype == torch.bfloat16
    expected = low.float()(X.bfloat16().float(), BOXES.float())
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)


def test_init_weights_of_mmcv():
    """That of the modulated layers reinitializes all weights."""
    for kind in (mmcv.ModulatedDeformConv2d, mmcv.ModulatedDeformConv2dPack):
        layer = shaken(kind(6, 8, 3))
        layer.init_weights()
        assert layer.weight.abs().max() <= 1 / 54**0.5
        assert layer.weight.any()
        assert not layer.bias.any()
    assert not layer.conv_offset.weight.any()


def test_conversion_skips_these_layers():
    """Whatever its options, as it takes over those of the libraries with their own."""
    layers = (mmcv.DeformConv2dPack, mmcv.ModulatedDeformConv2dPack)
    model = nn.Sequential(nn.Conv2d(6, 6, 3), *(kind(6, 6, 3) for kind in layers))
    model.append(dcn_v2.DCN(6, 6, 3, 1, 1))
    assert deform_(model, "*", offset_groups=2) == ["0"]


class Calls(nn.Module):
    """A model that passes its inputs to a layer."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return self.layer(*(first, second, third)[: self.inputs])


OFFSET, MASK = torch.randn(2, 18, 9, 7).double(), torch.rand(2, 9, 9, 7).double()
TRACED = [
    (mmcv.DeformConv2d(6, 8, 3, padding=1), (X, OFFSET)),
    (mmcv.ModulatedDeformConv2d(6, 8, 3, padding=1), (X, OFFSET, MASK)),
    (mmcv.DeformConv2dPack(6, 8, 3), (X,)),
    (dcn_v2.DCNv2(6, 8, 3, 1, 1), (X, OFFSET, MASK)),
    (dcn_v2.DCN(6, 8, 3, 1, 1), (X,)),
    (mmcv.DeformRoIPool(3), (X, BOXES)),
    (mmcv.ModulatedDeformRoIPoolPack(3, 6, 8), (X, BOXES)),
    (dcn_v2.DCNPooling(1.0, 3, 6, False, deform_fc_dim=8), (X, BOXES)),
]


@pytest.mark.parametrize(("layer", "inputs"), TRACED, ids=lambda it: type(it).__name__)
def test_fx_has_one_node_for_a_layer(layer, inputs):
    traced = torch.fx.symbolic_trace(Calls(shaken(layer), len(inputs)))
    assert [node.op for node in traced.graph.nodes if node.target == "layer"] == ["call_module"]
    every = (*inputs, *(X[:0] for _ in range(3 - len(inputs))))
    assert torch.equal(traced(*every), layer(*inputs))


class NamedCalls(nn.Module):
    """A model that passes its inputs to a layer by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = shaken(mmcv.DeformConv2d(6, 8, 3, padding=1))

    def forward(self, images: Tensor, offset: Tensor) -> Tensor:
        return self.layer(x=images, offset=offset)


def test_inputs_by_name():
    model = NamedCalls()
    expected = model.layer(X, OFFSET)
    assert torch.equal(model(X, OFFSET), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(X, OFFSET), expected)
