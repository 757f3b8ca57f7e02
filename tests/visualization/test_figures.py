"""Figures draw what they are given."""

import dataclasses
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image

from deformnet import DeformConv2d, DeformRoIPool2d, deform_
from deformnet.analysis import (
    AnnotatedImage,
    EffectiveField,
    LayerDilation,
    MeanStd,
    SamplingLocations,
    bin_locations,
    dilation_statistics,
    effective_receptive_field,
    record_sampling,
)
from deformnet.visualization import (
    DetectionBins,
    ReceptiveFieldMap,
    SampledUnit,
    bins_figure,
    canvas,
    contact_sheet_figure,
    dilation_cell,
    dilation_figure,
    dilation_table,
    draw_sampled_unit,
    receptive_field_figure,
    sampling_figure,
    save_figure,
    two_layer_figure,
)

HEIGHT, WIDTH = 40, 60


def an_image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)


def sampled_unit(title="car", levels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for depth in range(1, levels + 1):
        points = torch.rand(9**depth, 2, dtype=torch.float64, generator=generator) * 50 - 5
        samples.append(SamplingLocations(points, points[:, 0] > 0))
    return SampledUnit(an_image(), title, (12.5, 30.0), samples)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def clouds(axes):
    """The points of each scatter, as (y, x)."""
    found = [drawn for drawn in axes.collections if isinstance(drawn, PathCollection)]
    return [np.asarray(drawn.get_offsets())[:, ::-1] for drawn in found]


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_sampled_unit_is_drawn_at_its_place():
    axes = Figure().subplots()
    unit = sampled_unit()
    draw_sampled_unit(axes, unit)
    for drawn, (points, _) in zip(clouds(axes), reversed(unit.levels), strict=True):
        np.testing.assert_array_equal(drawn, points)
    (marker,) = axes.lines
    assert (marker.get_ydata()[0], marker.get_xdata()[0]) == unit.center
    # Pixel (0, 0) of the image is centered on (0, 0), as the points are.
    assert axes.images[0].get_extent() == [-0.5, WIDTH - 0.5, HEIGHT - 0.5, -0.5]


def test_samples_outside_the_map_are_faint():
    axes = Figure().subplots()
    unit = sampled_unit(levels=2)
    draw_sampled_unit(axes, unit)
    opacity = axes.collections[0].get_facecolors()[:, 3]
    np.testing.assert_array_equal(opacity == 1, unit.levels[1].inside)
    assert 0 < opacity.min() < 0.5


def test_sampling_figure_has_a_row_per_network_and_triplets():
    units = [
        sampled_unit(title) for title in ("background", "a cat", "a bus", "sky", "a dog", "a cow")
    ]
    figure = sampling_figure({"baseline": units, "deformable": units})
    axes = np.array(panels(figure)).reshape(4, 3)
    assert [[one.get_title() for one in row] for row in axes] == [
        ["background", "a cat", "a bus"],
        ["", "", ""],
        ["sky", "a dog", "a cow"],
        ["", "", ""],
    ]
    assert [one.get_ylabel() for one in axes[:, 0]] == ["baseline", "deformable"] * 2
    assert texts(figure) == ["unit", "9 samples", "81 one layer below", "729 two below"]


def test_sampling_figure_of_one_network_with_an_incomplete_row():
    units = [sampled_unit(f"unit {number}", seed=number) for number in range(4)]
    axes = panels(sampling_figure({"mine": units}))
    assert [one.get_title() for one in axes] == [unit.title for unit in units]
    for one, unit in zip(axes, units, strict=True):
        np.testing.assert_array_equal(clouds(one)[-1], unit.levels[0].points)


def test_two_layer_figure_follows_one_sample_of_each_unit():
    units = [sampled_unit("a cat", seed=1), sampled_unit("a bus", seed=2)]
    figure = two_layer_figure({"baseline": units, "deformable": units[::-1]})
    axes = np.array(panels(figure)).reshape(3, 2)
    assert [one.get_title() for one in axes[0]] == ["(a) baseline", "(b) deformable"]
    top, middle, bottom = axes[:, 0]
    assert len(top.lines) == 2
    for number, (unit, end) in enumerate(zip(units, (0, -1), strict=True)):
        chosen = int(unit.levels[0].inside.nonzero()[end])
        samples, below = (level.points for level in unit.levels[:2])
        np.testing.assert_array_equal(clouds(middle)[2 * number], samples)
        np.testing.assert_array_equal(clouds(middle)[2 * number + 1], samples[chosen][None])
        np.testing.assert_array_equal(clouds(bottom)[2 * number], below)
        of_chosen = below[9 * chosen : 9 * chosen + 9]
        np.testing.assert_array_equal(clouds(bottom)[2 * number + 1], of_chosen)
    lines = [drawn for drawn in figure.get_children() if isinstance(drawn, ConnectionPatch)]
    assert len(lines) == 2 * 2 * (9 + 9)


def test_contact_sheet_has_a_color_per_title():
    images = {
        "one": [sampled_unit("background", seed=1), sampled_unit("large object", seed=2)],
        "two": [sampled_unit("large object", seed=3)],
    }
    figure = contact_sheet_figure(images)
    one, two = panels(figure)
    assert (one.get_title(), two.get_title()) == ("one", "two")
    assert texts(figure) == ["background", "large object"]
    assert one.lines[1].get_color() == two.lines[0].get_color() != one.lines[0].get_color()
    np.testing.assert_array_equal(clouds(two)[0], images["two"][0].levels[-1].points)


def detection_bins(title="cat 0.90"):
    box = torch.tensor([5.0, 4.0, 35.0, 34.0])
    starts = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="xy"), -1)
    regular = torch.cat([starts * 10.0, starts * 10.0 + 8], -1)
    return DetectionBins(
        an_image(), title, box, regular, regular + torch.arange(6.0).reshape(3, 2, 1)
    )


