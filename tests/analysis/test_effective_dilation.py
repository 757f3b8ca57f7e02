"""Effective dilation, of filters and over a set of images."""

import dataclasses
import json
import math
from unittest.mock import Mock

import pytest
import torch
from networks import pair_of_networks, random_offsets, scaling_offsets, set_offsets
from torch import nn

from deformnet import DeformConv2d
from deformnet.analysis import (
    AnnotatedImage,
    LayerDilation,
    MeanStd,
    dilation_maps,
    dilation_statistics,
    effective_dilation,
    receptive_field,
)


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("kernel", [3, 5, (1, 3)])
def test_without_offsets_it_is_the_dilation(images, dilation, kernel):
    model = nn.Sequential(DeformConv2d(3, 4, kernel, 2, padding=6, dilation=dilation))
    found = effective_dilation(model, images)
    assert list(found) == ["0"]
    assert found["0"].shape[:2] == (2, 1)
    assert (found["0"] == dilation).all()


def test_a_filter_that_moves_as_a_whole_keeps_it(images):
    model = nn.Sequential(DeformConv2d(3, 4, 3, padding=2, dilation=2))
    set_offsets(model[0], torch.tensor([3.0, -1.5]).repeat(9))
    assert (effective_dilation(model, images)["0"] == 2).all()


@pytest.mark.parametrize("factor", [0.5, 1.25, 3])
def test_a_filter_that_is_stretched_has_more_of_it(images, factor):
    model = nn.Sequential(DeformConv2d(3, 4, 3, padding=2, dilation=2))
    set_offsets(model[0], scaling_offsets(3, 2, factor))
    assert (effective_dilation(model, images)["0"] == 2 * factor).all()


def test_every_pair_by_itself(images):
    model = random_offsets(nn.Sequential(DeformConv2d(3, 6, (3, 2), offset_groups=3)))
    found = effective_dilation(model, images)["0"]
    offset = model[0].conv_offset(images)
    assert found.shape == (2, 3, 22, 29)
    for group in range(3):
        places = {}
        for i in range(3):
            for j in range(2):
                y, x = offset[1, 2 * (group * 6 + i * 2 + j) :][:2, 7, 11].tolist()
                places[i, j] = (i + y, j + x)
        pairs = [
            math.dist(places[a], places[b])
            for a in places
            for b in places
            if (b[0] - a[0], b[1] - a[1]) in ((0, 1), (1, 0))
        ]
        assert len(pairs) == 7
        assert found[1, group, 7, 11].item() == pytest.approx(sum(pairs) / 7, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"offset_groups": 2}, {"modulated": True}])
def test_torchvision_layers_agree(images, options):
    ours, theirs = pair_of_networks(**options)
    torch.testing.assert_close(ours(images), theirs(images))
    expected, found = effective_dilation(ours, images), effective_dilation(theirs, images)
    assert list(found) == ["1.conv", "3.conv"]
    for mine, other in zip(expected.values(), found.values(), strict=True):
        torch.testing.assert_close(mine, other)


def annotated(count=4):
    """Images of different sizes and scales, with objects of all sizes, some overlapping."""
    generator = torch.Generator().manual_seed(4)
    for number in range(count):
        image = torch.rand(3, 70 + 9 * number, 101 - 6 * number, generator=generator)
        scale = 0.25 + 0.05 * number
        boxes = torch.tensor(
            [[0.0, 0, 250, 240], [10, 20, 80, 90], [150, 30, 300, 170], [160, 40, 240.5, 100]]
        )
        yield AnnotatedImage(image, boxes[: number + 1], scale)


def test_statistics_against_loops():
    model = pair_of_networks(offset_groups=2)[0]
    rows = dilation_statistics(model, annotated())
    assert [row.layer for row in rows] == ["1", "3"]
    for row, stride in zip(rows, (2, 4), strict=True):
        numbers = {"small": [], "medium": [], "large": [], "background": []}
        for image, boxes, scale in annotated():
            found = effective_dilation(model, image[None])[row.layer][0].mean(0)
            for i in range(found.shape[0]):
                for j in range(found.shape[1]):
                    y, x = ((stride * place + 0.5) / scale for place in (i, j))
                    areas = [
                        (x2 - x1) * (y2 - y1)
                        for x1, y1, x2, y2 in boxes.tolist()
                        if x1 <= x < x2 and y1 <= y < y2
                    ]
                    area = min(areas, default=None)
                    if area is None:
                        kind = "background"
                    else:
                        kind = "small" if area < 9216 else "large" if area > 50176 else "medium"
                    numbers[kind].append(found[i, j].item())
        for kind, values in numbers.items():
            spread, expected = getattr(row, kind), torch.tensor(values).double()
            assert spread.count == len(values) > 0
            assert spread.mean == pytest.approx(expected.mean().item(), rel=1e-6)
            assert spread.std == pytest.approx(expected.std(correction=0).item(), rel=1e-5)


def test_two_halves_make_the_whole():
    model, theirs = pair_of_networks()
    images = list(annotated())
    whole = dilation_statistics(model, iter(images))
    halves = [dilation_statistics(model, images[:1]), dilation_statistics(model, images[1:])]
    for row, first, second in zip(whole, *halves, strict=True):
        both = dataclasses.asdict(first + second)
        for kind, spread in dataclasses.asdict(row).items():
            assert both[kind] == ((kind == "layer" and spread) or pytest.approx(spread, rel=1e-9))
    for row, other in zip(whole, dilation_statistics(theirs, images), strict=True):
        assert row.large.mean == pytest.approx(other.large.mean, rel=1e-5)
        assert row.large.count == other.large.count
    with pytest.raises(ValueError, match="rows of one layer, but got '1' and '3'"):
        _ = whole[0] + whole[1]


