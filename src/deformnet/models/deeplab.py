"""DeepLab for semantic segmentation, as in Dai et al. 2017, section 2.3."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.backbones.resnet import ResNetFeatures

IGNORE = 255  # the label of pixels that neither train nor count


class DeepLab(nn.Module):
    """A backbone, a 1x1 convolution that scores the classes, and bilinear upsampling.

    Unlike usual code, the scores are drawn where they belong: a unit of the backbone is centred on
    pixel stride * (i, j), and that pixel gets its score unmixed. Upsampling by the sizes alone
    would shift them by up to half a unit (8 pixels), which a network has to learn to undo, and
    which a deformable one can undo by constant offsets.

    Args:
        backbone: makes feature maps [N, out_channels, ceil(H/stride), ceil(W/stride)].
        num_classes: classes including the background, 1 to 255.
    """

    def __init__(self, backbone: ResNetFeatures, num_classes: int) -> None:
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
        return _upsample(scores, self.backbone.stride, images.shape[-2], images.shape[-1])

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


def _upsample(scores: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Bilinear upsampling that puts unit (i, j) on pixel stride * (i, j).

    The pixels beyond the last unit, fewer than `stride`, repeat the last row and column.
    """
    rows, columns = scores.shape[-2:]
    size = (stride * (rows - 1) + 1, stride * (columns - 1) + 1)
    image = F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
    return F.pad(image, (0, width - size[1], 0, height - size[0]), mode="replicate")
