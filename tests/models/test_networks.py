"""Every network on every backbone."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deformnet import parameter_groups
from deformnet.models import RFCN, RPN, Classifier, DeepLab, Detector, FasterRCNN, RPNDetector
from deformnet.models.backbones import aligned_inception_resnet, backbone

BACKBONES = ["resnet18", "resnet34", "resnet50", "resnet101", "aligned-inception-resnet"]
ANCHORS = {"sizes": (16, 32), "ratios": (1,)}


def build(network, name):
    model = backbone(name, deform_layers=2, reduce_channels=8)
    if network in (Classifier, DeepLab):
        return network(model, 3)
    rpn = RPN(model.conv4_channels, **ANCHORS)
    if network in (RFCN, FasterRCNN):
        return network(model, 3, rpn, pool="deformable", bins=2)
    class_aware = network == "class-aware RPN"
    rpn = RPN(model.out_channels, 3, **ANCHORS) if class_aware else rpn
    return RPNDetector(model, rpn, class_aware=class_aware)


@pytest.fixture
def few_blocks(monkeypatch):
    """Aligned-Inception-ResNet with one block of each kind instead of up to 22 alike."""
    monkeypatch.setattr(aligned_inception_resnet, "_BLOCKS", (2, 2, 2, 2))


POOLS = {FasterRCNN: "deform_pool", RFCN: "score_pool"}


@pytest.mark.parametrize(
    "network", [Classifier, DeepLab, "RPN", "class-aware RPN", FasterRCNN, RFCN]
)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_network_trains_on_every_backbone(few_blocks, network, name):
    if name in ("resnet34", "resnet50", "resnet101"):  # as resnet18, without the arithmetic
        with torch.device("meta"):
            build(network, name)
        return
    torch.manual_seed(0)
    model = build(network, name)
    assert model.deformable_pooling == POOLS.get(network)
    assert model.uses_conv5 == (network != "RPN")
    names = model.reported_classes(("a", "b", "c"))
    assert len(names) == model.num_classes
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-3), 1e-3)
    for autocast in (False, True):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = model.random_losses(torch.randn(2, 3, 48, 64))()
            outputs = model(torch.randn(2, 3, 48, 64))
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert all(t.dtype == torch.float32 for t in tree_leaves(outputs))
        sum(losses.values()).backward()
        for parameter in model.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            assert parameter.grad is None or parameter.grad.isfinite().all()
        optimizer.step()
    if isinstance(model, Detector):
        assert model.takes_proposals == (network in POOLS)
        model.freeze_rpn()
        assert not any(parameter.requires_grad for parameter in model.rpn.parameters())
    with torch.no_grad():
        assert len(model.eval()(torch.randn(2, 3, 48, 64))) == 2
