"""Boxes as a network predicts them: shifts and stretches of boxes that are given.

Girshick et al. 2014, appendix C: (dx, dy) is how far the centre moves, in widths and heights of the
given box, and (dw, dh) the logarithm of how the size grows. To clip boxes to an image there is
`torchvision.ops.clip_boxes_to_image`.
"""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

Stds = tuple[float, float, float, float]

UNIT: Stds = (1.0, 1.0, 1.0, 1.0)
"""No normalisation: region proposal networks."""

HEAD: Stds = (0.1, 0.1, 0.2, 0.2)
"""What the heads of Faster R-CNN and R-FCN divide (dx, dy, dw, dh) by, to even out the loss."""


def encode(boxes: Tensor, anchors: Tensor, stds: Stds = UNIT) -> Tensor:
    """What a network should answer at `anchors` to give `boxes`.

    Args:
        boxes: [K, 4].
        anchors: [K, 4], the given boxes.
        stds: by which the answer is divided.

    Returns:
        [K, 4], (dx, dy, dw, dh). Not finite where a box or an anchor has no area.
    """
    return _coder(stds).encode_single(boxes, anchors)


def decode(deltas: Tensor, anchors: Tensor, stds: Stds = UNIT) -> Tensor:
    """The boxes that a network's answers at `anchors` mean; not clipped to the image.

    A box grows to at most 62.5 (1000 / 16) times the width and height of its anchor, so that a
    wild answer remains finite.

    Args:
        deltas: [K, 4], or [K, C, 4] where every class has its own.
        anchors: [K, 4], the given boxes.
        stds: as in `encode`.

    Returns:
        the shape of `deltas`, float32 or better.
    """
    # Half precision would round corners to several pixels.
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    return _coder(stds).decode_single(deltas.flatten(1), anchors).reshape(deltas.shape)


def _coder(stds: Stds) -> BoxCoder:
    x, y, w, h = stds
    return BoxCoder((1 / x, 1 / y, 1 / w, 1 / h))
