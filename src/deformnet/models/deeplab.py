"""DeepLab for semantic segmentation, as in Dai et al. 2017, section 2.3."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.models.backbones import Backbone

IGNORE = 255  # the label of pixels that neither train nor count


class DeepLab(nn.Module):
    """A backbone, a 1x1 convolution that scores the classes, and bilinear upsampling.

    The upsampling is the authors' fixed one (a bilinear kernel of 32 at stride 16, cropped by 8):
    unit (i, j) of the backbone scores the middle of the cell that begins at pixel
    stride * (i, j), whatever the size of the image. At its border scores are repeated, where the
    authors' kernel fades to zero.

    Args:
        backbone: makes feature maps [N, out_channels, ceil(H/stride), ceil(W/stride)].
        num_classes: classes including the background, 1 to 255.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes: wanted 1 to {IGNORE}, got {num_classes}")
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.classifier = nn.Conv2d(backbone.out_channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    def forward(self, images: Tensor) -> Tensor:
        """Scores before the softmax: [N, 3, H, W] -> [N, num_classes, H, W], float32 or better."""
        scores = self.classifier(self.backbone(images))
        # In half precision the upsampled scores of two classes would often tie.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = F.interpolate(scores, scale_factor=self.backbone.stride, mode="bilinear")
        # The backbone rounds its size up.
        return scores[..., : images.shape[-2], : images.shape[-1]]

    def losses(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Softmax loss, averaged over the valid pixels of the batch.

        Args:
            logits: [N, num_classes, H, W], as `forward` returns them.
            target: [N, H, W] int64, class of each pixel; 255 is ignored.

        Returns:
            {"segmentation": scalar}; zero, with zero gradients, if no pixel is valid.

        Raises:
            ValueError: if the shapes disagree, or (seen on the CPU; elsewhere the device would
                have to wait for it, and its own assertion stops the program) a label is no class.
            TypeError: if `target` is not int64.
        """
        wanted = [logits.shape[0], *logits.shape[2:]]
        if list(target.shape) != wanted:
            raise ValueError(f"target: wanted {wanted} like the logits, got {list(target.shape)}")
        if target.dtype != torch.int64:
            raise TypeError(f"target: wanted int64, got {target.dtype}")
        valid = target != IGNORE
        if target.device.type == "cpu":
            wrong = target[valid & ((target < 0) | (target >= self.num_classes))]
            if wrong.numel():
                raise ValueError(
                    f"target: wanted labels 0 to {self.num_classes - 1} or {IGNORE}, "
                    f"got {int(wrong[0])}"
                )
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return {"segmentation": total / valid.sum().clamp(min=1)}
