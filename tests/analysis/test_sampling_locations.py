"""Sampling locations against cases computed by hand and by brute force."""

import math

import pytest
import torch
from networks import Foreign, pair_of_networks, random_offsets, set_offsets
from torch import nn

from deformnet import DeformConv2d
from deformnet.analysis import record_sampling, sampling_locations


def grid(center, dilation=1, reach=1):
    """The taps of a kernel of 2 * reach + 1 around a center: [K, 2]."""
    steps = range(-reach, reach + 1)
    return torch.tensor(
        [[center[0] + dilation * i, center[1] + dilation * j] for i in steps for j in steps],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("dilation", [1, 2])
def test_zero_offsets_give_the_regular_grid(images, dilation):
    model = nn.Sequential(DeformConv2d(3, 4, 3, padding=dilation, dilation=dilation))
    points, inside = sampling_locations(model, images, ["0"], (7, 9), stride=1)
    assert points.shape == (2, 9, 2)
    torch.testing.assert_close(points, grid((7, 9), dilation).expand(2, 9, 2))
    assert inside.all()


def test_a_plain_convolution_has_the_regular_grid(images):
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 5), stride=(2, 3), padding=(0, 1)))
    points, _ = sampling_locations(model, images, ["0"], (4, 2), stride=1)
    expected = [[8 + i, 5 + j] for i in range(3) for j in range(5)]
    torch.testing.assert_close(points[0], torch.tensor(expected, dtype=torch.float64))


MOVES = torch.arange(18).reshape(9, 2) / 7 - 1


@pytest.mark.parametrize(
    ("options", "offsets", "expected"),
    [
        ({}, MOVES, grid((7, 9)) + MOVES.double()),
        ({"modulated": True}, [1.5] * 18 + [9.0] * 9, grid((8.5, 10.5))),  # no offsets: the masks
        ({"offset_groups": 3}, [0.25] * 18 + [-2.0] * 36, [(7.25, 9.25), (5, 7), (5, 7)]),
    ],
)
def test_constant_offsets_move_each_tap(images, options, offsets, expected):
    model = nn.Sequential(DeformConv2d(3, 3, 3, padding=1, **options))
    set_offsets(model[0], offsets)
    points, _ = sampling_locations(model, images, ["0"], (7, 9), stride=1)
    if isinstance(expected, list):
        expected = torch.cat([grid(center) for center in expected])
    torch.testing.assert_close(points, expected.expand(2, -1, 2))


def test_strides_multiply_down_to_the_pixels(images):
    model = nn.Sequential(
        nn.MaxPool2d(2), DeformConv2d(3, 4, 3, 2, padding=1), nn.Conv2d(4, 5, 3, 2, padding=1)
    )
    set_offsets(model[1], [0.5, -0.25] * 9)
    points, _ = sampling_locations(model, images, ["2", "1"], (2, 3), stride=2)
    expected = [2 * (grid(2 * unit) + torch.tensor([0.5, -0.25])) for unit in grid((2 * 2, 2 * 3))]
    torch.testing.assert_close(points[0], torch.cat(expected))


def test_padding_by_name_and_none(images):
    for padding, top in (("valid", 0), ("same", 2)):
        model = nn.Sequential(DeformConv2d(3, 4, 5, padding=padding))
        points, _ = sampling_locations(model, images, ["0"], (5, 6), stride=1)
        assert points[0, 0].tolist() == [5 - top, 6 - top]


