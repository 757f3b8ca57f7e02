"""Counted operations against numbers worked out by hand."""

import dataclasses
import json

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformnet import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d, deform_
from deformnet.analysis import count_flops, model_cost
from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

# One multiply-add of a product, and the four of a bilinear read.
PRODUCT, READ = 2, 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masked", [False, True])
def test_deformable_convolution(device, masked):
    # Stride 2 makes 3 x 4 outputs of 6 x 8; 2 groups of 2 channels, 3 x 2 taps, 10 outputs.
    input = torch.randn(2, 4, 6, 8, device=device)
    weight = torch.randn(10, 2, 3, 2, device=device)
    offset = torch.randn(2, 2 * 6, 3, 4, device=device)
    mask = torch.rand(2, 6, 3, 4, device=device) if masked else None
    flops = count_flops(lambda: deform_conv2d(input, offset, weight, None, 2, (1, 0), 1, mask=mask))
    assert flops == 2 * 3 * 4 * 6 * (10 * 2 * PRODUCT + 4 * READ)


def test_a_plain_convolution_is_what_pytorch_counts():
    conv, x = nn.Conv2d(6, 8, 3, padding=1, groups=2), torch.randn(2, 6, 5, 7)
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert count_flops(lambda: conv(x)) == counter.get_total_flops() == 2 * 35 * 8 * 3 * 9 * PRODUCT


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_converted_network_costs_its_offsets_and_its_reads_more(device):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, padding=1)).to(device)
    x = torch.randn(1, 3, 4, 5, device=device)
    plain = count_flops(lambda: model(x))
    deform_(model, "1")
    assert count_flops(lambda: model(x)) == plain + 20 * 9 * 6 * (18 * PRODUCT + READ)


def test_it_counts_in_inference_mode_too():
    layer, x = DeformConv2d(2, 3, 3, padding=1), torch.randn(1, 2, 4, 4)
    with torch.inference_mode():
        inside = count_flops(lambda: layer(x))
    assert inside == count_flops(lambda: layer(x)) > 0


@pytest.mark.parametrize(
    ("expected", "products", "reads"),
    [
        (("input",), 1, 1),
        (("offset",), 1, 1),
        (("mask",), 1, 1),
        (("offset", "mask"), 1, 1),
        (("weight",), 1, 1),
        (("bias",), 0, 0),
        (("input", "offset", "weight", "bias", "mask"), 2, 3),
    ],
)
def test_backward_of_the_convolution(expected, products, reads):
    tensors = {
        "input": torch.randn(1, 2, 4, 4),
        "offset": torch.randn(1, 18, 4, 4),
        "weight": torch.randn(5, 2, 3, 3),
        "bias": torch.randn(5),
        "mask": torch.rand(1, 9, 4, 4),
    }
    for name in expected:
        tensors[name].requires_grad_()
    output = deform_conv2d(**tensors, padding=1).sum()
    flops = count_flops(lambda: torch.autograd.grad(output, [tensors[name] for name in expected]))
    assert flops == 16 * 9 * 2 * (products * 5 * PRODUCT + reads * READ)


def test_pooling_reads_the_cells_of_bins():
    # 5 rows in 2 bins: 3 and 3, as the middle one is in both; 4 columns in 2 bins: 2 and 2. Of the
    # second box, 1 row is in both bins, and so is 1 column.
    boxes = torch.tensor([[0, 2.0, 1, 5, 5], [0, 3, 3, 3, 3]])
    input = torch.randn(1, 8, 10, 10)
    cells = 6 * 4 + 2 * 2
    assert count_flops(lambda: deform_roi_pool(input, boxes, None, 2)) == 8 * cells * READ
    assert count_flops(lambda: deform_ps_roi_pool(input, boxes, None, 2)) == 2 * cells * READ
    # Scaled by a half: rows round(0.5) = 1 to round(2.5) = 3, columns 1 to 3; and one cell.
    half = count_flops(lambda: deform_roi_pool(input, boxes, None, 2, 0.5))
    assert half == 8 * (4 * 4 + 2 * 2) * READ


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pooling_reads_a_number_of_samples(device):
    input, boxes = torch.randn(1, 3, 9, 9, device=device), torch.rand(5, 5, device=device)
    boxes[:, 0] = 0
    for rule in ("msra", "aligned"):
        flops = count_flops(
            lambda rule=rule: deform_roi_pool(
                input, boxes, None, (2, 4), sampling=rule, samples_per_bin=3
            )
        )
        assert flops == 5 * 8 * 9 * 3 * READ


def test_pooling_reads_more_samples_in_larger_boxes():
    input = torch.randn(1, 3, 9, 9)
    # 7 rows in 2 bins: 4 samples each; 2 columns: 1 each. The second is turned inside out.
    boxes = torch.tensor([[0, 1.0, 1, 3, 8], [0, 5, 5, 1, 1], [0, torch.nan, 0, 5, 5]])
    flops = count_flops(
        lambda: deform_roi_pool(input, boxes, None, 2, sampling="aligned", samples_per_bin=0)
    )
    assert flops == 8 * 2 * 3 * READ


