import pytest
import torch
import torch.nn.functional as F
from detector_testing import BOXES, NO_OBJECTS, count_parameters
from torchvision.ops import roi_align

from deformnet import parameter_groups
from deformnet.models.backbones import backbone
from deformnet.models.detection.rfcn import RFCN
from deformnet.models.detection.rpn import RPN


def network(classes=3, **options):
    torch.manual_seed(0)
    features = backbone("resnet18", reduce_channels=16)
    return RFCN(features, classes, RPN(features.conv4_channels), **options).eval()


def test_scores_and_boxes_are_the_vote_of_the_bins():
    model, last = network(pool="average"), torch.randn(2, 16, 9, 10)
    logits, deltas = model.box_head(last, BOXES)
    assert logits.shape == (3, 4)
    assert deltas.shape == (3, 4)
    # The first box is 7 x 7 cells, from (1, 2) on: each bin is a cell of its own map.
    for maps, found in ((model.score_maps(last), logits), (model.box_maps(last), deltas)):
        for output in range(4):
            votes = [
                maps[0, (output * 7 + i) * 7 + j, 2 + i, 1 + j] for i in range(7) for j in range(7)
            ]
            torch.testing.assert_close(found[0, output], sum(votes) / 49, rtol=1e-4, atol=1e-5)


def test_aligned_boxes_are_edges():
    model, last = network(pool="average", sampling="aligned"), torch.randn(2, 16, 9, 10)
    logits, _ = model.box_head(last, BOXES)
    # All maps pooled with torchvision's RoIAlign, of which bin (i, j) takes its own.
    pooled = roi_align(model.score_maps(last), BOXES, 7, 1 / 16, sampling_ratio=4, aligned=True)
    pooled = pooled.unflatten(1, (4, 7, 7))
    votes = torch.einsum("rcijij->rc", pooled) / 49
    torch.testing.assert_close(logits, votes, rtol=1e-4, atol=1e-5)


def test_classes_have_their_own_offsets_and_boxes_common_ones():
    model, last = network(pool="deformable"), torch.randn(2, 16, 9, 10)
    assert model.score_pool.offsets(last, BOXES).shape == (3, 2 * 4, 7, 7)
    assert model.box_pool.offsets(last, BOXES).shape == (3, 2, 7, 7)
    before, boxes_before = model.box_head(last, BOXES)
    # (x, y) of 7 x 7 bins in the group of class 2, which is the third with the background.
    model.score_pool.conv_offset.bias.data[2 * 98 : 3 * 98] = 1
    logits, deltas = model.box_head(last, BOXES)
    assert (logits != before).any(dim=0).tolist() == [False, False, True, False]
    assert torch.equal(deltas, boxes_before)
    model.box_pool.conv_offset.bias.data[:] = 1
    logits_after, deltas = model.box_head(last, BOXES)
    assert torch.equal(logits_after, logits)
    assert (deltas != boxes_before).any(dim=0).all()


def test_all_rois_train_and_the_hardest_count():
    model = network(pool="average")
    images, sizes = torch.randn(1, 3, 160, 160), [(160, 160)]
    corners = 100 * torch.rand(300, 2)
    proposals = [torch.cat((corners, corners + 10 + 40 * torch.rand(300, 2)), dim=1)]
    loss = model.losses(images, sizes, [NO_OBJECTS], proposals)["class"]
    logits, _ = model.box_head(model.features(images).last, proposals)
    assert len(logits) == 300
    each = F.cross_entropy(logits, torch.zeros(300, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(loss, each.sort(descending=True).values[:128].mean())


def test_votes_are_float32_under_autocast():
    model, last = network(pool="deformable"), torch.randn(2, 16, 9, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(votes.dtype == torch.float32 for votes in model.box_head(last, BOXES))


def test_start():
    model = network(classes=20, pool="deformable")
    for layer in (model.score_maps, model.box_maps):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()
    assert not any(p.any() for p in model.score_pool.parameters())
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, 0.1)}
    assert rates["offset weights"] == rates["offset biases"] == 0.1


def test_parameters_of_the_papers_network():
    plain = count_parameters(RFCN, 1024, 0, "average")
    # ResNet-101 and its reduction; RPN; 7 x 7 maps of 21 scores and 4 sides.
    rpn = (9 * 1024 + 1) * 512 + 513 * 9 * 2 + 513 * 9 * 4
    assert plain == 42_500_160 + 2049 * 1024 + rpn + 1025 * 49 * (21 + 4)
    # Offsets of three 3x3 convolutions; 21 groups for the scores, one for the boxes.
    added = 3 * (9 * 512 + 1) * 18 + 1025 * 98 * (21 + 1)
    assert count_parameters(RFCN, 1024, 3, "deformable") - plain == added == 2_458_786
