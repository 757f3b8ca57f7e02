"""Networks for tasks: tensors in, predictions and losses out."""

from deformnet.models.deeplab import DeepLab

__all__ = ["DeepLab"]
