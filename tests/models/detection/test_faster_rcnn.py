import pytest
import torch
import torch.nn.functional as F
from detector_testing import BOXES, count_parameters
from torchvision.ops import roi_align

from deformnet import parameter_groups
from deformnet.models.backbones import backbone
from deformnet.models.detection.detector import Features
from deformnet.models.detection.faster_rcnn import FasterRCNN
from deformnet.models.detection.rois import RoIs
from deformnet.models.detection.rpn import RPN


def network(classes=3, **options):
    torch.manual_seed(0)
    features = backbone("resnet18", reduce_channels=8)
    return FasterRCNN(features, classes, RPN(features.conv4_channels), **options).eval()


def head(model, pooled):
    """The layers on top of the pooled features, weight by weight."""
    state = model.state_dict()
    x = pooled.flatten(1)
    for name in ("fc1", "fc2"):
        x = (x @ state[f"{name}.weight"].T + state[f"{name}.bias"]).clamp(min=0)
    logits = x @ state["classifier.weight"].T + state["classifier.bias"]
    deltas = x @ state["refiner.weight"].T + state["refiner.bias"]
    return logits, deltas.reshape(len(x), -1, 4)


@pytest.mark.parametrize("pool", ["max", "average", "deformable"])
def test_a_box_of_whole_cells(pool):
    model, last = network(pool=pool), torch.randn(2, 8, 9, 10)
    logits, deltas = model.box_head(last, BOXES)
    assert logits.shape == (3, 4)
    assert deltas.shape == (3, 3, 4)
    # The first box is 7 x 7 cells, from (1, 2) on: whatever the pooling, each bin is a cell.
    expected = head(model, last[:1, :, 2:9, 1:8])
    torch.testing.assert_close(logits[:1], expected[0])
    torch.testing.assert_close(deltas[:1], expected[1])


def test_max_pooling():
    model, last = network(pool="max"), torch.randn(2, 8, 9, 10)
    logits, _ = model.box_head(last, BOXES)
    # Pixels 20 to 89 and 9 to 140 of the second image: cells 1 to 6 and 1 to 9, of which the map
    # has 1 to 8. All 7 bins of 6 columns have one or two, of 9 rows two or three.
    pooled = torch.zeros(1, 8, 7, 7)
    for i in range(7):
        rows = [1 + p for p in range(9) if i * 9 / 7 - 1 < p < (i + 1) * 9 / 7 and 1 + p < 9]
        for j in range(7):
            columns = [1 + p for p in range(6) if j * 6 / 7 - 1 < p < (j + 1) * 6 / 7]
            cells = last[1][:, rows][:, :, columns].flatten(1)
            pooled[0, :, i, j] = cells.amax(dim=1) if cells.numel() else 0
    torch.testing.assert_close(logits[2:], head(model, pooled)[0])


def test_aligned_boxes_are_edges():
    model, last = network(pool="average", sampling="aligned"), torch.randn(2, 8, 9, 10)
    pooled = roi_align(last, BOXES, 7, 1 / 16, sampling_ratio=4, aligned=True)
    torch.testing.assert_close(model.box_head(last, BOXES)[0], head(model, pooled)[0])


def test_every_class_refines_the_box_itself():
    model, last = network(pool="average"), torch.randn(2, 8, 9, 10)
    # (dx, dy, dw, dh) of class 1, in tenths of the box.
    model.refiner.weight.data.zero_()
    model.refiner.bias.data[4:8] = torch.tensor([1.0, -2, 0, 0])
    sizes = [(144, 160), (120, 100)]
    first, second = model.candidates(Features(last, last), sizes, BOXES)
    assert first.boxes.shape == (2, 3, 4)
    assert second.boxes.shape == (1, 3, 4)
    torch.testing.assert_close(first.boxes[:, 0], BOXES[0])
    width, height = 57, 36
    moved = torch.tensor([3 + width / 10, 5 - height / 5, 60 + width / 10, 41 - height / 5])
    moved[1] = 0  # clipped to the image
    torch.testing.assert_close(first.boxes[1, 1], moved)
    torch.testing.assert_close(second.boxes[0, 0], torch.tensor([20.0, 9, 90, 120]))
    logits, _ = model.box_head(last, BOXES)
    torch.testing.assert_close(first.scores, F.softmax(logits[:2], dim=1)[:, 1:])


def test_a_sample_of_rois_trains():
    model = network(pool="average")
    iou = torch.cat((torch.full((100,), 0.05), torch.full((200,), 0.2), torch.ones(100)))
    labels = (iou == 1).long()
    chosen = model.sample_rois(RoIs(torch.zeros(400, 4), labels, torch.zeros(400, 4), iou))
    assert chosen.iou.unique(return_counts=True)[1].tolist() == [96, 32]
    assert chosen.iou.min() == pytest.approx(0.2)


@pytest.mark.parametrize("pool", ["max", "average", "deformable"])
def test_runs_under_autocast(pool):
    model, last = network(pool=pool), torch.randn(2, 8, 9, 10)
    expected = model.box_head(last, BOXES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.box_head(last, BOXES)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type(dtype):
    model, last = network(pool="max").to(dtype), torch.randn(2, 8, 9, 10).to(dtype)
    assert all(output.dtype == dtype for output in model.box_head(last, BOXES))


def test_start():
    model = network(pool="deformable", beta=0.02)
    for layer in (model.fc1, model.fc2, model.classifier, model.refiner):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()
    assert not any(p.any() for p in model.deform_pool.parameters())
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, 0.1)}
    assert rates["offset weights x0.02"] == rates["offset biases x0.02"] == pytest.approx(0.002)


def test_parameters_of_the_papers_network():
    plain = count_parameters(FasterRCNN, 256, 0, "max")
    assert plain == count_parameters(FasterRCNN, 256, 0, "average")
    rpn = (9 * 1024 + 1) * 512 + 513 * 9 * 2 + 513 * 9 * 4
    layers = (256 * 49 + 1) * 1024 + 1025 * 1024 + 1025 * (21 + 80)
    assert plain == 42_500_160 + 2049 * 256 + rpn + layers
    # Offsets of three 3x3 convolutions; the fully connected layer of the pooling.
    added = 3 * (9 * 512 + 1) * 18 + (256 * 49 + 1) * 98
    assert count_parameters(FasterRCNN, 256, 3, "deformable") - plain == added == 1_478_296


def test_wrong_beta():
    with pytest.raises(ValueError, match="expected beta to be a number of at least 0, but got -1"):
        network(pool="deformable", beta=-1)