def test_bins_figure_draws_the_boxes():
    detection = detection_bins()
    figure = bins_figure([detection, detection_bins("bus 0.20")])
    first, second = panels(figure)
    assert (first.get_title(), second.get_title()) == ("cat 0.90", "bus 0.20")
    drawn = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    corners = [
        [*it.get_xy(), it.get_x() + it.get_width(), it.get_y() + it.get_height()] for it in drawn
    ]
    bins = (detection.moved, detection.regular, detection.box)
    expected = torch.cat([boxes.reshape(-1, 4) for boxes in bins])
    np.testing.assert_allclose(corners, expected)
    assert [it.get_linestyle() for it in drawn] == 6 * ["solid"] + 6 * [":"] + ["solid"]
    # Boxes are edges: the first pixel is [0, 0, 1, 1].
    assert first.images[0].get_extent() == [0, WIDTH, HEIGHT, 0]
    assert len(texts(figure)) == 3


def test_bins_figure_shows_the_surroundings_of_a_small_box():
    box = torch.tensor([50.0, 2.0, 60.0, 8.0])
    figure = bins_figure([dataclasses.replace(detection_bins(), box=box)])
    (axes,) = panels(figure)
    # 2.5 times 10 of the 60 pixels, in the proportions of the image, up to its borders.
    np.testing.assert_allclose(axes.get_xlim(), [35, 60])
    np.testing.assert_allclose(axes.get_ylim(), [40 * 25 / 60, 0])


def layer_dilations():
    nothing = MeanStd(0, None, None)
    return [
        LayerDilation("conv1", MeanStd(1204, 5.34, 3.25), nothing, MeanStd(7, 8.4, 4.5), nothing),
        LayerDilation("layer4.conv2", MeanStd(9, 1, 0), MeanStd(2, 2, 0.5), nothing, nothing),
    ]


def test_dilation_table():
    header, first, second = dilation_table(layer_dilations()).splitlines()
    assert header.split() == ["layer", "small", "medium", "large", "background"]
    assert len({len(row) for row in (header, first, second)}) == 1
    assert "conv1 " in first
    assert "5.34 ± 3.25 (1,204)" in first
    assert "8.40 ± 4.50 (7)" in first
    assert first.split().count("-") == 2
    assert dilation_cell(MeanStd(2, 2, 0.5)) == "2.00 ± 0.50 (2)"


def test_dilation_figure():
    figure = dilation_figure(layer_dilations())
    (axes,) = figure.axes
    assert texts(figure) == ["conv1", "layer4.conv2"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        *("small", "medium", "large", "background"),
    ]
    means = [bars.lines[0].get_ydata() for bars in axes.containers]
    np.testing.assert_array_equal(means, [[5.34, np.nan, 8.4, np.nan], [1, 2, np.nan, np.nan]])
    (bars,) = axes.containers[0].lines[2]
    first = bars.get_segments()[0]
    np.testing.assert_allclose(first[:, 1], [5.34 - 3.25, 5.34 + 3.25])


def test_receptive_field_figure():
    gradient = torch.zeros(HEIGHT, WIDTH)
    gradient[10:20, 20:40] = 1
    unit = ReceptiveFieldMap(an_image(), "a cat", (15.0, 30.0), EffectiveField(gradient, 11.0, 1.0))
    figure = receptive_field_figure({"baseline": [unit], "deformable": [unit]})
    top, bottom = panels(figure)
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("baseline", "deformable")
    (square,) = top.patches
    assert (*square.get_xy(), square.get_width(), square.get_height()) == (24.5, 9.5, 11, 11)
    shown = np.asarray(top.images[0].get_array())
    np.testing.assert_allclose(shown[15, 30], [0.94, 0.89, 0.26])
    assert shown[5, 5].max() <= 0.35


class Pooled(torch.nn.Module):
    """Deformable pooling on the features of a ResNet."""

    def __init__(self, resnet):
        super().__init__()
        self.features = torch.nn.Sequential(*list(resnet.children())[:-2])
        self.pool = DeformRoIPool2d(512, 3, 1 / 32)
        torch.nn.init.normal_(self.pool.fc_offset.bias)

    def forward(self, images, boxes):
        return self.pool(self.features(images), boxes)


