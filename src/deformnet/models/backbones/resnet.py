"""torchvision's ResNet as a dilated and deformable feature extractor.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import ResNet, get_model, get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

from deformnet.models.backbones.features import (
    Backbone,
    NormLayer,
    OutputStride,
    keep_resolution,
    require_images,
)


class ResNetFeatures(Backbone):
    """A ResNet without its classifier; see `backbone`.

    Its state dict has the keys of torchvision's ResNet without `fc`, and `reduce.*` and
    `conv_offset.*` of the deformable layers.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        norm: NormLayer,
        stride_in_1x1: bool,
        output_stride: OutputStride,
        reduce_channels: int | None,
    ) -> None:
        trunk = get_model(name, weights=None, norm_layer=norm)
        assert isinstance(trunk, ResNet)
        channels = trunk.fc.in_features
        super().__init__(channels // 2, channels, output_stride, reduce_channels)
        self.name = name.replace("resnet", "ResNet-")
        self.published = {entry.name: entry for entry in get_model_weights(name)}
        if stride_in_1x1:
            _move_strides(trunk, self.name)
        self.conv1, self.bn1, self.relu = trunk.conv1, trunk.bn1, trunk.relu
        self.maxpool = trunk.maxpool
        self.layer1, self.layer2 = trunk.layer1, trunk.layer2
        self.layer3, self.layer4 = trunk.layer3, trunk.layer4
        if output_stride == 8:
            keep_resolution(self.layer3)
        self._add_reduction()

    def conv4(self, images: Tensor) -> Tensor:
        require_images(images)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x)))

    @property
    def conv5_stage(self) -> nn.Module:
        return self.layer4

    def filter_chain(self) -> tuple[str, ...]:
        # Basic blocks have two consecutive 3x3 convolutions, bottlenecks one.
        inside = ("conv2", "conv1") if isinstance(self.layer4[0], BasicBlock) else ("conv2",)
        blocks = reversed(range(len(self.layer4)))
        return tuple(f"layer4.{block}.{conv}" for block in blocks for conv in inside)

    @property
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        return ("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",)


def _move_strides(trunk: ResNet, name: str) -> None:
    """Move the stride of each block from its 3x3 convolution to the 1x1 convolution before it."""
    blocks = [m for m in trunk.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(
            f"expected stride_in_1x1 to be False for {name}, "
            "whose blocks do not start with a 1x1 convolution"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
