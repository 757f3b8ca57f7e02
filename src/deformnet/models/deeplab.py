"""DeepLab for semantic segmentation, as in Dai et al. 2017, section 2.3."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.models._upsampled_loss import upsampled_cross_entropy
from deformnet.models.backbones import Backbone
from deformnet.models.backbones.features import initialize
from deformnet.models.network import Network, require_labels

IGNORE = 255
"""Label of pixels that neither train nor count in a metric."""


class DeepLab(Network):
    """A backbone, a 1x1 convolution that predicts class scores, and bilinear upsampling.

    The upsampling is fixed, as the authors' (a bilinear kernel of 32 at stride 16, cropped by 8):
    unit (i, j) of the feature map predicts the center of the cell that starts at pixel
    stride * (i, j), for any image size. At the image border the scores are replicated, where the
    authors' kernel fades to zero.

    Args:
        backbone: Feature extractor.
        num_classes: Number of classes including the background, 1 to 255.
        loss_stride: Stride, in pixels, at which `losses_of_images` compares with labels, vertically
            and horizontally (Chen et al. 2015, "Semantic image segmentation with deep convolutional
            nets and fully connected CRFs", trains at 8). A divisor of the backbone's stride.

    Raises:
        ValueError: If `num_classes` or `loss_stride` is out of range.
    """

    def __init__(self, backbone: Backbone, num_classes: int, loss_stride: int = 1) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"expected num_classes to be 1 to {IGNORE}, but got {num_classes}")
        if loss_stride < 1 or backbone.stride % loss_stride:
            raise ValueError(
                f"expected loss_stride to be a divisor of {backbone.stride}, the stride of the "
                f"features, but got {loss_stride}"
            )
        super().__init__(backbone, num_classes)
        self.loss_stride = loss_stride
        self.classifier = nn.Conv2d(backbone.out_channels, num_classes, 1)
        initialize(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes, H, W] of normalized images [N, 3, H, W], float32 or better.

        For the backbone's `maps` in place of the images, H and W are multiples of the stride.
        """
        stride = self.backbone.stride
        logits = F.interpolate(self.scores(images), scale_factor=stride, mode="bilinear")
        if images.shape[1] != 3:
            return logits
        return _crop(logits, images.shape[-2], images.shape[-1])

    def scores(self, images: Tensor) -> Tensor:
        """Logits before upsampling, one per position of the feature map."""
        scores = self.classifier(self.backbone(images))
        # In half precision the upsampled scores of two classes would often tie.
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def losses_of_images(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`losses` of `forward` at `loss_stride`, but faster: the logits are never in memory.

        Args:
            images: [N, 3, H, W], or `maps` of the backbone in their place, which may reach beyond
                `target` on the right and at the bottom.
            target: See `losses`; other integer types, such as uint8, are also accepted.
        """
        step = self.loss_stride
        target = target[:, step // 2 :: step, step // 2 :: step]  # centers of the cells
        require_labels("labels of target", target, self.num_classes, ignored=IGNORE)
        scores, factor = self.scores(images), self.backbone.stride // step
        total = upsampled_cross_entropy(scores, target, factor, ignored=IGNORE)
        return {"segmentation": total / (target != IGNORE).sum().clamp(min=1)}

    def losses(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Cross-entropy loss, averaged over the valid pixels of the batch.

        Args:
            logits: [N, num_classes, H, W], the output of `forward`.
            target: int64 [N, H, W], the class of each pixel; 255 is ignored.

        Returns:
            {"segmentation": scalar}; zero, with zero gradients, if no pixel is valid.

        Raises:
            ValueError: If the shapes disagree, or a label is out of range (checked on the CPU).
            TypeError: If `target` is not int64.
        """
        shape = [logits.shape[0], *logits.shape[2:]]
        if list(target.shape) != shape:
            raise ValueError(
                f"expected target to be {shape} like the logits, but got {list(target.shape)}"
            )
        if target.dtype != torch.int64:
            raise TypeError(f"expected target to be int64, but got {target.dtype}")
        require_labels("labels of target", target, self.num_classes, ignored=IGNORE)
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return {"segmentation": total / (target != IGNORE).sum().clamp(min=1)}

    def random_losses(self, images: Tensor) -> Callable[[], dict[str, Tensor]]:
        target = torch.randint(self.num_classes, (len(images), *images.shape[2:]))
        target = target.to(images.device)
        return lambda: self.losses(self(images), target)


def _crop(logits: Tensor, height: int, width: int) -> Tensor:
    """Remove what the feature map, of ceil(H / stride) cells, extends beyond the image."""
    if torch.compiler.is_compiling():
        # A slice would be specialized on whether the stride divides a dynamic image size.
        return F.pad(logits, (0, width - logits.shape[-1], 0, height - logits.shape[-2]))
    return logits[..., :height, :width]
