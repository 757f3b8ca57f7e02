"""Runs of tiny networks with random offsets, and images for them."""

import torch
from torch import nn

from deformnet import DeformConv2d
from deformnet.engine.runs import checkpoint_path, describe, save_checkpoint
from deformnet.nn import DeformPSRoIPool2d
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, FasterRCNNRecipe, Recipe, RFCNRecipe
from deformnet.tasks import DataIdentity
from pictures import smooth_noise

CLASSES = ("background", "one", "two")


def segmenter(deform_layers=2):
    sizes = {"short_side": 160, "max_side": 240}
    return DeepLabRecipe(backbone="resnet18", deform_layers=deform_layers, **sizes)


DETECTOR = {"backbone": "resnet18", "short_side": 64, "max_side": 96, "bins": 3}
DETECTOR |= {"anchor_sizes": (16, 32), "proposals": 20}


def rfcn(deform_layers=1, pool="deformable"):
    options = {"deform_layers": deform_layers, "pool": pool, "score_threshold": 0.0}
    return RFCNRecipe(**DETECTOR, **options)


def faster_rcnn():
    return FasterRCNNRecipe(**DETECTOR, deform_layers=0)


def classifier():
    sizes = {"resize": (64, 64), "test_short_side": 64, "crop": 64}
    return ClassifierRecipe(backbone="resnet18", deform_layers=1, **sizes)


def write_run(folder, recipe: Recipe, classes=CLASSES):
    """Write a run folder with random weights and offsets of a cell or two."""
    torch.manual_seed(7)
    model = recipe.build_model(len(classes))
    for layer in model.modules():
        if isinstance(layer, DeformConv2d):
            nn.init.normal_(layer.conv_offset.weight, std=0.02)
            nn.init.normal_(layer.conv_offset.bias, std=0.7)
        elif isinstance(layer, DeformPSRoIPool2d):
            nn.init.normal_(layer.conv_offset.bias, std=2.0)
    checkpoint = {
        "deformnet": describe(recipe, DataIdentity(classes, 1, "")),
        "model": model.state_dict(),
        "optimizer": {},
        "precision": {},
        "iteration": 1,
    }
    save_checkpoint(checkpoint, checkpoint_path(folder))
    return folder


def noise(height, width):
    """Return an image uint8 [3, H, W] so dark that no pixel has the color of a dot."""
    return smooth_noise(height, width, 150)
