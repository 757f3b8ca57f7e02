import copy
from itertools import product

import pytest
import torch
from torch import nn

from deformnet import DeformPSRoIPool2d, DeformRoIPool2d, deform_
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool

SAMPLINGS = ["bins", "msra", "aligned"]
BOXES = torch.tensor(
    [[0, 3, 2, 40, 33], [1, 0, 0, 9, 60], [0, 11, 20, 25, 22], [1, 30, 8, 31, 9]],
    dtype=torch.float64,
)


def images(channels, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, channels, 9, 7, dtype=torch.float64)


def shake(layer, scale=0.3):
    """Give the layer offsets that matter."""
    torch.manual_seed(5)
    for name, parameter in layer.named_parameters():
        assert "offset" in name
        nn.init.normal_(parameter, std=scale)
    return layer


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_new_layer_is_plain_pooling(sampling):
    x = images(4)
    layer = DeformRoIPool2d(4, (3, 2), 0.125, sampling=sampling).double()
    plain = deform_roi_pool(x, BOXES, None, (3, 2), 0.125, sampling=sampling)
    assert plain.shape == (4, 4, 3, 2)
    torch.testing.assert_close(layer(x, BOXES), plain, rtol=0, atol=0)

    maps, features = images(5 * 6), images(4)
    ps_layer = DeformPSRoIPool2d(4, (3, 2), 0.125, offset_groups=5, sampling=sampling).double()
    plain = deform_ps_roi_pool(maps, BOXES, None, (3, 2), 0.125, sampling=sampling)
    assert plain.shape == (4, 5, 3, 2)
    torch.testing.assert_close(ps_layer(maps, features, BOXES), plain, rtol=0, atol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_offsets_come_from_what_is_pooled(sampling):
    x = images(4)
    layer = shake(
        DeformRoIPool2d(4, (3, 2), 0.125, gamma=0.2, sampling=sampling, samples_per_bin=3).double()
    )
    options = {"sampling": sampling, "samples_per_bin": 3}
    pooled = deform_roi_pool(x, BOXES, None, (3, 2), 0.125, **options)
    offset = torch.zeros(4, 2, 3, 2, dtype=torch.float64)
    weight, bias = layer.fc_offset.weight, layer.fc_offset.bias
    for r, axis, i, j in product(range(4), range(2), range(3), range(2)):
        row = (axis * 3 + i) * 2 + j
        offset[r, axis, i, j] = bias[row] + (weight[row] * pooled[r].flatten()).sum()
    torch.testing.assert_close(layer.offsets(x, BOXES), offset)
    expected = deform_roi_pool(x, BOXES, offset, (3, 2), 0.125, 0.2, **options)
    torch.testing.assert_close(layer(x, BOXES), expected)
    assert (expected - pooled).abs().max() > 0.1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_offsets_come_from_fields(sampling):
    maps, features = images(6 * 6), images(4, seed=1)
    layer = shake(
        DeformPSRoIPool2d(
            4, (3, 2), 0.125, offset_groups=2, gamma=0.2, sampling=sampling, samples_per_bin=3
        ).double()
    )
    options = {"sampling": sampling, "samples_per_bin": 3}
    fields = torch.einsum("oc,nchw->nohw", layer.conv_offset.weight[:, :, 0, 0], features)
    fields = fields + layer.conv_offset.bias[:, None, None]
    offset = deform_ps_roi_pool(fields, BOXES, None, (3, 2), 0.125, **options)
    assert offset.shape == (4, 4, 3, 2)
    torch.testing.assert_close(layer.offsets(features, BOXES), offset)
    expected = deform_ps_roi_pool(maps, BOXES, offset, (3, 2), 0.125, 0.2, **options)
    torch.testing.assert_close(layer(maps, features, BOXES), expected)


def test_order_of_the_fields():
    """Each bin's offset is the mean of its own field over its own cells."""
    features = images(3)[:, :, :4, :4]
    layer = shake(DeformPSRoIPool2d(3, 2, offset_groups=2).double())
    fields = layer.conv_offset(features)
    # From the first to the last pixel: 4 x 4 cells, 2 x 2 in each bin.
    box = torch.tensor([[1, 0, 0, 3, 3]], dtype=torch.float64)
    found = layer.offsets(features, box)
    for group, axis, i, j in product(range(2), repeat=4):
        field = fields[1, ((2 * group + axis) * 2 + i) * 2 + j]
        cells = field[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        torch.testing.assert_close(found[0, 2 * group + axis, i, j], cells.mean())


def test_x_comes_first_and_counts_in_widths_of_the_box():
    # A ramp along x: a shift of the bins shows as the shift itself.
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    box = [torch.tensor([[8.0, 8, 16, 12]])]
    layer = DeformRoIPool2d(1, 2, gamma=0.5, sampling="aligned")
    rest = layer(ramp, box)
    layer.fc_offset.bias.data[:4] = 0.25  # x
    layer.fc_offset.bias.data[4:] = 0.75  # y
    torch.testing.assert_close(layer(ramp, box) - rest, torch.full((1, 1, 2, 2), 0.5 * 0.25 * 8))
    columns = ramp.transpose(2, 3)
    torch.testing.assert_close(layer(columns, box).mean() - 9.5, torch.tensor(0.5 * 0.75 * 4))


def test_each_class_moves_its_own_bins():
    maps, features = images(4 * 4), images(3)
    layer = DeformPSRoIPool2d(3, 2, 0.125, offset_groups=4).double()
    rest = layer(maps, features, BOXES)
    layer.conv_offset.bias.data[2 * 8 : 3 * 8] = 1  # (x, y) of 2 x 2 bins in group 2
    moved = (layer(maps, features, BOXES) != rest).flatten(2).any(dim=2).any(dim=0)
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_gradients_reach_everything(sampling):
    x = images(3).requires_grad_()
    layer = DeformRoIPool2d(3, 2, 0.125, sampling=sampling).double()
    layer(x, BOXES).square().sum().backward()
    assert layer.fc_offset.weight.grad.any()
    assert layer.fc_offset.bias.grad.any()
    assert x.grad.any()

    maps, features = images(2 * 4).requires_grad_(), images(3).requires_grad_()
    ps_layer = shake(DeformPSRoIPool2d(3, 2, 0.125, sampling=sampling).double())
    ps_layer(maps, features, BOXES).square().sum().backward()
    for tensor in (ps_layer.conv_offset.weight, ps_layer.conv_offset.bias, maps, features):
        assert tensor.grad.any()


def test_gradients_are_right():
    # "aligned", whose samples are not at whole numbers, where the bilinear read has kinks.
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 1.2, 0.7, 4.1, 5.3]], dtype=torch.float64)
    layer = shake(DeformRoIPool2d(2, 2, sampling="aligned", samples_per_bin=2).double())
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, boxes), inputs, fast_mode=True)
    maps = torch.randn(1, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    ps_layer = shake(
        DeformPSRoIPool2d(2, 2, offset_groups=2, sampling="aligned", samples_per_bin=2).double()
    )
    inputs = (maps, x, *ps_layer.parameters())
    assert torch.autograd.gradcheck(lambda m, x, *_: ps_layer(m, x, boxes), inputs, fast_mode=True)


def test_a_list_of_boxes():
    x = images(3)
    boxes = [BOXES[BOXES[:, 0] == i, 1:] for i in range(2)]
    joined = torch.cat([BOXES[BOXES[:, 0] == i] for i in range(2)])
    layer = shake(DeformRoIPool2d(3, 2, 0.125).double())
    assert torch.equal(layer(x, boxes), layer(x, joined))
    ps_layer = shake(DeformPSRoIPool2d(3, 2, 0.125).double())
    maps = images(8)
    assert torch.equal(ps_layer(maps, x, boxes), ps_layer(maps, x, joined))


def test_no_boxes():
    x, none = images(4).float().requires_grad_(), torch.zeros(0, 5)
    layer, ps_layer = DeformRoIPool2d(4, 2), DeformPSRoIPool2d(4, 2)
    for output in (layer(x, none), ps_layer(x, x, none)):
        assert output.shape[0] == 0
        output.sum().backward()
    assert not x.grad.any()
    assert not layer.fc_offset.weight.grad.any()
    assert not ps_layer.conv_offset.weight.grad.any()


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_offsets_stay_in_float32(way):
    x, boxes = images(4).float(), BOXES.float()
    layer, ps_layer = shake(DeformRoIPool2d(4, 2, 0.125)), shake(DeformPSRoIPool2d(4, 2, 0.125))
    # Numbers that bfloat16 holds exactly, so that only the arithmetic differs.
    x = x.bfloat16().float()
    for parameter in (*layer.parameters(), *ps_layer.parameters()):
        parameter.data = parameter.data.bfloat16().float()
    ps_expected = ps_layer.offsets(x, boxes)
    if way == "weights":
        layer, ps_layer, x = layer.bfloat16(), ps_layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        offset, ps_offset = layer.offsets(x, boxes), ps_layer.offsets(x, boxes)
        output, ps_output = layer(x, boxes), ps_layer(x, x, boxes)
    assert offset.dtype == ps_offset.dtype == torch.float32
    torch.testing.assert_close(ps_offset, ps_expected, rtol=1e-5, atol=1e-5)
    assert output.dtype == ps_output.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_list", [False, True])
def test_boxes_in_half_precision(dtype, as_list):
    """The operators take them beside a half-precision input, and so do the layers."""
    x, boxes = images(4).to(dtype), BOXES[:1].to(dtype)
    if as_list:
        boxes = [boxes[:, 1:]]
    layer, ps_layer = shake(DeformRoIPool2d(4, 2, 0.125)), shake(DeformPSRoIPool2d(4, 2, 0.125))
    layer, ps_layer = layer.to(dtype), ps_layer.to(dtype)
    expected = ps_layer(x, x, BOXES[:1].float())
    assert layer(x, boxes).dtype == dtype
    assert torch.equal(ps_layer(x, x, boxes), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.isfinite(ps_layer(x, x, boxes)).all()


def test_state_dict_and_start():
    layer = DeformRoIPool2d(4, (3, 2))
    ps_layer = DeformPSRoIPool2d(4, (3, 2), offset_groups=5)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {"fc_offset.weight": (12, 24), "fc_offset.bias": (12,)}
    shapes = {key: tuple(value.shape) for key, value in ps_layer.state_dict().items()}
    assert shapes == {"conv_offset.weight": (60, 4, 1, 1), "conv_offset.bias": (60,)}
    assert not any(p.any() for p in (*layer.parameters(), *ps_layer.parameters()))
    assert layer.fc_offset.lr_scale == 0.01
    assert copy.deepcopy(DeformRoIPool2d(4, 2, beta=0.5)).fc_offset.lr_scale == 0.5
    assert ps_layer.conv_offset.lr_scale == 1


def test_conversion_leaves_the_layers_alone():
    model = nn.ModuleDict({"pool": DeformPSRoIPool2d(4, 2), "conv": nn.Conv2d(4, 4, 3)})
    assert deform_(model, "conv") == ["conv"]
    with pytest.raises(ValueError, match=r"'pool\*' matches no convolution"):
        deform_(model, "pool*")


def test_repr():
    assert "4, (7, 7), 0.0625, gamma=0.1, sampling='bins'" in repr(DeformRoIPool2d(4, 7, 1 / 16))
    assert "offset_groups=3" in repr(DeformPSRoIPool2d(4, 7, offset_groups=3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeformRoIPool2d(0, 7), "expected channels to be at least 1, but got 0"),
        (lambda: DeformRoIPool2d(4, 0), "expected output_size to be"),
        (lambda: DeformRoIPool2d(4, (7, 7, 7)), "expected output_size to be"),
        (lambda: DeformRoIPool2d(4, 7, beta=-1), "beta to be a number of at least 0, but got -1"),
        (lambda: DeformPSRoIPool2d(-1, 7), "expected in_channels to be at least 1, but got -1"),
        (lambda: DeformPSRoIPool2d(4, 7, offset_groups=0), "offset_groups to be at least 1, but"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_inputs():
    message = r"expected input to be \[N, 4, H, W\], but got \[2, 3, 9, 7\]"
    with pytest.raises(ValueError, match=message):
        DeformRoIPool2d(4, 7)(images(3), BOXES)
    message = r"expected features to be \[N, 4, H, W\], but got \[2, 3, 9, 7\]"
    with pytest.raises(ValueError, match=message):
        DeformPSRoIPool2d(4, 7)(images(49), images(3), BOXES)
    with pytest.raises(ValueError, match="offset"):  # three channels in two groups
        DeformPSRoIPool2d(4, 1, offset_groups=2).double()(images(3), images(4), BOXES)
