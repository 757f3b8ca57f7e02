import math

import pytest
import torch
from detector_testing import NO_OBJECTS, iou, make_target, random_boxes
from torch import nn
from torchvision.ops import nms

from deformnet.models.backbones import backbone
from deformnet.models.detection.boxes import decode, encode
from deformnet.models.detection.detector import Target
from deformnet.models.detection.postprocess import postprocess
from deformnet.models.detection.rpn import RPN, RPNDetector, RPNOutput, top_nms

MAP = (4, 5)  # of images up to 64 x 80
SIZES = [(64, 80), (50, 33)]  # the second has 4 x 3 units of its own


def small(num_classes=3, **options):
    torch.manual_seed(0)
    return RPN(8, num_classes, **({"sizes": (16, 40), "ratios": (0.5, 1.3)} | options))


def answers(rpn, images=2, scale=1.0):
    """Random answers for a batch."""
    count = MAP[0] * MAP[1] * len(rpn.unit_anchors)
    return RPNOutput(
        (torch.randn(images, count, rpn.num_classes + 1) * scale).requires_grad_(),
        (torch.randn(images, count, 4) * 0.3 * scale).requires_grad_(),
    )


def own_anchors(rpn, size):
    """Places, among all anchors of the map, of those whose unit begins inside the image."""
    each = len(rpn.unit_anchors)
    return [
        (i * MAP[1] + j) * each + a
        for i in range(MAP[0])
        for j in range(MAP[1])
        for a in range(each)
        if 16 * i < size[0] and 16 * j < size[1]
    ]


def clipped(box, size):
    height, width = size
    return [
        min(max(value, 0.0), limit)
        for value, limit in zip(box, (width, height, width, height), strict=True)
    ]


