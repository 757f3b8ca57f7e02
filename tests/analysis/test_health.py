"""What is seen of offsets in a step of training."""

import math

import pytest
import torch
import torchvision
from networks import Foreign, pair_of_networks
from torch import nn

from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.analysis import LayerHealth, OffsetObserver


def health(model, *batches):
    with OffsetObserver(model) as observer:
        for batch in batches:
            model(batch).square().sum().backward()
    return observer.health()


def test_numbers_of_one_layer(images):
    model = nn.Sequential(DeformConv2d(3, 4, 3, 2, padding=1, offset_groups=3))
    offsets = torch.zeros(3, 9, 2)
    offsets[0] = torch.tensor([3.0, 4.0])  # a third of the samples is moved by 5
    offsets[1, 0] = torch.tensor([-40.0, 0.0])  # one of 27 is moved off the map
    with torch.no_grad():
        model[0].conv_offset.bias.copy_(offsets.flatten())
    (layer,) = health(model, images)
    assert layer.layer == "0"
    assert layer.mean_shift == pytest.approx(5 / 3 + 40 / 27)
    assert layer.max_shift == 40
    assert layer.map_size == 30
    rows, columns = torch.arange(0, 24, 2), torch.arange(0, 30, 2)

    def fraction_outside(offsets):
        inside = []
        for k, (dy, dx) in enumerate(offsets.reshape(27, 2).tolist()):
            y, x = rows + k % 9 // 3 - 1 + dy, columns + k % 3 - 1 + dx
            on = ((y > -1) & (y < 24)).float().mean() * ((x > -1) & (x < 30)).float().mean()
            inside.append(float(on))
        return 1 - sum(inside) / 27

    assert layer.outside == pytest.approx(fraction_outside(offsets), abs=1e-6)
    at_rest = fraction_outside(0 * offsets)
    assert layer.outside_without_offsets == pytest.approx(at_rest, abs=1e-6)
    made, own = model[0].conv_offset.weight.grad.norm(), model[0].weight.grad.norm()
    assert layer.gradient_ratio == pytest.approx(float(made / own))


@pytest.mark.parametrize("options", [{}, {"modulated": True}, {"offset_groups": 2}])
def test_torchvision_layers_agree(images, options):
    ours, theirs = pair_of_networks(**options)
    for mine, other in zip(health(ours, images), health(theirs, images), strict=True):
        assert other.layer == f"{mine.layer}.conv"
        for name in ("mean_shift", "max_shift", "outside", "outside_without_offsets", "map_size"):
            assert getattr(other, name) == pytest.approx(getattr(mine, name), rel=1e-3), name
        assert other.gradient_ratio == pytest.approx(mine.gradient_ratio, rel=1e-2)


def test_several_calls_are_taken_together(images):
    model = pair_of_networks()[0]
    small = images[:1, :, :12, :18]
    both = health(model, images, small)
    model.zero_grad()
    first = health(model, images)
    second = health(model, small)
    for layer, a, b in zip(both, first, second, strict=True):
        share = (12 * 18) / (12 * 18 + 2 * 24 * 30)
        mean = (1 - share) * a.mean_shift + share * b.mean_shift
        assert layer.mean_shift == pytest.approx(mean, rel=1e-2)  # sizes of maps are rounded up
        assert layer.max_shift == max(a.max_shift, b.max_shift)
        assert layer.map_size == a.map_size
        assert layer.gradient_ratio == pytest.approx(b.gradient_ratio)


def test_without_gradients_there_is_no_ratio(images):
    for model in pair_of_networks():
        with OffsetObserver(model) as observer, torch.no_grad():
            model(images)
        assert [layer.gradient_ratio for layer in observer.health()] == [None, None]
        assert not any(m._forward_hooks for m in model.modules())
        assert observer.health()[0].mean_shift > 0  # what was seen stays
        with observer:
            pass
        assert observer.health() == []


def test_a_frozen_offset_layer_has_no_ratio(images):
    layer = Foreign(DeformConv2d(4, 4, 3))
    layer.offset.weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    assert health(model, images)[0].gradient_ratio is None


