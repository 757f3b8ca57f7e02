import copy
from itertools import product

import pytest
import torch
from backbone_testing import bare, randomize_norms
from torch import nn

from deformnet.models.backbones import backbone

ALIGNED = "aligned-inception-resnet"
# Table 6 and Figure 8 of the paper.
WIDTHS = {"stage2": 256, "stage3": 512, "stage4": 1024, "stage5": 2048}
BLOCKS = {"stage2": 3, "stage3": 4, "stage4": 23, "stage5": 3}
BRANCHES = {"stage2": (64, 32), "stage3": (128, 64), "stage4": (256, 128), "stage5": (512, 256)}


@pytest.fixture(scope="module")
def model():
    """The network without the reducing convolution; not to be changed."""
    torch.manual_seed(0)
    return backbone(ALIGNED, norm="frozen", reduce_channels=None).eval()


def filters(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def test_parameters():
    features = bare(ALIGNED, reduce_channels=None)
    count = sum(parameter.numel() for parameter in features.parameters())
    assert count == 62_332_800
    # The paper has 64.3 million, with the classifier of ImageNet.
    assert count + 2048 * 1000 + 1000 == 64_381_800


def test_stages_are_those_of_table_6():
    features = bare(ALIGNED, reduce_channels=None)
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


def test_at_stride_32_nothing_is_dilated():
    features = bare(ALIGNED, output_stride=32, dilation=4)
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
    strided = bare(ALIGNED, norm="frozen", output_stride=32).stage5
    strided = strided.to_empty(device="cpu").double()
    randomize_norms(stage5)
    strided.load_state_dict(stage5.state_dict())
    conv4 = torch.randn(1, 1024, 7, 6, dtype=torch.float64)
    found = stage5(conv4)
    for row, column in product((0, 1), repeat=2):
        expected = strided(conv4[:, :, row:, column:])
        torch.testing.assert_close(found[:, :, row::2, column::2], expected)


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
def test_units_are_centered_on_multiples_of_the_stride(model, axis):
    # Along one axis the image is longer than the field, at most a few units across the other.
    units = REACH // 16 + 3
    size, unit = [2 * 16 * units, 20], [units, 1]
    if axis == 1:
        size, unit = size[::-1], unit[::-1]
    found = field(averaging(model), size, unit)[axis]
    assert found == (16 * units - REACH, 16 * units + REACH)
