import math

import pytest
import torch
import torch.nn.functional as F
from detector_testing import BOXES, NO_OBJECTS, iou, make_target, random_boxes
from torch import nn

from deformnet import parameter_groups
from deformnet.models.backbones import backbone
from deformnet.models.detection.detector import Target
from deformnet.models.detection.faster_rcnn import FasterRCNN
from deformnet.models.detection.rfcn import RFCN
from deformnet.models.detection.rois import RoIs, assign_targets, format_rois, roi_losses, subsample
from deformnet.models.detection.rpn import RPN


def rois_of(labels, iou=None):
    """RoIs that tell which they are by their boxes."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    index = torch.arange(float(len(labels)))
    iou = torch.zeros(len(labels)) if iou is None else torch.tensor(iou)
    return RoIs(index[:, None].expand(-1, 4), labels, torch.zeros(len(labels), 4), iou)


def test_boxes_belong_to_the_object_that_they_overlap_most():
    torch.manual_seed(0)
    proposals, objects = random_boxes(400), random_boxes(6)
    classes = torch.tensor([3, 0, 2, 2, 1, 0])
    rois = assign_targets(proposals, Target(objects, classes))
    torch.testing.assert_close(rois.boxes, torch.cat((proposals, objects)))
    foreground = 0
    for box, label, deltas, best in zip(*rois, strict=True):
        overlaps = [iou(box.tolist(), other.tolist()) for other in objects]
        winner = max(range(6), key=overlaps.__getitem__)
        assert best.item() == pytest.approx(overlaps[winner], abs=1e-5)
        if overlaps[winner] < 0.5:
            assert label == 0
            assert not deltas.any()
            continue
        foreground += 1
        assert label == classes[winner] + 1
        x1, y1, x2, y2 = box.tolist()
        u1, v1, u2, v2 = objects[winner].tolist()
        expected = [
            ((u1 + u2) / 2 - (x1 + x2) / 2) / (x2 - x1) / 0.1,
            ((v1 + v2) / 2 - (y1 + y2) / 2) / (y2 - y1) / 0.1,
            math.log((u2 - u1) / (x2 - x1)) / 0.2,
            math.log((v2 - v1) / (y2 - y1)) / 0.2,
        ]
        assert deltas.tolist() == pytest.approx(expected, abs=1e-4)
    assert 6 < foreground < 100


def test_objects_train_as_boxes_themselves():
    objects = torch.tensor([[4.0, 4, 20, 30], [40, 8, 60, 20]])
    rois = assign_targets(torch.zeros(0, 4), Target(objects, torch.tensor([0, 4])))
    torch.testing.assert_close(rois.boxes, objects)
    assert rois.labels.tolist() == [1, 5]
    assert rois.iou.tolist() == [1, 1]
    assert not rois.deltas.any()


def test_an_image_without_objects_is_background():
    rois = assign_targets(random_boxes(5), NO_OBJECTS)
    assert len(rois.boxes) == 5
    assert not any(values.any() for values in rois[1:])
    assert all(len(values) == 0 for values in assign_targets(torch.zeros(0, 4), NO_OBJECTS))


def test_invalid_boxes_are_dropped():
    nan, inf = math.nan, math.inf
    objects = torch.tensor(
        [[5.0, 5, 5, 9], [9, 9, 3, 3], [0, 0, nan, 4], [0, 0, inf, 4], [10, 10, 30, 30]]
    )
    proposals = torch.tensor(
        [[nan, 0, 1, 1], [0, 0, 9, inf], [10, 10, 29, 30], [7, 7, 7, 7], [-99, -99, -80, -80]]
    )
    rois = assign_targets(proposals, Target(objects, torch.tensor([0, 1, 2, 3, 4])))
    torch.testing.assert_close(rois.boxes, torch.cat((proposals[2:], objects[4:])))
    assert rois.labels.tolist() == [5, 0, 0, 5]
    assert all(values.isfinite().all() for values in rois)


def test_sampling_keeps_to_its_fractions():
    labels = [2] * 50 + [0] * 100 + [0] * 100
    rois = rois_of(labels, [0.9] * 50 + [0.3] * 100 + [0.05] * 100)
    torch.manual_seed(0)
    chosen = subsample(rois, 128, min_iou=0.1)
    index = chosen.boxes[:, 0].long().tolist()
    assert len(set(index)) == len(index) == 128
    assert sum(i < 50 for i in index) == 32
    assert sum(50 <= i < 150 for i in index) == 96
    assert chosen.labels.tolist() == [labels[i] for i in index]
    # Another draw is another sample.
    assert set(index) != set(subsample(rois, 128, min_iou=0.1).boxes[:, 0].long().tolist())


def test_sampling_fills_up():
    # Few objects leave their places to the background; little overlap does, after the close ones.
    rois = rois_of([1] * 5 + [0] * 20 + [0] * 300, [0.9] * 5 + [0.3] * 20 + [0.05] * 300)
    index = subsample(rois, 128, min_iou=0.1).boxes[:, 0]
    assert sorted(index[:25].tolist()) == list(range(25))
    assert len(index.unique()) == 128
    # Where the background is short, objects do not fill up: the sample is smaller.
    assert len(subsample(rois_of([1] * 60 + [0] * 10), 128, min_iou=0.1).labels) == 42
    assert len(subsample(rois_of([0] * 3), 128, min_iou=0.1).labels) == 3
    assert len(subsample(rois_of([]), 128, min_iou=0.1).labels) == 0


def losses_of_one(logits, deltas, label, expected):
    """Softmax and smooth L1 loss of one RoI."""
    class_loss = math.log(sum(math.exp(x) for x in logits)) - logits[label]
    gaps = [abs(a - b) for a, b in zip(deltas, expected, strict=True)]
    box_loss = sum(0.5 * gap**2 if gap < 1 else gap - 0.5 for gap in gaps)
    return class_loss, box_loss if label else 0.0


@pytest.mark.parametrize("own_boxes", [False, True])
@pytest.mark.parametrize("count", [4, 100])
def test_losses_of_the_hardest(count, own_boxes):
    torch.manual_seed(0)
    classes, sizes = 3, (7, 2, 0)
    images = [
        rois_of(torch.randint(0, classes + 1, (n,)))._replace(deltas=torch.randn(n, 4))
        for n in sizes
    ]
    logits = (3 * torch.randn(9, classes + 1)).requires_grad_()
    deltas = (2 * torch.randn(9, *([classes] if own_boxes else []), 4)).requires_grad_()
    losses = roi_losses(logits, deltas, images, count)

    class_mean = box_mean = 0.0
    counted, start = [], 0
    for image in images:
        pairs = []
        for r, (label, expected) in enumerate(zip(image.labels, image.deltas, strict=True), start):
            own = deltas[r, max(label - 1, 0)] if own_boxes else deltas[r]
            pair = losses_of_one(logits[r].tolist(), own.tolist(), label, expected.tolist())
            pairs.append((sum(pair), *pair, r))
        start += len(pairs)
        hardest = sorted(pairs, reverse=True)[:count]
        counted += [r for *_, r in hardest]
        if hardest:
            class_mean += sum(pair[1] for pair in hardest) / len(hardest) / len(images)
            box_mean += sum(pair[2] for pair in hardest) / len(hardest) / len(images)
    assert list(losses) == ["class", "box"]
    assert losses["class"].item() == pytest.approx(class_mean, rel=1e-4)
    assert losses["box"].item() == pytest.approx(box_mean, rel=1e-4)

    sum(losses.values()).backward()
    trained = logits.grad.abs().sum(dim=1) > 0
    assert trained.nonzero().flatten().tolist() == sorted(counted)
    background = torch.cat([image.labels for image in images]) == 0
    assert not deltas.grad[background].any()
    assert background.any()


def test_losses_of_nothing():
    logits, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    losses = roi_losses(logits, deltas, [rois_of([]), rois_of([])], 128)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert logits.grad is not None
    assert deltas.grad is not None


def test_losses_of_half_precision_are_float32():
    logits = torch.randn(3, 4, dtype=torch.bfloat16)
    losses = roi_losses(logits, torch.randn(3, 4).bfloat16(), [rois_of([1, 0, 2])], 128)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    expected = F.cross_entropy(logits.float(), torch.tensor([1, 0, 2]))
    torch.testing.assert_close(losses["class"], expected)


def test_boxes_for_pooling():
    boxes = [torch.tensor([[1.0, 2, 30, 40]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 1, 1]])]
    edges = [[0, 1, 2, 30, 40], [2, 0, 0, 1, 1]]
    pixels = [[0, 1, 2, 29, 39], [2, 0, 0, 0, 0]]
    assert format_rois(boxes, "aligned").tolist() == edges
    assert format_rois(boxes, "bins").tolist() == pixels
    assert format_rois(boxes, "msra").tolist() == pixels
    assert format_rois(boxes, None).tolist() == pixels
    assert format_rois([torch.zeros(0, 4)], "bins").shape == (0, 5)


NETWORKS = {
    "R-FCN": lambda *parts: RFCN(*parts, pool="average"),
    "deformable R-FCN": lambda *parts: RFCN(*parts, pool="deformable"),
    "Faster R-CNN": lambda *parts: FasterRCNN(*parts, pool="max"),
    "deformable Faster R-CNN": lambda *parts: FasterRCNN(*parts, pool="deformable"),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)
SIZES = [(64, 96), (50, 70)]


def detector(name, **rpn):
    torch.manual_seed(0)
    features = backbone("resnet18", deform_layers=1, reduce_channels=16)
    return NETWORKS[name](features, 3, RPN(features.conv4_channels, sizes=(32, 64), **rpn))


def batch():
    torch.manual_seed(1)
    objects = make_target([[10.0, 10, 50, 54], [40, 8, 92, 60]], [0, 2])
    return torch.randn(2, 3, 64, 96), [objects, NO_OBJECTS]


def check_training(model, losses, names):
    """All terms are there and finite, and so are the gradients of all parameters."""
    assert list(losses) == names
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("rpn.") and "rpn_class" not in names:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@EVERY_NETWORK
def test_trains_on_its_own_proposals(name):
    model = detector(name)
    images, targets = batch()
    losses = model.losses(images, SIZES, targets)
    check_training(model, losses, ["rpn_class", "rpn_box", "class", "box"])
    assert all(loss > 0 for loss in losses.values())
    for parameter in model.parameters():
        assert parameter.grad.any()


@EVERY_NETWORK
@pytest.mark.parametrize("objects", [True, False])
def test_trains_on_stored_proposals(name, objects):
    model = detector(name)
    images, targets = batch()
    model.propose = model.rpn.forward = None  # nobody asks
    none = torch.zeros(0, 4)
    proposals = [torch.tensor([[12.0, 8, 58, 69], [0, 0, 30, 30]]), none]
    if not objects:
        targets, proposals = [NO_OBJECTS, NO_OBJECTS], [none, none]
    losses = model.losses(images, SIZES, targets, proposals)
    check_training(model, losses, ["class", "box"])
    assert all((loss > 0) == objects for loss in losses.values())


@EVERY_NETWORK
def test_a_network_that_proposes_nothing(name):
    model = detector(name)
    nn.init.constant_(model.rpn.regressor.bias, math.nan)  # no box is one
    images, targets = batch()
    with torch.no_grad():
        features = model.eval().features(images)
        proposals = [found.boxes for found in model.propose(features, SIZES)]
        assert [len(boxes) for boxes in proposals] == [0, 0]
        for found in model(images, SIZES):
            assert found.scores.shape == (0, 3)
            assert found.boxes.shape in ((0, 4), (0, 3, 4))
    # The objects themselves remain to train on.
    losses = model.train().losses(images, SIZES, targets)
    assert losses["class"].isfinite()
    assert losses["class"] > 0


@EVERY_NETWORK
def test_odd_boxes(name):
    model = detector(name)
    images, _ = batch()
    nan, inf = math.nan, math.inf
    odd = [[10.0, 10, 60, 70], [-500, -500, -400, -400], [1000, 1000, 2000, 2000]]
    odd += [[-1e30, -1e30, 1e30, 1e30], [30, 30, 30, 30], [60, 60, 20, 20]]
    odd = torch.tensor([*odd, [nan, 0, 10, 10], [0, 0, inf, 10]])
    targets = [Target(odd, torch.zeros(8, dtype=torch.int64)), NO_OBJECTS]
    losses = model.losses(images, SIZES, targets, [odd, odd])
    check_training(model, losses, ["class", "box"])

    model.eval()
    with torch.no_grad():
        alone = model(images, SIZES, [odd[:1], odd[:0]])[0]
        among = model(images, SIZES, [odd, odd])[0]
    # The good box gets the same result as without the others.
    torch.testing.assert_close(among.scores[:1], alone.scores)
    torch.testing.assert_close(among.boxes[:1], alone.boxes)
    assert among.scores.shape == (8, 3)
    # What is no box gives no box.
    assert among.boxes[6:].isnan().flatten(1).any(dim=1).all()


@EVERY_NETWORK
@torch.no_grad()
def test_candidates_lie_in_their_image(name):
    model = detector(name).eval()
    images, _ = batch()
    for (height, width), found in zip(SIZES, model(images, SIZES), strict=True):
        assert len(found.boxes) == len(found.scores) > 20
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        assert found.boxes.amin() >= 0
        assert found.boxes[..., 0::2].amax() <= width
        assert found.boxes[..., 1::2].amax() <= height
        assert (found.scores > 0).all()
        assert (found.scores.sum(dim=1) < 1).all()


@torch.no_grad()
def test_boxes_are_refined_in_their_own_units():
    model = detector("R-FCN").eval()
    model.box_maps.weight.zero_()
    # (dx, dy, dw, dh), each 49 bins: half a width to the right, twice as high.
    model.box_maps.bias[:] = torch.tensor([5, 0, 0, 5 * math.log(2)]).repeat_interleave(49)
    images, _ = batch()
    proposals = [torch.tensor([[32.0, 16, 64, 32]]), torch.zeros(0, 4)]
    found = model(images, SIZES, proposals)[0]
    torch.testing.assert_close(found.boxes, torch.tensor([[48.0, 8, 80, 40]]))


@EVERY_NETWORK
def test_no_gradient_goes_through_proposals(name):
    model = detector(name)
    images, targets = batch()
    losses = model.losses(images, SIZES, targets)
    (losses["class"] + losses["box"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.rpn.parameters())


def test_sampling_is_reproducible_with_a_seed():
    model = detector("Faster R-CNN").eval()
    images, targets = batch()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(torch.stack(list(model.losses(images, SIZES, targets).values())).tolist())
    assert found[0] == found[1] != found[2]


def test_wrong_inputs():
    model = detector("R-FCN")
    images, targets = batch()
    message = "expected {} to have one entry for each of 2 images, but got {}"
    with pytest.raises(ValueError, match=message.format("sizes", 1)):
        model.losses(images, SIZES[:1], targets)
    with pytest.raises(ValueError, match=message.format("targets", 3)):
        model.losses(images, SIZES, [*targets, NO_OBJECTS])
    with pytest.raises(ValueError, match=message.format("proposals", 0)):
        model.losses(images, SIZES, targets, [])
    for label in (-1, 3):
        wrong = [NO_OBJECTS, Target(torch.ones(1, 4), torch.tensor([label]))]
        message = rf"expected labels of targets\[1\] to be 0 to 2, but got {label}"
        with pytest.raises(ValueError, match=message):
            model.losses(images, SIZES, wrong)
    wrong = [NO_OBJECTS, Target(torch.ones(2, 4), torch.tensor([0]))]
    with pytest.raises(ValueError, match=r"to have boxes \[n, 4\] .*, but got \[2, 4\] and \[1\]"):
        model.losses(images, SIZES, wrong)


@pytest.mark.parametrize("sampling", ["bins", "msra", "aligned"])
@pytest.mark.parametrize("network", [RFCN, FasterRCNN])
def test_deformable_starts_as_average(network, sampling):
    torch.manual_seed(0)
    features = backbone("resnet18", reduce_channels=16)
    baseline, deformable = (
        network(features, 3, RPN(256), pool=pool, sampling=sampling).eval()
        for pool in ("average", "deformable")
    )
    missing = deformable.load_state_dict(baseline.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    pools = ("score_pool", "box_pool") if network is RFCN else ("deform_pool",)
    offset = "conv_offset" if network is RFCN else "fc_offset"
    names = [f"{pool}.{offset}.{kind}" for pool in pools for kind in ("weight", "bias")]
    assert missing.missing_keys == names
    last = torch.randn(2, 16, 9, 10)
    before = baseline.box_head(last, BOXES)
    for a, b in zip(before, deformable.box_head(last, BOXES), strict=True):
        # Bit for bit but for the order in which the bins of another memory layout are summed.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    deformable.get_parameter(names[1]).data[:] = 1
    assert not torch.equal(deformable.box_head(last, BOXES)[0], before[0])


@pytest.mark.parametrize("network", [RFCN, FasterRCNN])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, r"expected pool to be one of .*, but got 'mean'"),
        ({"bins": 0}, "expected bins to be at least 1, but got 0"),
        ({"num_classes": 0}, "expected num_classes to be at least 1, but got 0"),
    ],
)
def test_wrong_arguments(network, options, message):
    options = {"num_classes": 3, "pool": "average"} | options
    with pytest.raises(ValueError, match=message):
        network(backbone("resnet18"), rpn=RPN(256), **options)


@pytest.mark.parametrize("name", ["deformable R-FCN", "deformable Faster R-CNN"])
def test_learns(name):
    model = detector(name, post_nms=20)
    torch.manual_seed(0)
    images = 0.1 * torch.randn(2, 3, 64, 64)
    boxes = [torch.tensor([[6.0, 14, 46, 54]]), torch.tensor([[20.0, 6, 60, 62]])]
    targets = [Target(box, torch.tensor([i])) for i, box in enumerate(boxes)]
    for i, box in enumerate(boxes):
        x1, y1, x2, y2 = box[0].int().tolist()
        images[i, i, y1:y2, x1:x2] += 3
    sizes = [(64, 64)] * 2
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3))
    totals = []
    for _ in range(8):
        optimizer.zero_grad()
        total = sum(model.losses(images, sizes, targets).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    for parameter_name, parameter in model.named_parameters():
        if "_offset." in parameter_name:
            assert parameter.any(), parameter_name
