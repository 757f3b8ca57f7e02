"""Image classification, the pre-training of the backbones (Dai et al. 2017, appendix B)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.models.backbones import Backbone
from deformnet.models.backbones.features import initialize
from deformnet.models.network import Network, require_labels


class Classifier(Network):
    """A backbone, global average pooling and a fully connected layer.

    Args:
        backbone: Feature extractor. At output stride 32 and without the channel reduction, the
            network is that of Table 6.
        num_classes: Number of classes, without a background.

    Raises:
        ValueError: If `num_classes` is less than 1.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.fc = nn.Linear(backbone.out_channels, num_classes)
        initialize(self.fc)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of normalized images [N, 3, H, W], in float32 or better."""
        logits = self.fc(self.backbone(images).mean(dim=(2, 3)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy loss, averaged over the batch.

        Args:
            logits: [N, num_classes], the output of `forward`.
            labels: int64 [N], the class of each image.

        Returns:
            {"classification": scalar}

        Raises:
            ValueError: If the shapes disagree, or a label is out of range (checked on the CPU).
            TypeError: If `labels` is not int64.
        """
        if list(labels.shape) != [logits.shape[0]]:
            raise ValueError(
                f"expected labels to be [{logits.shape[0]}] like the logits, "
                f"but got {list(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"expected labels to be int64, but got {labels.dtype}")
        require_labels("labels", labels, self.num_classes)
        return {"classification": F.cross_entropy(logits, labels)}

    def random_losses(self, images: Tensor) -> Callable[[], dict[str, Tensor]]:
        labels = torch.randint(self.num_classes, (len(images),)).to(images.device)
        return lambda: self.losses(self(images), labels)
