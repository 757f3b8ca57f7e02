"""Box regression: encoding of boxes relative to anchors or proposals.

Girshick et al. 2014, appendix C: (dx, dy) is the shift of the center in widths and heights of the
anchor, and (dw, dh) the logarithm of the change in size. `torchvision.ops.clip_boxes_to_image`
clips boxes to an image.
"""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

Stds = tuple[float, float, float, float]

UNIT: Stds = (1.0, 1.0, 1.0, 1.0)
"""Standard deviations of region proposal networks: no normalization."""

HEAD: Stds = (0.1, 0.1, 0.2, 0.2)
"""Standard deviations of (dx, dy, dw, dh) in the heads of Faster R-CNN and R-FCN."""


def encode(boxes: Tensor, anchors: Tensor, stds: Stds = UNIT) -> Tensor:
    """Regression targets (dx, dy, dw, dh) of boxes [K, 4] relative to anchors [K, 4].

    They are divided by `stds`, and not finite where a box or an anchor has no area.
    """
    return _coder(stds).encode_single(boxes, anchors)


def decode(deltas: Tensor, anchors: Tensor, stds: Stds = UNIT) -> Tensor:
    """Boxes of predicted deltas, not clipped to the image.

    A box has at most 62.5 (1000 / 16) times the width and height of its anchor, so that its size
    stays finite. Deltas are [K, 4], or [K, C, 4] with class-specific boxes, and anchors [K, 4]. The
    result has the shape of the deltas, in float32 or better.
    """
    # Half precision would round corners to several pixels.
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    return _coder(stds).decode_single(deltas.flatten(1), anchors).reshape(deltas.shape)


def _coder(stds: Stds) -> BoxCoder:
    x, y, w, h = stds
    return BoxCoder((1 / x, 1 / y, 1 / w, 1 / h))
