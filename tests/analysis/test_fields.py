"""Receptive fields against arithmetic, against gradients, and plain against deformable."""

import pytest
import torch
from networks import pair_of_networks, scaling_offsets, set_offsets
from torch import nn

from deformnet import DeformConv2d, DeformRoIPool2d
from deformnet.analysis import ReceptiveField, effective_receptive_field, receptive_field
from deformnet.models.backbones import backbone


@pytest.fixture
def images():
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def test_a_chain():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, padding=3),
        nn.MaxPool2d(3, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 1)),
        nn.AvgPool2d(2),
    )
    images = torch.rand(1, 3, 64, 64)
    # 7; + 2*2; + 4*4 in height only; + 4.
    assert receptive_field(model, images, "0") == ReceptiveField((7, 7), (2, 2), (-3, -3))
    assert receptive_field(model, images, "1").size == (11, 11)
    field = receptive_field(model, images, "5")
    assert field == ReceptiveField((31, 15), (8, 8), (-13, -5))
    assert field.center((0, 0)) == (2, 2)
    assert field.center((3, 1.5)) == (26, 14)
    assert receptive_field(model, images, "") == field


class Branches(nn.Module):
    """A wide and a far branch, a shortcut and a join of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, padding="valid")
        self.wide = nn.Conv2d(4, 4, 5, padding="same")
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.cat([x + self.even(x), self.wide(x)], dim=1))


def test_branches_unite(images):
    model = Branches()
    assert receptive_field(model, images, "stem") == ReceptiveField((3, 3), (2, 2), (0, 0))
    assert receptive_field(model, images, "even") == ReceptiveField((5, 5), (2, 2), (0, 0))
    assert receptive_field(model, images, "wide") == ReceptiveField((11, 11), (2, 2), (-4, -4))
    assert receptive_field(model, images, "last") == ReceptiveField((11, 11), (2, 2), (-4, -4))


@pytest.mark.parametrize("which", [0, 1], ids=["deformnet", "torchvision"])
def test_it_is_the_support_of_the_gradient(which):
    """Of a network at rest, whose maxima and rectifiers let everything through."""
    model = pair_of_networks()[which].double()
    for layer in model.modules():
        name = "conv_offset" if isinstance(layer, DeformConv2d) else "offset"
        if (offset := getattr(layer, name, None)) is not None:
            nn.init.zeros_(offset.weight)
            nn.init.zeros_(offset.bias)
    model[2] = nn.Identity()
    image = torch.rand(1, 3, 60, 60, dtype=torch.float64)
    field = receptive_field(model, image, "3")
    assert field == ReceptiveField((15, 15), (4, 4), (-7, -7))
    found = effective_receptive_field(model, image, "3", (7, 6))
    rows, columns = found.gradient.nonzero().T
    assert (rows.min(), rows.max()) == (28 - 7, 28 + 7)
    assert (columns.min(), columns.max()) == (24 - 7, 24 + 7)
    assert found.fraction_inside == 1
    assert found.side <= 15


def test_a_resnet():
    """The table that everyone knows: 435 pixels for a ResNet-18 of stride 32."""
    model = backbone("resnet18", output_stride=32, deform_layers=3, reduce_channels=None)
    field = receptive_field(model, torch.rand(1, 3, 64, 64), "layer4")
    assert field == ReceptiveField((435, 435), (32, 32), (-217, -217))


def test_the_square_and_the_share():
    """Of box filters, whose gradient is known: the same everywhere in a square."""
    model = nn.Sequential(nn.Conv2d(1, 1, 9, padding=4), DeformConv2d(1, 1, 3, padding=1))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].weight[0, 0, 1, 1] = 1
    image = torch.rand(2, 1, 40, 40)
    found = effective_receptive_field(model, image, "1", (20, 19))
    assert found.gradient.shape == (40, 40)
    assert found.gradient.sum() == pytest.approx(81)
    assert found.gradient[16:25, 15:24].min() == 1
    assert found.side == 9  # 7 x 7 hold no more than 60 %
    assert found.fraction_inside == 1

    # The middle tap, 20 pixels to the right, is out of the plain field.
    set_offsets(model[1], [0.0] * 9 + [12] + [0] * 8)
    moved = effective_receptive_field(model, image, "1", (20, 15))
    assert moved.gradient[16:25, 23:32].min() == 1
    assert moved.side == 2 * 16 + 1
    assert moved.fraction_inside == 0


def test_stretched_filters_look_farther(images):
    plain = nn.Sequential(*(DeformConv2d(3, 3, 3, padding=1) for _ in range(3)))
    torch.manual_seed(0)
    for layer in plain:
        nn.init.uniform_(layer.weight)
    narrow = effective_receptive_field(plain, images, "2", (24, 20))
    for layer in plain:
        set_offsets(layer, scaling_offsets(3, 1, 3))
    wide = effective_receptive_field(plain, images, "2", (24, 20))
    assert narrow.side <= 7 < 13 <= wide.side <= 19
    assert wide.fraction_inside < narrow.fraction_inside == 1


def test_the_model_is_left_as_it_was(images):
    model = pair_of_networks()[0].train()
    effective_receptive_field(model, images, "3", (3, 3), call=lambda x: model(x) * 2)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not images.requires_grad
    with torch.no_grad():
        effective_receptive_field(model, images, "3", (3, 3))


class Mixing(nn.Module):
    """What looks everywhere."""

    def __init__(self, operation):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.operation = operation

    def forward(self, x):
        x = self.conv(x)
        return x * self.operation(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.flip(3),
        lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x),
        lambda x: nn.functional.interpolate(x[..., ::2, ::2], scale_factor=2),
        lambda x: nn.functional.grid_sample(x, torch.rand(2, 48, 40, 2), align_corners=False),
        lambda x: torch.fft.fft2(x).real,
    ],
)
def test_unknown_receptive_fields(images, operation):
    model = Mixing(operation)
    assert receptive_field(model, images, "conv").size == (3, 3)
    with pytest.raises(ValueError, match="receptive field, but it is unknown after aten"):
        receptive_field(model, images, "")


def test_as_many_bins_as_pixels():
    head = nn.ModuleDict({"pool": DeformRoIPool2d(3, 7)})
    boxes = torch.tensor([[0.0, 1, 1, 5, 5]])
    with pytest.raises(ValueError, match=r"unknown after deformnet\.roi_pool"):
        receptive_field(head, torch.rand(1, 3, 7, 7), "pool", call=lambda x: head["pool"](x, boxes))


def test_wrong_arguments(images):
    model = pair_of_networks()[0]
    with pytest.raises(ValueError, match=r"names of modules of the model, but got '3\.cnv'"):
        receptive_field(model, images, "3.cnv")
    with pytest.raises(ValueError, match="expected '3' to run once, but it ran 2 times"):
        receptive_field(model, images, "3", call=lambda x: (model(x), model(x)))
    with pytest.raises(ValueError, match="after a tensor that does not depend on the image"):
        receptive_field(model, images, "3", call=lambda x: model(torch.zeros(1, 3, 9, 9)))
    with pytest.raises(ValueError, match=r"one of the 12x10 units, but got \(12, 0\)"):
        effective_receptive_field(model, images, "3", (12, 0))
    nn.init.zeros_(model[3].weight)
    with pytest.raises(ValueError, match=r"in the image, but unit \(1, 2\) of '3' has none"):
        effective_receptive_field(model, images, "3", (1, 2))


class Written(nn.Module):
    """A wide branch that is written into channels of a narrow one."""

    def __init__(self, write):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 7, padding=3)
        self.write = write

    def forward(self, x):
        y = self.narrow(x)
        self.write(y, self.wide(x))
        return y.relu_()


def write_whole(y, wide):
    y[:, :1] = wide[:, :1]


def write_view_of_view(y, wide):
    y.split((1, 2), dim=1)[1][0].add_(wide[0, 1:])


def write_every_other(y, wide):
    y[..., ::2, ::2] += wide[..., ::2, ::2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_into_a_part_counts(images, mode):
    with mode():
        for write in (write_whole, write_view_of_view):
            assert receptive_field(Written(write), images, "").size == (7, 7)
        with pytest.raises(ValueError, match=r"unknown after aten\.slice"):
            receptive_field(Written(write_every_other), images, "")


def test_in_inference_mode():
    """Where PyTorch does not take operations apart by itself, in the run or around it."""
    image = torch.rand(1, 3, 48, 40)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.MaxPool2d(3, 1, padding=1),
        nn.Conv2d(4, 4, 3, 2, padding=1),
        DeformConv2d(4, 4, 3, padding=1),
    )
    expected = ReceptiveField((11, 11), (2, 2), (-5, -5))
    assert receptive_field(model, image, "3") == expected
    assert receptive_field(model, image, "3", call=torch.inference_mode()(model)) == expected
    with torch.inference_mode():
        assert receptive_field(model, image, "3") == expected
