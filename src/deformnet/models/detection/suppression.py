"""Box selection without data-dependent shapes, for exported networks."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

MISSING = -torch.inf
"""Score of missing boxes, which pad the others to a fixed number."""
_NOWHERE = (-2.0, -2.0, -1.0, -1.0)  # outside every image, so that it suppresses no other box


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of [..., K] and their indices, padded with `MISSING` scores."""
    padded, last = F.pad(scores, (0, count), value=MISSING), scores.shape[-1] - 1
    values, order = padded.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count].clamp(max=last)


def best(boxes: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` boxes [..., K, 4] with the highest scores [..., K], padded with missing ones."""
    scores, order = top(scores, count)
    boxes = boxes.gather(-2, order[..., None].expand(*order.shape, 4))
    # All missing boxes are identical, so the first one suppresses the others.
    missing = (scores == MISSING)[..., None]
    return torch.where(missing, boxes.new_tensor(_NOWHERE), boxes), scores


def suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Scores [K] after non-maximum suppression, `MISSING` for suppressed boxes [K, 4].

    Args:
        boxes, scores: The result of `best`.
        threshold: IoU threshold.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept = kept.index_fill(0, ops.nms(boxes, scores, threshold), True)
    return torch.where(kept, scores, MISSING)
