"""`deform_` on layers of other libraries, written here as those compute, on torchvision's operator;
bounded offsets, offsets from another tensor, and weights of DCNv2."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from deformnet import DeformConv2d, deform_, parameter_groups
from deformnet.analysis import OffsetObserver, sampling_locations
from deformnet.nn.given_offsets import GivenOffsetsConv2d

X = torch.randn(2, 6, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class ModulatedDeformConv2dPack(nn.Module):
    """mmcv's layer; DCNv2's differs in names."""

    children_name, groups_name = "conv_offset", "deform_groups"

    def __init__(self, groups: int = 1, offset_groups: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels = 6, 8
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), (1, 1), 1, (1, 1)
        self.groups = groups
        setattr(self, self.groups_name, offset_groups)
        self.weight = nn.Parameter(torch.randn(8, 6 // groups, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        conv = nn.Conv2d(6, 27 * offset_groups, 3, padding=1)
        setattr(self, self.children_name, conv)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        own = getattr(self, self.children_name)(x if other is None else other)
        first, second, mask = own.chunk(3, dim=1)
        offset = torch.cat((first, second), 1)
        geometry = (self.stride, (1, 1), self.dilation)
        return torchvision.ops.deform_conv2d(
            x, offset, self.weight, self.bias, *geometry, mask.sigmoid()
        )


class DCN(ModulatedDeformConv2dPack):
    children_name, groups_name = "conv_offset_mask", "deformable_groups"

    def __init__(self, offset_groups: int = 1) -> None:
        super().__init__(1, offset_groups)
        del self.groups


class DeformConv2dPack(nn.Module):
    """mmcv's layer without masks, which has no bias."""

    def __init__(self, offset_groups: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 6, 8, 1
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        self.deform_groups = offset_groups
        self.weight = nn.Parameter(torch.randn(8, 6, 3, 3))
        self.conv_offset = nn.Conv2d(6, 18 * offset_groups, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.conv_offset(x)
        return torchvision.ops.deform_conv2d(x, offset, self.weight, padding=self.padding)


class DeformConv(nn.Module):
    """detectron2's layer, which is given its offsets and ends with a norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 6, 8, 1
        self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), 1, 1, 1
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6, 3, 3)), None
        self.norm, self.activation = nn.BatchNorm2d(8), torch.tanh

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        output = torchvision.ops.deform_conv2d(x, offset, self.weight, padding=(1, 1))
        return self.activation(self.norm(output))


class Given(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.predict = conv, nn.Conv2d(6, 18, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.predict(x))


PACKS = [
    (ModulatedDeformConv2dPack, (2, 3)),
    (ModulatedDeformConv2dPack, ()),
    (DeformConv2dPack, (2,)),
    (DCN, (2,)),
]


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(X)
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((output * seed).sum(), parameters)
    return output, {
        name.replace("conv_offset_mask", "conv_offset"): it
        for name, it in zip(names, found, strict=True)
    }


def assert_same(model: nn.Module, before: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(gradients(model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "arguments"), PACKS, ids=lambda it: getattr(it, "__name__", it))
def test_layers_that_predict_their_offsets(kind, arguments):
    torch.manual_seed(0)
    model = nn.Sequential(kind(*arguments)).double()
    before, parameters = gradients(model), {id(it) for it in model.parameters()}
    # Options are for plain convolutions. The offset convolution is not one of them.
    assert deform_(model, "0*", offset_groups=3) == ["0"]
    assert type(model[0]) is DeformConv2d
    assert_same(model, before)
    assert {id(it) for it in model.parameters()} == parameters
    names = {group["name"] for group in parameter_groups(model, 0.1)}
    assert {"offset weights", "offset biases"} <= names
    repr(model)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    for again in (model, copy.deepcopy(model)):
        assert deform_(again, "0*", offset_groups=3) == []


@pytest.mark.parametrize("kind", [lambda: torchvision.ops.DeformConv2d(6, 8, 3, 1, 1), DeformConv])
def test_layers_that_are_given_their_offsets(kind):
    torch.manual_seed(0)
    model = Given(kind()).double()
    before, keys = gradients(model), list(model.state_dict())
    assert deform_(model, "conv") == ["conv"]
    assert isinstance(model.conv, GivenOffsetsConv2d)
    assert_same(model, before)
    assert list(model.state_dict()) == keys
    assert deform_(model, "conv") == []
    with OffsetObserver(model) as observer:
        model(X).sum().backward()
    assert observer.health()[0].max_shift > 0


def test_plain_and_foreign_layers_together():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), DCN(), nn.Conv2d(8, 8, 1)).double()
    before = model(X)
    assert deform_(model, "*", modulated=True, max_offset=4) == ["0", "1", "2"]
    assert [it.mask_scale for it in model] == [2, 1, 2]
    assert [it.max_offset for it in model] == [4, None, 4]
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-10)


class DeformConv2d_(torchvision.ops.DeformConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


DeformConv2d_.__name__ = "DeformConv2d"


def test_what_is_not_taken_over():
    pack = DeformConv2dPack()
    pack.conv_offset = nn.Conv2d(6, 19, 3, padding=1)
    before = repr(model := nn.Sequential(nn.Conv2d(6, 6, 3), pack))
    with pytest.raises(ValueError, match=r"whose conv_offset is not an nn\.Conv2d of 18 or 27"):
        deform_(model, "*")
    assert repr(model) == before
    with pytest.raises(ValueError, match=r"matches no convolution, only '0' \(DeformConv2d\)"):
        deform_(nn.Sequential(DeformConv2d_(6, 8, 3)), "0")


def test_layers_within_a_layer_are_not_lost():
    """Copies of these layers may contain what follows them, which ours would not compute."""
    pack, given = DeformConv2dPack(), torchvision.ops.DeformConv2d(6, 8, 3)
    pack.bn, pack.act = nn.BatchNorm2d(8), nn.ReLU()
    given.act = nn.ReLU()
    for layer, others in ((pack, "bn, act"), (given, "act")):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=rf"that contains other layers \({others}\)"):
            deform_(model, "0")
        assert type(model[0]) is type(layer)


@pytest.mark.parametrize("modulated", [False, True])
def test_max_offset(modulated):
    torch.manual_seed(0)
    layer = DeformConv2d(6, 8, 3, padding=1, modulated=modulated, max_offset=1.5).double()
    plain = nn.functional.conv2d(X, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(X), plain, rtol=0, atol=1e-12)
    free = DeformConv2d(6, 8, 3, padding=1, modulated=modulated).double()
    free.load_state_dict(layer.state_dict())
    for it in (layer, free):  # the slope at zero is one
        it(X).square().sum().backward()
    bounded, unbounded = (it.conv_offset.weight.grad for it in (layer, free))
    torch.testing.assert_close(bounded, unbounded, rtol=1e-10, atol=1e-10)
    nn.init.normal_(layer.conv_offset.weight, std=100)
    predicted = layer.conv_offset(X)
    offset = layer.offsets_of(predicted)
    assert offset.shape[1] == 18
    assert offset.abs().max() <= 1.5 < predicted[:, :18].abs().max()
    assert torch.equal(layer.offsets_of(torch.full_like(predicted, 1e-9)), 1e-9 + 0 * offset)
    assert "max_offset=1.5" in repr(layer)
    # The analysis sees what the layer samples.
    with OffsetObserver(nn.Sequential(layer)) as observer:
        layer(X).sum().backward()
    assert 1 < observer.health()[0].max_shift <= 1.5 * 2**0.5 + 1e-6
    points = sampling_locations(nn.Sequential(layer), X, ["0"], (4, 3), stride=1).points
    assert (points - torch.tensor([4.0, 3.0])).abs().max() <= 2.5


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_wrong_bounds(value):
    with pytest.raises(ValueError, match="expected max_offset to be a positive number, or None"):
        DeformConv2d(6, 8, 3, max_offset=value)
    with pytest.raises(ValueError, match="expected mask_scale to be a positive number, but got"):
        DeformConv2d(6, 8, 3, modulated=True, mask_scale=value)
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    with pytest.raises(ValueError, match="expected max_offset"):
        deform_(model, "0", max_offset=value)


@pytest.mark.parametrize("offset_conv", ["dense", "separable"])
def test_offsets_from_another_tensor(offset_conv):
    torch.manual_seed(0)
    options = {"modulated": True, "offset_conv": offset_conv, "offset_in_channels": 4}
    layer = DeformConv2d(6, 8, 3, 2, padding=1, **options).double()
    nn.init.normal_(layer.conv_offset.weight)
    other = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    predicted = layer.conv_offset(other)
    offset, mask = predicted[:, :18], 2 * predicted[:, 18:].sigmoid()
    expected = torchvision.ops.deform_conv2d(
        X, offset, layer.weight, layer.bias, (2, 2), (1, 1), mask=mask
    )
    torch.testing.assert_close(layer(X, other), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(X[0], other[0]), expected[0], rtol=0, atol=1e-10)
    assert "offset_in_channels=4" in repr(layer)
    for wrong, text in ((None, "but got None"), (other[:1], "but got"), (X, "but got")):
        with pytest.raises(ValueError, match=f"expected offset_input to be .*{text}"):
            layer(X, wrong)


def test_offsets_from_the_input_by_default():
    layer = DeformConv2d(6, 8, 3).double()
    nn.init.normal_(layer.conv_offset.weight)
    assert torch.equal(layer(X, X), layer(X))


def test_weights_of_dcn_v2():
    torch.manual_seed(0)
    theirs = nn.Sequential(DCN(2)).double()
    state = theirs.state_dict()
    for scale in (1.0, 2.0):
        layer = DeformConv2d(
            6, 8, 3, padding=1, offset_groups=2, modulated=True, mask_scale=scale
        ).double()
        nn.Sequential(layer).load_state_dict(state)
        torch.testing.assert_close(layer(X), theirs(X), rtol=0, atol=1e-10)
    for normalize in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        normalized, own = copy.deepcopy(theirs), copy.deepcopy(layer)
        normalize(normalized[0])
        normalize(own)
        nn.Sequential(own).load_state_dict(normalized.state_dict())
        torch.testing.assert_close(own(X), theirs(X), rtol=0, atol=1e-10)
    assert torch.equal(state["0.weight"], theirs[0].weight)
    with pytest.raises(RuntimeError, match=r"conv_offset\.weight"):
        nn.Sequential(DeformConv2d(6, 8, 3)).load_state_dict(state)
