"""Boxes in plain Python numbers, as the tests compare with."""

import torch


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