@pytest.mark.parametrize("bias", [True, False])
def test_offsets_that_a_linear_layer_makes(images, bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 18, bias)
            self.conv = torchvision.ops.DeformConv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return self.conv(x, self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    model = Model()
    (layer,) = health(model, images)
    made, own = model.linear.weight.grad.norm(), model.conv.weight.grad.norm()
    assert layer.gradient_ratio == pytest.approx(float(made / own))


BOXES = torch.tensor([[0.0, 8, 4, 71, 35], [1, 100, 60, 131, 91]])
CENTERS = (0.25, 0.75)  # of two bins


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("position_sensitive", [False, True])
def test_bins_of_deformable_pooling(position_sensitive, listed):
    """Middles of bins count as samples; boxes of 64x32 and 32x32 pixels, cells of 4 pixels."""
    maps, features = torch.rand(2, 8, 24, 40), torch.rand(2, 5, 24, 40)
    expected = torch.tensor([[2.0, -1.0, 0.0, 0.0], [0.0, 3.0, -40.0, 0.0]])  # x, y, four bins each
    if position_sensitive:
        pool = DeformPSRoIPool2d(5, 2, 1 / 4, sampling="msra")
        inputs, maker = (maps, features), pool.conv_offset
    else:
        pool = DeformRoIPool2d(5, 2, 1 / 4, sampling="msra")
        inputs, maker = (features,), pool.fc_offset
    with torch.no_grad():
        maker.bias.copy_(expected.flatten())
    boxes = [BOXES[:1, 1:], BOXES[1:, 1:]] if listed else BOXES
    model = nn.ModuleDict({"pool": pool})
    with OffsetObserver(model) as observer:
        pool(*inputs, boxes).square().sum().backward()
    (layer,) = observer.health()
    assert not any(module._forward_hooks for module in model.modules())

    shifts, outside = [], 0
    for _, x1, y1, x2, y2 in BOXES.tolist():
        width, height = (x2 - x1 + 1) / 4, (y2 - y1 + 1) / 4
        for bin in range(4):
            dx, dy = (0.1 * expected[0, bin] * width), (0.1 * expected[1, bin] * height)
            shifts.append(math.hypot(dx, dy))
            x = x1 / 4 + CENTERS[bin % 2] * width + dx
            y = y1 / 4 + CENTERS[bin // 2] * height + dy
            outside += not (0 <= x <= 40 and 0 <= y <= 24)
    assert layer.layer == "pool"
    assert layer.mean_shift == pytest.approx(sum(shifts) / 8, rel=1e-5)
    assert layer.max_shift == pytest.approx(32, rel=1e-5)
    assert outside == 2
    assert (layer.outside, layer.outside_without_offsets) == (outside / 8, 0)
    assert (layer.gradient_ratio, layer.map_size) == (None, 40)
    assert layer.runaway() is None
    with torch.no_grad():
        maker.bias.mul_(2)
    with OffsetObserver(model) as observer:
        pool(*inputs, boxes)
    (layer,) = observer.health()
    assert "maximum offset of 64 pixels on a feature map of size 40" in layer.runaway()


@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), []])
def test_pooling_without_boxes(boxes):
    pool = DeformRoIPool2d(5, 2)
    with OffsetObserver(pool) as observer:
        pool(torch.rand(1, 5, 8, 8), boxes)
    (layer,) = observer.health()
    assert (layer.mean_shift, layer.max_shift, layer.outside) == (0, 0, 0)
    assert layer.runaway() is None


def test_boxes_as_the_layer_takes_them():
    pool, maps = DeformRoIPool2d(5, 2), torch.rand(2, 5, 8, 8)
    half = [torch.tensor([[0.0, 1, 5, 6]]).half()] * 2
    with OffsetObserver(pool) as observer:
        expected = pool(maps, [boxes.float() for boxes in half])
        assert torch.equal(pool(maps, half), expected)
    assert observer.health()[0].outside == 0
    with OffsetObserver(pool) as observer:
        for wrong in (torch.zeros(2, 6), [torch.zeros(3, 5)]):
            with pytest.raises(ValueError, match=r"expected boxes.* to have shape"):
                pool(maps, wrong)
    assert observer.health() == []


HEALTHY = LayerHealth("conv", 3.0, 20.0, 0.3, 0.1, 0.5, 30)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"mean_shift": 15.1}, "mean offset of 15.1 pixels on a feature map of size 30"),
        ({"max_shift": 30.5}, "maximum offset of 30.5 pixels on a feature map of size 30"),
        ({"outside": 0.56}, "56% of the samples outside the feature map, 10% without offsets"),
        ({"outside": 0.54}, None),
        ({"outside_without_offsets": 0.9, "outside": 0.94}, None),
        ({"mean_shift": math.nan}, "offset of nan pixels"),
        ({"max_shift": math.inf}, "offset of inf pixels"),
    ],
)
def test_runaway_conditions(changes, reason):
    found = LayerHealth(**{**HEALTHY.__dict__, **changes}).runaway()
    assert (found is None) if reason is None else reason in found


def test_offsets_that_are_not_finite(images):
    model = pair_of_networks()[0]
    nn.init.constant_(model[1].conv_offset.bias[3:4], torch.nan)
    layer = health(model, images)[0]
    assert layer.runaway() is not None
    assert math.isnan(layer.max_shift)


def test_a_model_without_deformable_layers():
    message = r"expected model to have a deformable layer, .* but Conv2d has none"
    with pytest.raises(ValueError, match=message):
        OffsetObserver(nn.Conv2d(3, 4, 3))


def test_a_batch_without_images(images):
    """Such as that of the boxes of an image in which nothing was found."""
    model = pair_of_networks()[0]
    for layer in health(model, images[:0]):
        assert (layer.mean_shift, layer.outside, layer.runaway()) == (0, 0, None)
    model.zero_grad()
    both = health(model, images[:0], images)
    model.zero_grad()
    assert both == health(model, images)


def test_a_model_that_was_compiled_before(images):
    """Its code calls no hooks that came after it."""
    model = pair_of_networks()[0]
    expected = health(model, images)
    model.zero_grad()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        compiled(images)
        found = health(compiled, images)
        assert [layer.layer for layer in found] == ["_orig_mod.1", "_orig_mod.3"]
        for one, other in zip(found, expected, strict=True):
            assert one.mean_shift == pytest.approx(other.mean_shift)
            assert one.gradient_ratio == pytest.approx(other.gradient_ratio, rel=1e-3)
        model.zero_grad()
