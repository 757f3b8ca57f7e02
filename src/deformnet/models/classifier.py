"""Image classification, as the backbones are pre-trained (Dai et al. 2017, appendix B)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.models.backbones import Backbone


class Classifier(nn.Module):
    """A backbone, the mean over its map, and a fully connected layer that scores the classes.

    Args:
        backbone: makes feature maps [N, out_channels, h, w]; at output stride 32 and without a
            reducing convolution it is the network of Table 6.
        num_classes: classes, at least 1; there is no background.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: wanted at least 1, got {num_classes}")
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.fc = nn.Linear(backbone.out_channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Scores before the softmax: [N, 3, H, W] -> [N, num_classes], float32 or better."""
        scores = self.fc(self.backbone(images).mean(dim=(2, 3)))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def losses(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Softmax loss, averaged over the images of the batch.

        Args:
            logits: [N, num_classes], as `forward` returns them.
            labels: [N] int64, class of each image.

        Returns:
            {"classification": scalar}

        Raises:
            ValueError: if the shapes disagree, or (seen on the CPU; elsewhere the device would
                have to wait for it, and its own assertion stops the program) a label is no class.
            TypeError: if `labels` is not int64.
        """
        if list(labels.shape) != [logits.shape[0]]:
            raise ValueError(
                f"labels: wanted [{logits.shape[0]}] like the logits, got {list(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: wanted int64, got {labels.dtype}")
        if labels.device.type == "cpu":
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if wrong.numel():
                raise ValueError(f"labels: wanted 0 to {self.num_classes - 1}, got {int(wrong[0])}")
        return {"classification": F.cross_entropy(logits, labels)}
