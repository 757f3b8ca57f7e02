"""Networks that turn images into feature maps."""

from deformnet.backbones.resnet import ResNetFeatures, resnet

__all__ = ["ResNetFeatures", "resnet"]
