"""Boxes that the tests of detectors share, and their overlaps in plain Python numbers."""

import torch

from deformnet.models.backbones import backbone
from deformnet.models.detection.detector import Target
from deformnet.models.detection.rpn import RPN

NO_OBJECTS = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
# Two of one image and one of another.
BOXES = [torch.tensor([[16.0, 32, 113, 129], [3, 5, 60, 41]]), torch.tensor([[20.0, 9, 90, 141]])]


def make_target(boxes, labels):
    return Target(torch.tensor(boxes), torch.tensor(labels))


def count_parameters(network, reduce_channels, deform_layers, pool):
    """Of a network on ResNet-101 for the classes of VOC."""
    with torch.device("meta"):
        options = {"deform_layers": deform_layers, "reduce_channels": reduce_channels}
        model = network(backbone("resnet101", **options), 20, RPN(1024), pool=pool)
    return sum(parameter.numel() for parameter in model.parameters())


def iou(a, b):
    """IoU of two boxes x1, y1, x2, y2; 0 where they have no area in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if not (width > 0 and height > 0):
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def random_boxes(count, *, width=100.0, height=60.0, smallest=2.0):
    """float32 [count, 4], their centers in an image of `width` x `height`."""
    centers = torch.rand(count, 2) * torch.tensor([width, height])
    halves = smallest / 2 + torch.rand(count, 2) * torch.tensor([width, height]) / 3
    return torch.cat((centers - halves, centers + halves), dim=1)
