import pytest
import torch
from torch import nn

from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, deform_, parameter_groups
from deformnet.nn.offsets import OffsetLayer


class OffsetLinear(OffsetLayer, nn.Linear):
    """Stands for the layer of offsets of another operator."""


def model():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        shared,
        shared,
        DeformConv2d(8, 8, 3),
        nn.Flatten(),
        OffsetLinear(8, 98),
    )
    deform_(network, "2")
    network[0].weight.requires_grad_(False)
    return network


def test_no_parameter_is_lost_or_doubled():
    network = model()
    groups = parameter_groups(network, 0.1, weight_decay=1e-4)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    expected = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert set(ids) == expected
    assert id(network[0].weight) not in ids
    torch.optim.SGD(groups, momentum=0.9)


def test_rates_and_decay():
    network = model()
    groups = parameter_groups(network, 0.1, offset_lr_scale=0.01, weight_decay=5e-4)
    found = {
        id(parameter): (group["lr"], group["weight_decay"], group["name"])
        for group in groups
        for parameter in group["params"]
    }
    offsets = pytest.approx(0.001)
    assert found == {
        id(network[0].bias): (0.1, 0.0, "biases"),
        id(network[1].weight): (0.1, 0.0, "biases"),
        id(network[1].bias): (0.1, 0.0, "biases"),
        id(network[2].weight): (0.1, 5e-4, "weights"),
        id(network[2].bias): (0.1, 0.0, "biases"),
        id(network[2].conv_offset.weight): (offsets, 5e-4, "offset weights"),
        id(network[2].conv_offset.bias): (offsets, 0.0, "offset biases"),
        id(network[4].weight): (0.1, 5e-4, "weights"),
        id(network[4].bias): (0.1, 0.0, "biases"),
        id(network[4].conv_offset.weight): (offsets, 5e-4, "offset weights"),
        id(network[4].conv_offset.bias): (offsets, 0.0, "offset biases"),
        id(network[6].weight): (offsets, 5e-4, "offset weights"),
        id(network[6].bias): (offsets, 0.0, "offset biases"),
    }


def test_a_plain_model_has_no_group_of_offsets():
    names = [group["name"] for group in parameter_groups(nn.Conv2d(3, 8, 3), 0.1)]
    assert names == ["weights", "biases"]


def test_scale_zero_keeps_the_offsets():
    network = nn.Sequential(DeformConv2d(3, 4, 3))
    optimizer = torch.optim.SGD(parameter_groups(network, 0.1, offset_lr_scale=0))
    weight = network[0].weight.detach().clone()
    network(torch.randn(1, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert not network[0].conv_offset.weight.any()
    assert not torch.equal(network[0].weight, weight)


@pytest.mark.parametrize("argument", ["lr", "offset_lr_scale", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_wrong_numbers(argument, value):
    message = f"expected {argument} to be a number of at least 0, but got"
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Conv2d(3, 8, 3), **{"lr": 0.1, argument: value})


def test_layers_have_a_scale_of_their_own():
    network = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 1),
            DeformConv2d(4, 4, 3),
            DeformRoIPool2d(4, 2),
            DeformRoIPool2d(4, 2, beta=1),
            DeformPSRoIPool2d(4, 2),
            DeformRoIPool2d(4, 2, beta=0),
        ]
    )
    groups = parameter_groups(network, 0.1, offset_lr_scale=0.5, weight_decay=5e-4)
    found = {g["name"]: (g["lr"], g["weight_decay"], set(g["params"])) for g in groups}
    offsets = [network[1].conv_offset, network[3].fc_offset, network[4].conv_offset]
    assert found == {
        "weights": (0.1, 5e-4, {network[0].weight, network[1].weight}),
        "biases": (0.1, 0.0, {network[0].bias, network[1].bias}),
        "offset weights": (0.05, 5e-4, {layer.weight for layer in offsets}),
        "offset biases": (0.05, 0.0, {layer.bias for layer in offsets}),
        "offset weights x0.01": (pytest.approx(0.0005), 5e-4, {network[2].fc_offset.weight}),
        "offset biases x0.01": (pytest.approx(0.0005), 0.0, {network[2].fc_offset.bias}),
        "offset weights x0.0": (0.0, 5e-4, {network[5].fc_offset.weight}),
        "offset biases x0.0": (0.0, 0.0, {network[5].fc_offset.bias}),
    }


def test_scales_that_look_alike_are_told_apart():
    network = nn.ModuleList([DeformRoIPool2d(1, 1, beta=beta) for beta in (0.3, 0.1 + 0.2)])
    rates = [group["lr"] for group in parameter_groups(network, 1.0)]
    assert rates == [0.3, 0.3, 0.1 + 0.2, 0.1 + 0.2]