def test_predictions_are_ordered_as_the_anchors():
    rpn = small()
    output = rpn(torch.randn(2, 8, *MAP))
    assert output.logits.shape == (2, 4 * 5 * 4, 4)
    assert output.deltas.shape == (2, 4 * 5 * 4, 4)
    # A map of one unit that answers with the number of its channel, at every unit.
    for layer in (rpn.classifier, rpn.regressor):
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.arange(16.0)
    output = rpn(torch.randn(2, 8, *MAP))
    expected = torch.arange(16.0).view(4, 4).repeat(20, 1).expand(2, -1, -1)
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.deltas, expected)
    # Which unit an answer belongs to.
    nn.init.zeros_(rpn.conv.weight)
    rpn.conv.weight.data[0, 0, 1, 1] = 1
    rpn.classifier.weight.data[:, 0] = 1
    rpn.classifier.bias.data.zero_()
    units = torch.zeros(1, 8, *MAP)
    units[0, 0] = torch.arange(20.0).view(MAP)
    assert torch.equal(rpn(units).logits[0, :, 0], torch.arange(20.0).repeat_interleave(4))
    anchors = rpn.anchors(MAP, units.device)
    middles = (anchors[:, :2] + anchors[:, 2:]) / 2 - 0.5
    expected = torch.tensor([[16.0 * (u % 5), 16.0 * (u // 5)] for u in range(20)])
    torch.testing.assert_close(middles, expected.repeat_interleave(4, dim=0))


def test_layers_start_small():
    rpn = RPN(1024, 20)
    assert len(rpn.unit_anchors) == 9
    assert rpn.classifier.out_channels == 21 * 9
    for layer in (rpn.conv, rpn.classifier, rpn.regressor):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("limits", [(1000, 300), (30, 300), (1000, 4)], ids=str)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_proposals_against_loops(num_classes, limits):
    pre_nms, post_nms = limits
    rpn = small(num_classes, pre_nms=pre_nms, post_nms=post_nms, nms=0.5)
    output = answers(rpn)
    output.deltas.data[0, 7, 2:] = -40.0  # a box of no size
    output.logits.data[0, 7, 0] = -40.0  # and certainly an object
    anchors = rpn.anchors(MAP, output.logits.device)
    found = rpn.proposals(output, MAP, SIZES)
    for image, size in enumerate(SIZES):
        boxes = decode(output.deltas[image], anchors).tolist()
        background = output.logits[image].softmax(dim=1)[:, 0].tolist()
        entries = [(1 - background[k], clipped(boxes[k], size)) for k in own_anchors(rpn, size)]
        entries = [e for e in entries if min(e[1][2] - e[1][0], e[1][3] - e[1][1]) >= 1e-3]
        kept = []
        for score, box in sorted(entries, key=lambda entry: -entry[0])[:pre_nms]:
            if all(iou(box, other) <= 0.5 for _, other in kept):
                kept.append((score, box))
        assert post_nms == 4 or 4 < len(kept) < min(pre_nms, len(entries))
        kept = kept[:post_nms]
        torch.testing.assert_close(found[image].scores, torch.tensor([score for score, _ in kept]))
        torch.testing.assert_close(found[image].boxes, torch.tensor([box for _, box in kept]))
        assert not found[image].boxes.requires_grad
        assert not found[image].scores.requires_grad


@pytest.mark.parametrize(("side", "count"), [(20, 5), (300, 5), (300, 40), (3000, 1000)])
def test_nms_of_the_first_boxes_equals_nms_of_all(side, count):
    """If the first few boxes suffice, if more are needed, and if there are too few."""
    corners = torch.rand(2000, 2) * side
    boxes = torch.cat([corners, corners + 50 + 50 * torch.rand(2000, 2)], dim=1)
    scores = torch.rand(2000).sort(descending=True).values
    assert top_nms(boxes, scores, 0.3, count).equal(nms(boxes, scores, 0.3)[:count])


def test_candidates_are_all_anchors_of_the_image():
    rpn = small()
    output = answers(rpn)
    anchors = rpn.anchors(MAP, output.logits.device)
    found = rpn.candidates(output, MAP, SIZES)
    for image, size in enumerate(SIZES):
        own = own_anchors(rpn, size)
        boxes = [clipped(box, size) for box in decode(output.deltas[image], anchors)[own].tolist()]
        torch.testing.assert_close(found[image].boxes, torch.tensor(boxes))
        scores = output.logits[image, own].softmax(dim=1)[:, 1:]
        torch.testing.assert_close(found[image].scores, scores)


def test_an_image_has_the_same_proposals_in_a_batch_and_alone():
    rpn = small()
    output = answers(rpn)
    own = own_anchors(rpn, SIZES[1])
    alone = RPNOutput(output.logits[1:, own], output.deltas[1:, own])
    for method in (rpn.proposals, rpn.candidates):
        batched = method(output, MAP, SIZES)[1]
        for a, b in zip(method(alone, (4, 3), SIZES[1:])[0], batched, strict=True):
            assert torch.equal(a, b)


def test_answers_that_are_not_finite_propose_nothing():
    rpn = small()
    output = answers(rpn)
    output.logits.data[0] = math.nan
    output.deltas.data[1] = math.nan
    for proposals in rpn.proposals(output, MAP, SIZES):
        assert [list(part.shape) for part in proposals] == [[0, 4], [0]]
    # One bad anchor does not hide the others.
    output = answers(rpn)
    before = rpn.proposals(output, MAP, SIZES)[0]
    worst = output.logits[0, :, 0].argmax()
    output.logits.data[0, worst, 1] = math.nan
    after = rpn.proposals(output, MAP, SIZES)[0]
    assert after.boxes.isfinite().all()
    assert after.scores.isfinite().all()
    assert abs(len(before.boxes) - len(after.boxes)) <= 3


def test_certain_answers_keep_their_order():
    # Probabilities of all of these are 1 in float32.
    rpn = small(1, sizes=(16,), ratios=(1,))
    margins = torch.randperm(20) + 30.0
    logits = torch.stack((torch.zeros(20), margins), dim=1)[None]
    (found,) = rpn.proposals(RPNOutput(logits, torch.zeros(1, 20, 4)), MAP, SIZES[:1])
    anchors = rpn.anchors(MAP, logits.device)[margins.argsort(descending=True)]
    boxes = [clipped(box, SIZES[0]) for box in anchors.tolist()]
    torch.testing.assert_close(found.boxes, torch.tensor(boxes))
    assert (found.scores == 1).all()


# What anchors learn ------------------------------------------------------------------------------

TARGETS = [
    # The third is smaller than any anchor: has its best ones alone.
    make_target(
        [[3.0, 5.0, 20.0, 21.0], [30.0, 12.0, 72.0, 50.0], [56.0, 1.0, 60.0, 4.0]], [2, 0, 1]
    ),
    make_target([[1.0, 20.0, 30.0, 49.0]], [1]),
]


def trains(rpn, anchors, size):
    """Places of the anchors that train, by the convention."""
    own = own_anchors(rpn, size)
    if rpn.convention == "modern":
        return own
    return [k for k in own if anchors[k] == clipped(anchors[k], size)]


def assigned(rpn, anchors, size, target):
    """{place of an anchor: number of its object, or None for the background}, by loops."""
    objects = target.boxes.tolist()
    overlaps = {k: [iou(anchors[k], box) for box in objects] for k in trains(rpn, anchors, size)}
    best = [max((row[t] for row in overlaps.values()), default=0) for t in range(len(objects))]
    result = {}
    for k, row in overlaps.items():
        highest = max(row, default=0)
        if highest >= 0.7 or any(value == best[t] and value > 0 for t, value in enumerate(row)):
            result[k] = row.index(highest)
        elif highest < 0.3:
            result[k] = None
    return result


def smooth_l1(x):
    """With the authors' sigma of 3."""
    return 0.5 * (3 * x) ** 2 if abs(x) < 1 / 9 else abs(x) - 0.5 / 9


def loops(rpn, output, targets):
    """Both losses, all anchors sampled."""
    anchors = rpn.anchors(MAP, output.logits.device).double()
    class_losses, box_losses = [], []
    for image, (size, target) in enumerate(zip(SIZES, targets, strict=True)):
        places = assigned(rpn, anchors.tolist(), size, target)
        class_loss = box_loss = 0.0
        for k, t in places.items():
            expected = 0
            if t is not None:
                expected = 1 if rpn.num_classes == 1 else int(target.labels[t]) + 1
                deltas = encode(target.boxes[t : t + 1].double(), anchors[k : k + 1])[0]
                box_loss += sum(
                    smooth_l1(a - b)
                    for a, b in zip(output.deltas[image, k].tolist(), deltas.tolist(), strict=True)
                )
            class_loss -= output.logits[image, k].double().log_softmax(dim=0)[expected].item()
        class_losses.append(class_loss / max(len(places), 1))
        box_losses.append(box_loss / max(len(places), 1))
    count = len(targets)
    return {"rpn_class": sum(class_losses) / count, "rpn_box": sum(box_losses) / count}


@pytest.mark.parametrize("convention", ["modern", "msra2017"])
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("targets", [TARGETS, [TARGETS[0], NO_OBJECTS]], ids=["", "none in one"])
def test_losses_against_loops(num_classes, convention, targets):
    rpn = small(num_classes, convention=convention, sizes=(16, 32), ratios=(1,), batch=100_000)
    output = answers(rpn)
    losses = rpn.losses(output, MAP, SIZES, targets)
    expected = loops(rpn, output, targets)
    assert losses["rpn_class"].shape == losses["rpn_box"].shape == ()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5)
    # The case has all three kinds of anchors.
    anchors = rpn.anchors(MAP, output.logits.device).tolist()
    places = assigned(rpn, anchors, SIZES[0], targets[0])
    assert {t for t in places.values() if t is not None} == {0, 1, 2}
    assert None in places.values()
    assert len(places) < len(trains(rpn, anchors, SIZES[0]))


@pytest.mark.parametrize(
    ("side", "learns"),
    [(13.5, "object"), (13.3, None), (8.8, None), (8.7, "background")],  # IoU .71, .69, .303, .296
)
def test_what_an_anchor_of_a_known_overlap_learns(side, learns):
    rpn = small(sizes=(16, side), ratios=(1,), batch=1000)
    output = answers(rpn, images=1)
    unit = 1 * MAP[1] + 1
    objects = make_target([[8.5, 8.5, 24.5, 24.5]], [2])  # the unit's first anchor
    rpn.losses(output, MAP, SIZES[:1], [objects])["rpn_class"].backward()
    raised = [(row < 0).nonzero().flatten().tolist() for row in output.logits.grad[0]]
    assert raised[2 * unit] == [3]
    assert raised[2 * unit + 1] == {"object": [3], "background": [0], None: []}[learns]


def test_all_anchors_that_tie_for_the_best_train():
    rpn = small(sizes=(16,), ratios=(1,), batch=1000)
    output = answers(rpn, images=1)
    objects = make_target([[22.5, 14.5, 26.5, 18.5]], [0])  # between the units (1, 1) and (1, 2)
    rpn.losses(output, MAP, SIZES[:1], [objects])["rpn_box"].backward()
    trained = output.deltas.grad[0].any(dim=1).nonzero().squeeze(1)
    assert trained.tolist() == [6, 7]


def test_sampling():
    rpn = small(sizes=(16, 24), ratios=(1,), batch=12)
    boxes = random_boxes(15, width=80, height=64, smallest=12)
    targets = [Target(boxes, torch.randint(3, (15,))), NO_OBJECTS]

    def sampled(seed):
        output = answers(rpn)
        torch.manual_seed(seed)
        rpn.losses(output, MAP, SIZES, targets)["rpn_class"].backward()
        return output.logits.grad.any(dim=2), output.logits.grad[..., 0] > 0

    trained, objects = sampled(1)
    assert trained.sum(dim=1).tolist() == [12, 12]  # 12 of each image
    assert objects.sum(dim=1).tolist() == [6, 0]  # half of them objects, where there are any
    assert not trained[1, [k for k in range(40) if k not in own_anchors(rpn, SIZES[1])]].any()
    again, _ = sampled(1)
    other, _ = sampled(2)
    assert torch.equal(trained, again)
    assert not torch.equal(trained, other)


@pytest.mark.parametrize("convention", ["modern", "msra2017"])
@pytest.mark.parametrize(
    "box",  # not a number, no area, outside, inverted
    [[math.nan, 3.0, 20, 30], [10.0] * 4, [500.0, 500, 520, 520], [20.0, 30, 10, 5]],
    ids=str,
)
def test_an_object_that_no_anchor_overlaps_trains_nothing(box, convention):
    rpn = small(convention=convention, batch=1000)
    output = answers(rpn)
    good = TARGETS[0]
    bad = make_target([box], [1])
    both = Target(torch.cat((bad.boxes, good.boxes)), torch.cat((bad.labels, good.labels)))
    for targets, like in ([[both, bad], [good, NO_OBJECTS]], [[bad, bad], [NO_OBJECTS] * 2]):
        losses = rpn.losses(output, MAP, SIZES, targets)
        expected = rpn.losses(output, MAP, SIZES, like)
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], msg=name)


def test_no_anchor_that_trains_gives_zero_with_zero_gradients():
    rpn = small(convention="msra2017")
    size = (10, 12)  # smaller than every anchor
    losses = rpn.losses(rpn(torch.randn(1, 8, 1, 1)), (1, 1), [size], TARGETS[:1])
    assert {name: loss.item() for name, loss in losses.items()} == {"rpn_class": 0, "rpn_box": 0}
    sum(losses.values()).backward()
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("label", [3, -1, 255])
def test_labels_out_of_range(label):
    rpn = small(3)
    targets = [Target(TARGETS[1].boxes, torch.tensor([label])), NO_OBJECTS]
    message = f"expected labels of targets to be 0 to 2, but got {label}"
    with pytest.raises(ValueError, match=message):
        rpn.losses(answers(rpn), MAP, SIZES, targets)
    rpn = small(1)  # tells no classes apart
    assert rpn.losses(answers(rpn), MAP, SIZES, targets)["rpn_box"] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_classes": 0}, "expected num_classes to be at least 1, but got 0"),
        ({"batch": 0}, "expected batch to be at least 1, but got 0"),
        ({"pre_nms": 0}, "expected pre_nms to be at least 1, but got 0"),
        ({"post_nms": -1}, "expected post_nms to be at least 1, but got -1"),
        ({"nms": 7}, "expected nms to be an IoU from 0 to 1, but got 7"),
        ({"sizes": ()}, r"expected sizes to be positive numbers, but got \(\)"),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        small(**changed)


# The detector ------------------------------------------------------------------------------------


def detector(*, class_aware, **options):
    torch.manual_seed(0)
    features = backbone("resnet18", reduce_channels=32, deform_layers=2)
    channels, classes = (32, 3) if class_aware else (features.conv4_channels, 1)
    rpn = RPN(channels, classes, sizes=(16, 32), ratios=(1,), **options)
    return RPNDetector(features, rpn, class_aware=class_aware)


def test_wrong_rpn():
    features = backbone("resnet18", reduce_channels=32)
    with pytest.raises(ValueError, match="expected rpn to have 32 input channels, but got 256"):
        RPNDetector(features, RPN(256, 3), class_aware=True)
    with pytest.raises(ValueError, match="expected rpn to have 1 class, but got 3"):
        RPNDetector(features, RPN(256, 3), class_aware=False)


@torch.no_grad()
@pytest.mark.parametrize("convention", ["modern", "msra2017"])
def test_class_aware_candidates_come_from_conv5(convention):
    model = detector(class_aware=True, convention=convention).eval()
    images = torch.randn(2, 3, *SIZES[0])
    found = model(images, SIZES)
    features = model.features(images)
    expected = model.rpn.candidates(model.rpn(features.last), MAP, SIZES)
    assert features.last.shape[1] == 32
    for image, own in enumerate((40, 24)):
        assert found[image].boxes.shape == (own, 4)
        assert found[image].scores.shape == (own, 3)
        for a, b in zip(found[image], expected[image], strict=True):
            torch.testing.assert_close(a, b)
    assert not model.takes_proposals
    assert all(len(proposals.boxes) for proposals in model.propose(features, SIZES))


def test_class_agnostic_rpn_skips_conv5():
    model = detector(class_aware=False).eval()
    model.backbone.layer4 = nn.Identity()  # would give maps of another width
    images = torch.randn(2, 3, *SIZES[0])
    with torch.no_grad():
        features = model.features(images)
        found = model(images, SIZES)
        proposals = model.propose(features, SIZES)
    assert model.num_classes == 1
    assert features.conv4.shape == (2, 256, *MAP)
    for candidates, expected in zip(found, proposals, strict=True):
        assert torch.equal(candidates.boxes, expected.boxes)
        assert torch.equal(candidates.scores, expected.scores[:, None])


@pytest.mark.parametrize("class_aware", [True, False])
def test_every_trainable_parameter_has_a_gradient(class_aware):
    # Processes that train together wait for the gradient of every parameter that trains.
    model = detector(class_aware=class_aware)
    losses = model.losses(torch.randn(2, 3, *SIZES[0]), SIZES, [NO_OBJECTS, NO_OBJECTS])
    assert list(losses) == ["rpn_class", "rpn_box"]
    assert losses["rpn_box"].item() == 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        frozen = not class_aware and name.startswith(("backbone.layer4.", "backbone.reduce."))
        assert parameter.requires_grad != frozen, name


@pytest.mark.parametrize("class_aware", [True, False])
def test_stored_proposals_are_refused(class_aware):
    model = detector(class_aware=class_aware)
    images = torch.randn(1, 3, 32, 32)
    stored = [torch.tensor([[0.0, 0.0, 9.0, 9.0]])]
    message = "expected proposals to be None for a region proposal network, but got stored boxes"
    with pytest.raises(ValueError, match=message):
        model.losses(images, [(32, 32)], [NO_OBJECTS], stored)
    with pytest.raises(ValueError, match=message):
        model(images, [(32, 32)], stored)


@pytest.mark.parametrize("class_aware", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (17, 40)], ids=str)
def test_small_images(class_aware, size):
    model = detector(class_aware=class_aware).eval()
    objects = make_target([[0.0, 0.0, size[1], size[0]]], [1])
    losses = model.losses(torch.randn(1, 3, *size), [size], [objects])
    sum(losses.values()).backward()
    assert losses["rpn_class"] > 0
    with torch.no_grad():
        (found,) = model(torch.randn(1, 3, *size), [size])
    assert found.boxes[:, 2].max() <= size[1]
    assert found.boxes[:, 3].max() <= size[0]


def test_learns_the_boxes_and_classes_of_a_batch():
    rpn = small(3, batch=40)
    features = torch.randn(2, 8, *MAP)
    objects = [Target(TARGETS[0].boxes[:2], TARGETS[0].labels[:2]), TARGETS[1]]
    optimizer = torch.optim.Adam(rpn.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        sum(rpn.losses(rpn(features), MAP, SIZES, objects).values()).backward()
        optimizer.step()
    found = rpn.candidates(rpn(features), MAP, SIZES)
    for candidates, target in zip(found, objects, strict=True):
        detections = postprocess(candidates, score_threshold=0.5)
        assert sorted(detections.labels.tolist()) == sorted(target.labels.tolist())
        for box, label in zip(target.boxes.tolist(), target.labels, strict=True):
            (best,) = (detections.labels == label).nonzero()
            assert iou(detections.boxes[int(best)].tolist(), box) > 0.8