class Residual(nn.Module):
    """Two deformable layers with everything between them that a residual block has."""

    def __init__(self):
        super().__init__()
        self.lower = DeformConv2d(3, 3, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(3)
        self.upper = DeformConv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.upper(torch.relu(self.norm(self.lower(x))))


def random_residual():
    torch.manual_seed(1)
    model = Residual()
    for layer in (model.lower, model.upper):
        nn.init.normal_(layer.conv_offset.weight, std=0.4)
        nn.init.normal_(layer.conv_offset.bias, std=0.5)
    return model


def test_two_layers_by_brute_force(images):
    model = random_residual().eval()
    unit = (1, 28)  # near a corner, so that some samples leave the map
    points, inside = sampling_locations(model, images, ["upper", "lower"], unit, stride=3)

    with torch.no_grad():
        lower = model.lower.conv_offset(images).double()
        upper = model.upper.conv_offset(torch.relu(model.norm(model.lower(images)))).double()
    height, width = images.shape[2:]

    def is_inside(y, x):
        return -1 < y < height and -1 < x < width

    place = 0
    for n in range(2):
        place = 0
        for k, tap in enumerate(grid(unit).tolist()):
            y = tap[0] + upper[n, 2 * k, unit[0], unit[1]].item()
            x = tap[1] + upper[n, 2 * k + 1, unit[0], unit[1]].item()
            cy, cx = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            y0, x0 = min(math.floor(cy), height - 2), min(math.floor(cx), width - 2)
            for m, below in enumerate(grid((y, x), dilation=2).tolist()):
                move = torch.zeros(2, dtype=torch.float64)
                for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    share = (1 - abs(cy - y0 - i)) * (1 - abs(cx - x0 - j))
                    move += share * lower[n, 2 * m : 2 * m + 2, y0 + i, x0 + j]
                end = torch.tensor(below, dtype=torch.float64) + move
                torch.testing.assert_close(points[n, place], 3 * end, atol=1e-9, rtol=0)
                assert inside[n, place] == (is_inside(y, x) and is_inside(*end.tolist()))
                place += 1
    assert place == points.shape[1] == 81
    assert not inside.all()


def test_only_what_is_inside_reaches_the_unit():
    """A unit depends on the pixels around its points inside, and on no others."""
    model = nn.Sequential(
        DeformConv2d(1, 1, 3, padding=1, bias=False), DeformConv2d(1, 1, 3, padding=1, bias=False)
    ).double()
    generator = torch.Generator().manual_seed(2)
    for layer in model:
        nn.init.ones_(layer.weight)
        moves = 6 * torch.rand(18, generator=generator) - 3
        set_offsets(layer, moves.round() + 0.0)  # whole pixels: each point reads one pixel
    image = torch.rand(1, 1, 9, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    unit = (0, 8)
    points, inside = sampling_locations(model, image, ["1", "0"], unit, stride=1)
    model(image)[0, 0, unit[0], unit[1]].backward()
    reached = torch.zeros(9, 9, dtype=torch.float64)
    for y, x in points[0][inside[0]].long().tolist():
        reached[y, x] += 1
    assert torch.equal(image.grad[0, 0], reached)
    assert 0 < inside.sum() < 81


def test_the_model_is_left_as_it_was(images):
    model = random_residual().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampling_locations(model, images, ["upper", "lower"], (3, 3), stride=1)
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_offsets_of_nan_give_points_of_nan(images):
    model = random_residual()
    with torch.no_grad():
        model.upper.conv_offset.bias[0] = torch.nan
    points, inside = sampling_locations(model, images, ["upper", "lower"], (3, 3), stride=1)
    assert points[:, :9].isnan().any(-1).all()
    assert not inside[:, :9].any()
    assert points[:, 9:].isfinite().all()


@pytest.mark.parametrize(
    ("layers", "unit", "stride", "message"),
    [
        ([], (0, 0), 1, "expected layers to be at least one name"),
        (["upper", "under"], (0, 0), 1, "names of modules of the model, but got 'under'"),
        (["lower", "upper"], (0, 0), 1, "the first one last"),
        (["upper", "upper"], (0, 0), 1, "run once each"),
        (["upper", "lower"], (24, 0), 1, "24x30 units"),
        (["upper", "lower"], (math.nan, 0), 1, "24x30 units"),
        (["upper", "lower"], (0, 0), 0, "expected stride to be at least 1"),
        (["norm"], (0, 0), 1, "'norm' to be a convolution or pooling layer, but got a BatchNorm2d"),
        (["uper"], (0, 0), 1, "but got 'uper'; near misses: upper"),
    ],
)
def test_wrong_arguments(images, layers, unit, stride, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sampling_locations(random_residual(), images, layers, unit, stride=stride)


def test_missing_strided_layer_is_reported(images):
    model = nn.Sequential(DeformConv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), DeformConv2d(4, 4, 3))
    with pytest.raises(ValueError, match="the input of 2 is 12x15 and the output of 0 is 24x30"):
        sampling_locations(model, images, ["2", "0"], (0, 0), stride=1)


def frozen_offsets(model, *, whole):
    """Offsets of up to 3 pixels that the gradient takes for constants, on request whole ones."""

    def fix(layer, args, output):
        output = 3 * output.detach().tanh()
        return output.round() if whole else output

    for layer in model.modules():
        if isinstance(layer, DeformConv2d):
            layer.conv_offset.register_forward_hook(fix)
        if isinstance(layer, Foreign):
            layer.offset.register_forward_hook(fix)
    return model


def mixed_stack():
    """Deformable and plain layers and pooling, one channel each; and their names from the top."""
    torch.manual_seed(5)
    layers = random_offsets(
        nn.Sequential(
            DeformConv2d(1, 1, 3, padding=1, bias=False),
            nn.Conv2d(1, 1, (2, 3), 2, padding=(0, 2), dilation=(1, 2), bias=False),
            DeformConv2d(1, 1, 3, padding=2, dilation=2, bias=False),
            nn.AvgPool2d(2, 1),
        ).double()
    )
    for layer in layers[:3]:
        nn.init.ones_(layer.weight)
    layers[2] = Foreign(layers[2]).double()
    return layers, ["3", "2.conv", "1", "0"]


@pytest.mark.parametrize("unit", [(4, 5), (0, 0), (8, 2)])
def test_points_of_whole_pixels_are_the_gradient(unit):
    """Every point inside is one path from the unit to a pixel, and the gradient counts these."""
    model, names = mixed_stack()
    frozen_offsets(model, whole=True)
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(1, 1, 22, 26, generator=generator, dtype=torch.float64, requires_grad=True)
    points, inside = sampling_locations(model, image, names, unit)
    assert points.shape == (1, 4 * 9 * 6 * 9, 2)
    model(image)[0, 0, unit[0], unit[1]].backward()
    reached = torch.zeros(22, 26, dtype=torch.float64)
    for y, x in points[0][inside[0]].round().long().tolist():
        reached[y, x] += 1 / 4
    torch.testing.assert_close(image.grad[0, 0], reached)
    assert 0 < inside.sum() < inside.numel()
    # Whole units need no rounding.
    rounded, _ = sampling_locations(model, image, names, unit, between="rounded")
    torch.testing.assert_close(rounded, points)


@pytest.mark.parametrize("unit", [(4, 5), (0, 0), (9, 2)])
def test_three_layers_are_the_support_of_the_gradient(unit):
    """Between pixels the network reads the four around a point: so do the layers' own locations."""
    torch.manual_seed(7)
    layers = [
        DeformConv2d(2, 2, 3, padding=1),
        DeformConv2d(2, 2, 3, 2, padding=2, dilation=2, offset_groups=2),
        DeformConv2d(2, 1, 3, padding=1, modulated=True),
    ]
    model = random_offsets(nn.Sequential(*layers)).double()
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
    frozen_offsets(model, whole=False)
    generator = torch.Generator().manual_seed(8)
    image = torch.rand(1, 2, 21, 25, generator=generator, dtype=torch.float64, requires_grad=True)
    model(image)[0, 0, unit[0], unit[1]].backward()

    # All units that are read, layer by layer, from the locations of one layer at a time. (Groups
    # differ in their locations; a unit's channels are all read in the layer above.)
    sides = [layer_map.shape[2:] for layer_map in maps_of(model, image)]
    units = {unit}
    for name, (height, width) in zip(("2", "1", "0"), reversed(sides[:3]), strict=True):
        below = set()
        for place in units:
            points, inside = sampling_locations(model, image, [name], place, stride=1)
            for y, x in points[0][inside[0]].tolist():
                rows = {math.floor(y), math.ceil(y)} & set(range(height))
                below |= {(i, j) for i in rows for j in (math.floor(x), math.ceil(x))}
        units = {(i, j) for i, j in below if 0 <= j < width}
    seen = {tuple(place) for place in image.grad[0].abs().sum(0).nonzero().tolist()}
    assert units == seen
    assert 30 < len(seen) < image[0, 0].numel()


def maps_of(model, image):
    """What goes into each layer of a stack, and what comes out at last."""
    maps = [image]
    for layer in model:
        maps.append(layer(maps[-1]).detach())
    return maps


def one_tap(conv, tap):
    """Weights that take one tap of each kernel and nothing else."""
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.weight.flatten(1)[:, tap] = 1


def test_each_point_of_two_layers_is_the_middle_of_what_the_network_reads():
    """Of one path of taps: so the offsets between units are mixed as the network mixes values."""
    torch.manual_seed(9)
    model = nn.Sequential(
        DeformConv2d(1, 1, 3, padding=2, dilation=2, bias=False),
        DeformConv2d(1, 1, 3, padding=1, bias=False),
    )
    frozen_offsets(random_offsets(model, 0.7).double(), whole=False)
    generator = torch.Generator().manual_seed(10)
    image = torch.rand(1, 1, 31, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    # The offsets come from the weights of all layers below: they are fixed first.
    offsets = [layer.conv_offset(x) for layer, x in zip(model, maps_of(model, image), strict=False)]
    for layer, offset in zip(model, offsets, strict=True):
        layer.conv_offset.register_forward_hook(lambda *_, offset=offset: offset)
    points, inside = sampling_locations(model, image, ["1", "0"], (15, 16))
    assert inside.all()
    place = 0
    for top in range(9):
        for bottom in range(9):
            one_tap(model[1], top)
            one_tap(model[0], bottom)
            (read,) = torch.autograd.grad(model(image)[0, 0, 15, 16], image)
            assert float(read.sum()) == pytest.approx(1)
            middle = [
                float(read[0, 0].sum(1) @ torch.arange(31).double()),
                float(read[0, 0].sum(0) @ torch.arange(33).double()),
            ]
            assert points[0, place].tolist() == pytest.approx(middle, abs=1e-9)
            place += 1


@pytest.mark.parametrize("options", [{}, {"offset_groups": 2}, {"modulated": True}])
def test_torchvision_layers_agree(images, options):
    ours, theirs = pair_of_networks(**options)
    for between in ("bilinear", "rounded"):
        expected = sampling_locations(ours, images, ["3", "1", "0"], (2, 3), between=between)
        found = sampling_locations(
            theirs, images, ["3.conv", "1.conv", "0"], (2, 3), between=between
        )
        torch.testing.assert_close(found.points, expected.points, atol=1e-4, rtol=0)
        assert torch.equal(found.inside, expected.inside)


def test_the_authors_rounding(images):
    """Each sample goes on from the nearest unit below, as if the unit were asked by itself."""
    model = random_residual()
    points, inside = sampling_locations(
        model, images, ["upper", "lower"], (9, 11), stride=1, between="rounded"
    )
    top, top_inside = sampling_locations(model, images, ["upper"], (9, 11), stride=1)
    assert top_inside.all()
    for n in range(2):
        for k, (y, x) in enumerate(top[n].round().tolist()):
            below, reached = sampling_locations(model, images, ["lower"], (y, x), stride=1)
            torch.testing.assert_close(points[n, 9 * k : 9 * k + 9], below[n])
            assert torch.equal(inside[n, 9 * k : 9 * k + 9], reached[n])
    exact, _ = sampling_locations(model, images, ["upper", "lower"], (9, 11), stride=1)
    assert 0.1 < (points - exact).norm(dim=-1).mean() < 2


def test_cells_that_lie_elsewhere_are_found_there(images):
    """An even kernel's cells lie between pixels; without padding they begin farther inside."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 3, 3), DeformConv2d(3, 4, 3, padding=1))
    points, _ = sampling_locations(model, images, ["2"], (4, 5))
    expected = 2 * (grid((4, 5)) + 1) + 0.5
    torch.testing.assert_close(points[0], expected)
    # Down to the pixels, the mean point of every path is the same.
    all_points, _ = sampling_locations(model, images, ["2", "1", "0"], (4, 5))
    assert all_points.shape == (2, 9 * 9 * 4, 2)
    torch.testing.assert_close(all_points[0].mean(0), expected.mean(0))


def test_untraceable_stride(images):
    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DeformConv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(nn.functional.interpolate(x, size=(9, 9), mode="bilinear"))

    message = r"field, but it is unknown after aten.*upsample_bilinear2d"
    with pytest.raises(ValueError, match=message):
        sampling_locations(Resized(), images, ["conv"], (0, 0))
    points, _ = sampling_locations(Resized(), images, ["conv"], (0, 0), stride=2)
    torch.testing.assert_close(points[0], 2 * grid((1, 1)))


def test_unknown_interpolation(images):
    message = r"expected between to be one of \('bilinear', 'rounded'\), but got 'near'"
    with pytest.raises(ValueError, match=message):
        sampling_locations(random_residual(), images, ["upper"], (0, 0), between="near")


@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offsets_sample_as_plain_convolutions(images, groups):
    torch.manual_seed(0)
    first = DeformConv2d(3, 4, 3, stride=2, padding=2, dilation=2)
    model = nn.Sequential(first, DeformConv2d(4, 4, 3, padding=1, offset_groups=groups))
    random_offsets(model)
    stack = record_sampling(model, images, ["1", "0"])
    at_rest = stack.locations((4, 6), zero_offsets=True)
    assert at_rest.points.shape == stack.locations((4, 6)).points.shape
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1)
    )
    expected = record_sampling(plain, images, ["1", "0"]).locations((4, 6))
    assert at_rest.points.equal(expected.points.repeat(1, groups, 1))
    assert at_rest.inside.equal(expected.inside.repeat(1, groups))


def test_the_batch_is_what_the_layers_ran_on(images):
    """A call may look at an image in several ways, or at some of the images."""
    model = random_residual()
    stack, other = ["upper", "lower"], images[1:]
    # Offsets in float32 differ a little with the size of the batch.
    both, _ = sampling_locations(model, images, stack, (3, 4), stride=1)
    found, _ = sampling_locations(
        model, other, stack, (3, 4), stride=1, call=lambda x: model(torch.cat([images[:1], x]))
    )
    assert torch.allclose(found, both, atol=1e-5)
    found, _ = sampling_locations(model, images, stack, (3, 4), call=lambda x: model(x[:1]))
    assert torch.allclose(found, both[:1], atol=1e-5)
    single = nn.Sequential(model.lower)
    found, _ = sampling_locations(single, images[0], ["0"], (3, 4), stride=1)
    expected, _ = sampling_locations(single, images[:1], ["0"], (3, 4), stride=1)
    assert torch.allclose(found, expected, atol=1e-5)
    parts = nn.Sequential(model.upper, model.lower)
    with pytest.raises(ValueError, match="1 ran on 1 images and 0 on 2"):
        record_sampling(parts, images, ["1", "0"], call=lambda x: parts[1](parts[0](x)[:1]))


class PadsItself(nn.Conv2d):
    """As timm's Conv2dSame, in short."""

    def forward(self, input):
        return super().forward(nn.functional.pad(input, (0, 1, 1, 2)))


def test_layer_with_its_own_padding_is_refused(images):
    model = nn.Sequential(DeformConv2d(3, 4, 3, padding=1), PadsItself(4, 4, 3))
    with pytest.raises(ValueError, match="output of 1 is 25x29 for an input of 24x30"):
        sampling_locations(model, images, ["1", "0"], (9, 9))
    assert sampling_locations(model, images, ["0"], (9, 9)).inside.all()


@pytest.mark.parametrize("side", range(8, 14))
def test_sizes_of_maps(side):
    """All layers that keep to their own kernel, stride and padding are taken."""
    images = torch.rand(1, 4, side, side)
    for layer in (
        nn.Conv2d(4, 4, (2, 3), 2, padding=1, dilation=(2, 1)),
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.Conv2d(4, 4, 4, padding="valid"),
        DeformConv2d(4, 4, 2, padding="same"),
        DeformConv2d(4, 4, 3, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, 3, padding=1, ceil_mode=True),
    ):
        record_sampling(nn.Sequential(layer), images, ["0"])
