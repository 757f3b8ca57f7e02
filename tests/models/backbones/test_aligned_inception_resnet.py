import copy

import pytest
import torch
import torchvision
from torch import nn

from deformnet import DeformConv2d
from deformnet.analysis import sampling_locations
from deformnet.models.backbones import aligned_inception_resnet, backbone

# Table 6 and Figure 8 of the paper.
WIDTHS = {"stage2": 256, "stage3": 512, "stage4": 1024, "stage5": 2048}
BLOCKS = {"stage2": 3, "stage3": 4, "stage4": 23, "stage5": 3}
BRANCHES = {"stage2": (64, 32), "stage3": (128, 64), "stage4": (256, 128), "stage5": (512, 256)}


def bare(**arguments):
    """The network without memory, for its structure."""
    with torch.device("meta"):
        return aligned_inception_resnet(**arguments)


@pytest.fixture(scope="module")
def model():
    """The network without the reducing convolution; not to be changed."""
    torch.manual_seed(0)
    return aligned_inception_resnet(norm="frozen", reduce_channels=None).eval()


def deformable(model):
    return [name for name, module in model.named_modules() if isinstance(module, DeformConv2d)]


def filters(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def test_parameters():
    features = bare(reduce_channels=None)
    count = sum(parameter.numel() for parameter in features.parameters())
    assert count == 62_332_800
    # The paper has 64.3 million, with the classifier of ImageNet.
    assert count + 2048 * 1000 + 1000 == 64_381_800


def test_stages_are_those_of_table_6():
    features = bare(reduce_channels=None)
    inputs = 64
    assert (features.stem.conv.kernel_size, features.stem.conv.stride) == ((7, 7), (2, 2))
    assert features.stem.conv.out_channels == inputs
    assert (features.maxpool.kernel_size, features.maxpool.stride) == (3, 2)
    for name, width in WIDTHS.items():
        stage = features.get_submodule(name)
        assert len(stage) == BLOCKS[name]
        one, two = BRANCHES[name]
        for block in stage:
            shapes = [
                tuple(m.weight.shape[:3])
                for branch in (block.branch1, block.branch2, block.join, block.shortcut)
                for m in branch.modules()
                if isinstance(m, nn.Conv2d)
            ]
            assert shapes == [
                (one, inputs, 1), (one, one, 3),
                (two, inputs, 1), (two, two, 3), (two, two, 3),
                (width, one + two, 1),
                *([(width, inputs, 1)] if inputs != width else []),
            ]  # fmt: skip
            inputs = width
    assert (features.conv4_channels, features.conv5_channels) == (1024, 2048)
    assert len(filters(features)) == 3 * sum(BLOCKS.values()) == 99


@pytest.mark.parametrize("dilation", [2, 4])
def test_at_stride_16_conv5_is_dilated(dilation):
    features = bare(dilation=dilation)
    assert features.stride == 16
    for name, module in features.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            expected = dilation if name.startswith("stage5.") else 1
            assert module.dilation == module.padding == (expected, expected), name
    strided = {n for n, m in features.named_modules() if getattr(m, "stride", 1) == (2, 2)}
    assert {name.split(".")[0] for name in strided} == {"stem", "stage3", "stage4"}


def test_at_stride_32_nothing_is_dilated():
    features = bare(output_stride=32, dilation=4)
    assert features.stride == 32
    assert all(module.dilation == (1, 1) for module in filters(features))
    strided = [n for n, m in features.named_modules() if getattr(m, "stride", 1) == (2, 2)]
    assert [name for name in strided if name.startswith("stage5.")] == [
        "stage5.0.branch1.0.conv",
        "stage5.0.branch2.0.conv",
        "stage5.0.shortcut.conv",
    ]


@torch.no_grad()
def test_dilated_conv5_is_the_strided_one_on_every_shift(model):
    # Dilation 2 keeps even and odd rows apart: each of four grids is an undilated map of its own.
    stage5 = copy.deepcopy(model.stage5).double()
    with torch.device("meta"):
        strided = aligned_inception_resnet(norm="frozen", output_stride=32).stage5
    strided = strided.to_empty(device="cpu").double()
    for module in stage5.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    strided.load_state_dict(stage5.state_dict())
    conv4 = torch.randn(1, 1024, 7, 6, dtype=torch.float64)
    found = stage5(conv4)
    for row in (0, 1):
        for column in (0, 1):
            expected = strided(conv4[:, :, row:, column:])
            torch.testing.assert_close(found[:, :, row::2, column::2], expected)


@pytest.mark.parametrize("output_stride", [16, 32])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (97, 16)], ids=str)
def test_output_sizes(output_stride, size):
    features = bare(output_stride=output_stride, deform_layers=2, reduce_channels=24).eval()
    images = torch.empty(2, 3, *size, device="meta")
    conv4, conv5 = features.stages(images)
    assert conv4.shape == (2, 1024, *(-(-side // 16) for side in size))
    assert conv5.shape == (2, 2048, *(-(-side // output_stride) for side in size))
    assert features(images).shape == (2, 24, *conv5.shape[2:])


# Where units are.


def averaging(model):
    """The network as a mean of pixels: its gradient is the receptive field, and never negative.

    Equal positive weights that sum to one, norms that do nothing, ReLUs that see no negative
    numbers, and the mean instead of the maximum, over the same window.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    model.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    return model


def without_padding_at_first(model):
    """As Inception-ResNet-v2 begins: valid convolution and pooling."""
    model.stem.conv.padding = (0, 0)
    model.maxpool.padding = 0
    return model


def field(model, size, unit):
    """First and last row, and first and last column, of the pixels that a unit of conv5 sees."""
    images = torch.ones(1, 3, *size, dtype=torch.float64, requires_grad=True)
    conv5 = model.stages(images)[1]
    (gradient,) = torch.autograd.grad(conv5[0, 0, unit[0], unit[1]], images)
    seen = gradient[0, 0] > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    return (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))


# How far a unit of conv5 sees to each side: conv1 and pooling, then two 3x3 filters in every block.
REACH = 3 + 2 + 3 * 2 * 4 + 4 * 2 * 8 + 23 * 2 * 16 + 3 * 2 * 2 * 16


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_units_are_centred_on_multiples_of_the_stride(model, axis):
    # Along one axis the image is longer than the field, at most a few units across the other.
    units = REACH // 16 + 3
    size, unit = [2 * 16 * units, 20], [units, 1]
    if axis == 1:
        size, unit = size[::-1], unit[::-1]
    found = field(averaging(model), size, unit)[axis]
    assert found == (16 * units - REACH, 16 * units + REACH)


def test_units_are_not_centred_without_padding(model):
    # That the test above can fail: 3 pixels are lost at conv1, and a pixel of its map in pooling.
    units = REACH // 16 + 3
    broken = without_padding_at_first(averaging(model))
    rows, _ = field(broken, (2 * 16 * units, 30), (units, 0))
    assert rows == (16 * units + 5 - REACH, 16 * units + 5 + REACH)


# Deformable layers.


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (0, []),
        (1, ["stage5.2.branch2.2.conv"]),
        (2, ["stage5.2.branch2.1.conv", "stage5.2.branch2.2.conv"]),
        (3, [f"stage5.2.branch{p}.conv" for p in ("1.1", "2.1", "2.2")]),
        (6, [f"stage5.{b}.branch{p}.conv" for b in (1, 2) for p in ("1.1", "2.1", "2.2")]),
        (10, ["stage4.22.branch2.2.conv"]
         + [f"stage5.{b}.branch{p}.conv" for b in range(3) for p in ("1.1", "2.1", "2.2")]),
    ],
)  # fmt: skip
def test_deform_layers_count_from_the_end(count, names):
    features = bare(deform_layers=count)
    assert deformable(features) == names
    for name in names:
        layer = features.get_submodule(name)
        assert layer.conv_offset.dilation == layer.dilation


def test_all_filters_can_be_deformable():
    assert len(deformable(bare(deform_layers=99))) == 99


@torch.no_grad()
def test_deformable_starts_as_the_plain_network(model):
    other = aligned_inception_resnet(
        norm="frozen", reduce_channels=None, deform_layers=6, modulated=True, offset_groups=4
    ).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert all(".conv_offset." in key for key in result.missing_keys)
    assert len(result.missing_keys) == 12
    assert not result.unexpected_keys
    images = torch.randn(1, 3, 48, 33)
    expected = model(images)
    difference = other(images) - expected
    assert expected.std() > 0
    assert difference.abs().max() <= 1e-5 * expected.abs().max()


# Norms and weights.


def test_frozen_norm_changes_nothing_in_training(model):
    frozen = copy.deepcopy(model).train()
    before = frozen.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], 0.01)
    frozen(torch.randn(1, 3, 32, 32)).mean().backward()
    optimizer.step()
    changed = {
        key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert not any(".norm." in key or key.startswith(("stem.", "stage2.")) for key in changed)
    assert {key.split(".")[0] for key in changed} == {"stage3", "stage4", "stage5"}


def test_trained_norm_trains_everything():
    features = bare()
    assert all(parameter.requires_grad for parameter in features.parameters())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in features.modules()) == 1 + 33 * 6 + 4


def test_own_state_dict_loads_as_weights(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    again = aligned_inception_resnet(weights=path, deform_layers=1, reduce_channels=8)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_weights_of_another_model(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    message = r"weights\.pth: .* Aligned-Inception-ResNet, but got ResNet-18: missing key stem"
    with pytest.raises(ValueError, match=message):
        aligned_inception_resnet(weights=path)
    with pytest.raises(FileNotFoundError, match=r"no file IMAGENET1K_V1, and there are no public"):
        aligned_inception_resnet(weights="IMAGENET1K_V1")
    state = dict(model.state_dict())
    torch.save({**state, "stem.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected stem.conv.weight to be .*, but got \[1\]"):
        aligned_inception_resnet(weights=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "group"}, r"expected norm to be one of .*'frozen'.*, but got 'group'"),
        ({"output_stride": 8}, r"expected output_stride to be one of \(16, 32\), but got 8"),
        ({"dilation": 0}, "expected dilation to be at least 1, but got 0"),
        ({"reduce_channels": 0}, "expected reduce_channels to be at least 1 or None, but got 0"),
        (
            {"deform_layers": 100},
            r"expected deform_layers to be 0 to 99, .*Aligned-Inception.*, but got 100",
        ),
        ({"deform_layers": 1, "offset_groups": 3}, "not a multiple of 3 groups"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bare(**arguments)


def test_stride_in_1x1_is_refused():
    with pytest.raises(
        ValueError, match="expected stride_in_1x1 to be False for aligned-inception-resnet"
    ):
        backbone("aligned-inception-resnet", stride_in_1x1=True)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 3, 32, 32)])
def test_wrong_images(model, shape):
    with pytest.raises(ValueError, match=r"expected images to be \[N, 3, H, W\], but got"):
        model(torch.randn(shape))


def test_filters_of_the_chain_read_one_another(model):
    chain = model.filter_chain()
    assert len(chain) == 6
    assert all(model.get_submodule(name).kernel_size == (3, 3) for name in chain)
    points, _ = sampling_locations(model, torch.rand(1, 3, 64, 80), chain[:3], (1, 2))
    assert points[0].amin(0).tolist() == [16 - 96, 32 - 96]
    assert points[0].amax(0).tolist() == [16 + 96, 32 + 96]