def test_figures_of_any_model(tmp_path):
    """All figures of a network of torchvision."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    layers = ["layer4.1.conv2", "layer4.1.conv1", "layer4.0.conv2"]
    deform_(model, *layers)
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            torch.nn.init.normal_(module.conv_offset.bias)
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    batch = image[None] / 255
    stack = record_sampling(model, batch, layers)

    def sampled(unit, *, zero_offsets=False):
        levels = (
            stack.locations(unit, depth=depth, zero_offsets=zero_offsets) for depth in (1, 2, 3)
        )
        levels = [SamplingLocations(points[0], inside[0]) for points, inside in levels]
        return SampledUnit(image, f"unit {unit}", stack.center(unit), levels)

    units = [(1, 1), (2, 3)]
    networks = {
        "baseline": [sampled(unit, zero_offsets=True) for unit in units],
        "deformable": [sampled(unit) for unit in units],
    }
    rows = dilation_statistics(model, [AnnotatedImage(batch[0], torch.zeros(0, 4), 1.0)])
    fields = [
        ReceptiveFieldMap(
            image,
            "a unit",
            stack.center(unit),
            effective_receptive_field(model, batch, layers[0], unit),
        )
        for unit in units
    ]
    pooled = Pooled(model)
    box = torch.tensor([10.0, 20.0, 70.0, 80.0])
    bins = bin_locations(pooled, "pool", batch, [box[None]])
    figures = {
        "sampling": sampling_figure(networks),
        "fields": two_layer_figure(networks),
        "sheet": contact_sheet_figure({"image": networks["deformable"]}),
        "dilation": dilation_figure(rows),
        "receptive_fields": receptive_field_figure({"deformable": fields}),
        "bins": bins_figure(
            [DetectionBins(image, "a box", box, bins.regular[0], bins.deformed[0, 0])]
        ),
    }
    save_figure(figures["dilation"], tmp_path / "dilation.png")
    with Image.open(tmp_path / "dilation.png") as picture:
        assert picture.size == (1040, 520)
    for name, figure in figures.items():
        save_figure(figure, tmp_path / f"{name}.svg")
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        # Text, not outlines of letters.
        assert any(text.strip() for text in root.itertext())


def test_the_same_figure_gives_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        save_figure(sampling_figure({"mine": [sampled_unit()]}), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "729 two below" in (tmp_path / "one.svg").read_text()


def test_clouds_of_points_keep_an_svg_small(tmp_path):
    save_figure(sampling_figure({"mine": [sampled_unit()]}), tmp_path / "sampling.svg")
    assert (tmp_path / "sampling.svg").read_text().count("<use") < 200


def test_other_formats_are_rejected(tmp_path):
    with pytest.raises(
        ValueError, match=r"figure.pdf: expected a file name that ends in .png or .svg"
    ):
        save_figure(Figure(), tmp_path / "figure.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: sampling_figure({}), "expected networks to have the same units each"),
        (
            lambda: sampling_figure({"a": [sampled_unit()], "b": []}),
            "expected networks to have the same units each",
        ),
        (lambda: two_layer_figure({}), "expected networks to hold at least one"),
        (
            lambda: two_layer_figure({"a": [sampled_unit()]}),
            "expected two units of network a, but got 1",
        ),
        (
            lambda: two_layer_figure({"a": [sampled_unit(levels=1)] * 2}),
            "expected two levels of samples of network a, but got one",
        ),
        (lambda: contact_sheet_figure({}), "expected images to hold at least one image"),
        (lambda: contact_sheet_figure({"a": []}), "and a unit in each"),
        (lambda: bins_figure([]), "expected detections to hold at least one detection"),
        (lambda: dilation_table([]), "expected layers to hold at least one layer"),
        (lambda: dilation_figure([]), "expected layers to hold at least one layer"),
        (lambda: receptive_field_figure({}), "expected networks to have the same units each"),
        (lambda: sampled_unit(levels=0), "expected 1 to 4 levels of samples, but got 0"),
        (
            lambda: dataclasses.replace(sampled_unit(), image=torch.zeros(3, 4, 5)),
            "expected image to be uint8",
        ),
        (
            lambda: SampledUnit(an_image(), "", (0, 0), [SamplingLocations(*batch_of_points())]),
            r"expected levels to be points \[P, 2\]",
        ),
        (
            lambda: dataclasses.replace(detection_bins(), box=torch.zeros(1, 4)),
            r"expected box to have shape \[4\]",
        ),
        (
            lambda: dataclasses.replace(detection_bins(), moved=torch.zeros(1, 3, 3, 4)),
            r"expected moved to have shape \[ph, pw, 4\]",
        ),
    ],
)
def test_invalid_arguments_are_rejected(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def batch_of_points():
    return torch.zeros(1, 9, 2), torch.ones(1, 9, dtype=torch.bool)


def test_strips_make_figures_of_bounded_height():
    strip = torch.zeros(1, dtype=torch.uint8).expand(3, 20_000, 1)
    assert canvas.aspect([an_image(), strip]) == 8
    assert canvas.aspect([an_image()]) == HEIGHT / WIDTH
