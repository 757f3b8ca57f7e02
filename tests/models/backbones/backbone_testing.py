"""Networks that the tests of backbones share."""

import torch
import torchvision
from torch import nn

from deformnet.models.backbones import backbone


def bare(name, **options):
    """A backbone without memory, for its structure."""
    with torch.device("meta"):
        return backbone(name, **options)


def randomize_norms(model):
    """Statistics and scales of a network's batch norms, so that they do something."""
    ranges = {"running_mean": (-0.5, 0.5), "running_var": (0.5, 2), "bias": (-0.5, 0.5)}
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
            for name, limits in {**ranges, "weight": (0.2, 0.5)}.items():
                nn.init.uniform_(getattr(module, name), *limits)


def torchvision_resnet(depth):
    """A ResNet of torchvision whose batch norm does something, in float64."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(f"resnet{depth}").double().eval()
    randomize_norms(model)
    return model