def test_pooling_of_unknown_boxes_is_refused():
    input, boxes = torch.randn(1, 3, 9, 9, device="meta"), torch.rand(5, 5, device="meta")
    with pytest.raises(ValueError, match="boxes"):
        count_flops(lambda: deform_roi_pool(input, boxes, None, 2))


def test_pooling_layers_pool_twice():
    boxes = torch.tensor([[0, 0.0, 0, 3, 3]])  # 16 cells, each in one bin
    plain = DeformRoIPool2d(3, 2)
    x = torch.randn(1, 3, 6, 6)
    # The offsets: 12 numbers to 8.
    assert count_flops(lambda: plain(x, boxes)) == 2 * 16 * 3 * READ + 12 * 8 * PRODUCT
    sensitive = DeformPSRoIPool2d(5, 2, offset_groups=3)
    maps, features = torch.randn(1, 12, 6, 6), torch.randn(1, 5, 6, 6)
    # 3 channels of maps, and a field for x and y of each of 3 groups.
    fields = 36 * 5 * 24 * PRODUCT
    assert count_flops(lambda: sensitive(maps, features, boxes)) == 16 * (3 + 6) * READ + fields


@pytest.mark.parametrize(("expected", "times"), [(("input",), 1), (("input", "offset"), 2)])
def test_backward_of_the_pooling(expected, times):
    tensors = {"input": torch.randn(1, 3, 6, 6), "offset": torch.randn(1, 2, 2, 2)}
    for name in expected:
        tensors[name].requires_grad_()
    boxes = torch.tensor([[0, 0.0, 0, 3, 3]])
    output = deform_roi_pool(tensors["input"], boxes, tensors["offset"], 2).sum()
    flops = count_flops(lambda: torch.autograd.grad(output, [tensors[name] for name in expected]))
    assert flops == 16 * 3 * times * READ


class Net(nn.Module):
    """Layers that run once, twice and never, and arithmetic outside of layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.shared = DeformConv2d(4, 4, 3, padding=1, modulated=True)
        self.pool = DeformRoIPool2d(4, 2)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x, boxes):
        x = self.shared(self.shared(self.stem(x)))
        x = (x.flatten(2).mT @ x.flatten(2)).flatten(1)[:, :30].view(1, 1, 5, 6) + x
        return self.pool(x, boxes)


def test_the_table_of_layers():
    model = Net()
    x, boxes = torch.randn(1, 3, 5, 6), torch.tensor([[0, 0.0, 0, 3, 3]])
    cost = model_cost(model, x, boxes, repeats=3)
    rows = {row.layer: row for row in cost.layers}
    assert list(rows) == ["stem.0", "stem.1", "shared", "pool"]
    assert rows["stem.0"].flops == 30 * 12 * PRODUCT
    assert rows["stem.0"].output == (1, 4, 5, 6)
    assert rows["stem.0"].output_bytes == 4 * 4 * 5 * 6
    assert rows["shared"].kind == "DeformConv2d"
    assert rows["shared"].parameters == 4 * 4 * 9 + 4 + 27 * (4 * 9 + 1)
    # Twice: the offsets and masks, the products, the reads.
    each = 30 * 9 * (27 * 4 * PRODUCT + 4 * 4 * PRODUCT + 4 * READ)
    assert rows["shared"].flops == 2 * each
    assert rows["pool"].flops == count_flops(lambda: model.pool(torch.randn(1, 4, 5, 6), boxes))
    assert rows["pool"].output == (1, 4, 2, 2)
    assert cost.flops == sum(row.flops for row in cost.layers) + 30 * 30 * 4 * PRODUCT
    assert cost.flops == count_flops(lambda: model(x, boxes))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.peak_bytes is None
    assert all(row.seconds > 0 for row in cost.layers)
    assert cost.seconds > 0
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    json.dumps(dataclasses.asdict(cost))
    with pytest.raises(ValueError, match="expected repeats to be at least 1, but got 0"):
        model_cost(model, x, boxes, repeats=0)


@pytest.mark.parametrize("modulated", [False, True])
def test_torchvisions_convolution_costs_the_same(modulated):
    ours = DeformConv2d(4, 6, 3, 2, padding=1, groups=2, modulated=modulated)
    x = torch.randn(2, 4, 8, 9)
    offset, mask = torch.zeros(2, 18, 4, 5), torch.ones(2, 9, 4, 5) if modulated else None
    arguments = (ours.weight, ours.bias, 2, 1, 1, mask)
    flops = count_flops(lambda: torchvision.ops.deform_conv2d(x, offset, *arguments))
    assert flops == count_flops(lambda: deform_conv2d(x, offset, *arguments)) > 0
    offset.requires_grad_()
    x.requires_grad_()
    backward = [
        count_flops(operator(x, offset, *arguments).sum().backward)
        for operator in (torchvision.ops.deform_conv2d, deform_conv2d)
    ]
    assert backward[0] == backward[1] > 2 * flops