def test_a_known_stride_and_a_call():
    model = pair_of_networks()[0]
    found = dilation_statistics(model, annotated())
    call = Mock(side_effect=model)
    assert dilation_statistics(model, annotated(), stride={"1": 2, "3": 4}, call=call) == found
    assert dilation_statistics(model, annotated(), ["3"], stride=4) == found[1:]
    assert [len(batch) for (batch,), _ in call.call_args_list] == [1] * 4


def test_what_there_is_none_of_is_none():
    model = nn.Sequential(DeformConv2d(3, 2, 3, padding=1))
    image = AnnotatedImage(torch.rand(3, 8, 8), torch.zeros(0, 4), 1.0)
    (row,) = dilation_statistics(model, [image])
    nothing = LayerDilation("0", *[MeanStd(0, None, None)] * 3, MeanStd(64, 1.0, 0.0))
    assert row == nothing
    assert json.loads(json.dumps(dataclasses.asdict(row)))["large"]["mean"] is None
    other = dataclasses.replace(nothing, background=MeanStd(64, 3.0, 0.0))
    assert row + other == dataclasses.replace(nothing, background=MeanStd(128, 2.0, 1.0))


def test_thresholds_and_the_smallest_box():
    """Areas of 96^2 and 224^2 are medium; where boxes overlap, the smallest counts."""
    model = nn.Sequential(DeformConv2d(3, 2, 1, 32), DeformConv2d(2, 2, 3, padding=1))
    image = torch.rand(3, 256, 256)
    for side, kind in ((96, "medium"), (95.9, "small"), (224, "medium"), (224.1, "large")):
        box = torch.tensor([[0.0, 0, side, side]])
        (row,) = dilation_statistics(model, [AnnotatedImage(image, box, 1.0)])
        assert getattr(row, kind).count == math.ceil((side - 0.5) / 32) ** 2
        assert getattr(row, kind).count + row.background.count == 64
    both = torch.tensor([[0.0, 0, 96, 64], [0, 0, 256, 256], [0, 0, 160, 96]])
    (row,) = dilation_statistics(model, [AnnotatedImage(image, both, 1.0)])
    assert (row.small.count, row.medium.count, row.large.count) == (6, 9, 49)
    # In original pixels: the same boxes on an image that was made twice as large.
    (row,) = dilation_statistics(model, [AnnotatedImage(image, both / 2, 2.0)])
    assert (row.small.count, row.medium.count, row.large.count) == (15, 49, 0)


def test_wrong_arguments(images):
    model = pair_of_networks()[0]
    named = nn.ModuleDict({"backbone_layer4": model})
    for message, *arguments in (
        ("DeformConv2d or torchvision's, but Conv2d has none", nn.Conv2d(3, 4, 3), None),
        ("but got 'backbone.layer4'; near misses: ", named, ["backbone.layer4"]),
        ("expected '0' to be a deformable convolution, but got a Conv2d", model, ["0"]),
        ("expected layers to be at least one name", model, []),
        ("to have more than one tap, but '0' has one", nn.Sequential(DeformConv2d(3, 2, 1)), None),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            effective_dilation(arguments[0], images, arguments[1])
    with pytest.raises(ValueError, match="expected '1' to run once, but it ran 2 times"):
        effective_dilation(model, images, ["1"], call=lambda x: (model(x), model(x)))
    image, boxes = images[0], torch.zeros(0, 4)
    for message, *bad in (
        (r"expected image to be \[3, H, W\], but got \[2, 3", images, boxes, 1.0),
        (r"expected boxes to be \[M, 4\], but got \[0, 3\]", image, boxes[:, :3], 1.0),
        ("expected scale to be a positive number, but got 0", image, boxes, 0.0),
    ):
        with pytest.raises(ValueError, match=message):
            dilation_statistics(model, [AnnotatedImage(*bad)])
    with pytest.raises(ValueError, match="expected stride to be at least 1 for each of 1, 3"):
        dilation_statistics(model, annotated(), stride={"1": 4})


def test_filters_of_one_run(images):
    model, theirs = pair_of_networks(offset_groups=2)
    call = Mock(side_effect=model)
    found = dilation_maps(model, images, call=call)
    call.assert_called_once()
    for name, dilation in effective_dilation(model, images).items():
        filters = found[name]
        assert torch.equal(filters.dilation, dilation)
        assert filters.layer_dilation == model[int(name)].dilation
        assert filters.field == receptive_field(model, images, name)
        for unit in [(0, 0), (2, 5)]:
            y, x = filters.field.center(unit)
            stride = filters.field.stride[0]
            assert filters.unit_at((y + 0.4 * stride, x - 0.4 * stride)) == unit
        assert filters.unit_at((-99, 999)) == (0, dilation.shape[3] - 1)
    offset = model[1].conv_offset(model[0](images)).unflatten(1, (2, 9, 2))
    expected = offset.square().sum(3).sqrt().mean(2)
    torch.testing.assert_close(found["1"].shift, expected)
    for ours, other in zip(found.values(), dilation_maps(theirs, images).values(), strict=True):
        torch.testing.assert_close(ours.shift, other.shift)
