"""Aligned-Inception-ResNet (Dai et al. 2017, appendix B, Table 6 and Figure 8).

The valid convolutions of Inception-ResNet-v2 shift the receptive field of a unit away from its
position in the image. Here every convolution has "same" padding, so that unit (i, j) is centered on
pixel (stride * i, stride * j).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deformnet.models.backbones.features import (
    Backbone,
    NormLayer,
    OutputStride,
    keep_resolution,
    require_images,
)

# Table 6: channels and number of blocks of conv2 to conv5. Figure 8: channels of the two branches.
_WIDTHS = (256, 512, 1024, 2048)
_BLOCKS = (3, 4, 23, 3)
_BRANCHES = ((64, 32), (128, 64), (256, 128), (512, 256))


class ConvNormReLU(nn.Sequential):
    """Convolution with "same" padding, batch norm and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, norm: NormLayer, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.norm = norm(outputs)
        self.relu = nn.ReLU(inplace=True)


class InceptionResidualBlock(nn.Module):
    """Two branches of 3x3 convolutions, a joining 1x1 convolution and a shortcut (Figure 8).

    `one` and `two` are the channels of the branches with one and with two 3x3 convolutions; the
    first 1x1 convolutions have the stride.
    """

    def __init__(
        self, inputs: int, outputs: int, one: int, two: int, norm: NormLayer, *, stride: int
    ) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(
            ConvNormReLU(inputs, one, 1, norm, stride=stride),
            ConvNormReLU(one, one, 3, norm),
        )
        self.branch2 = nn.Sequential(
            ConvNormReLU(inputs, two, 1, norm, stride=stride),
            ConvNormReLU(two, two, 3, norm),
            ConvNormReLU(two, two, 3, norm),
        )
        self.join = ConvNormReLU(one + two, outputs, 1, norm)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=norm(outputs)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H/stride), ceil(W/stride)]."""
        joined = self.join(torch.cat([self.branch1(x), self.branch2(x)], dim=1))
        return self.relu(joined + self.shortcut(x))


class AlignedInceptionResNetFeatures(Backbone):
    """Aligned-Inception-ResNet without its classifier; see `backbone`.

    The paper does not say where the branches of a block stride (here in their first 1x1
    convolution, as in the authors' ResNet) or whether shortcuts have batch norm (here they do, as
    in ResNet).
    """

    name = "Aligned-Inception-ResNet"

    def __init__(
        self, norm: NormLayer, output_stride: OutputStride, reduce_channels: int | None
    ) -> None:
        super().__init__(_WIDTHS[2], _WIDTHS[3], output_stride, reduce_channels)
        self.stem = ConvNormReLU(3, 64, 7, norm, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        inputs, stride = 64, 1
        for outputs, blocks, branches in zip(_WIDTHS, _BLOCKS, _BRANCHES, strict=True):
            stage = nn.Sequential()
            for _ in range(blocks):
                stage.append(
                    InceptionResidualBlock(inputs, outputs, *branches, norm, stride=stride)
                )
                inputs, stride = outputs, 1
            stages.append(stage)
            stride = 2
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        if output_stride == 8:
            keep_resolution(self.stage4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, InceptionResidualBlock):
                # The residuals are non-negative and accumulate over the blocks: this scale keeps
                # their sum at the magnitude of one. (With a scale of 1, initial gradients are ten
                # times as large.)
                nn.init.constant_(module.join.norm.weight, sum(_BLOCKS) ** -0.5)
        self._add_reduction()

    def conv4(self, images: Tensor) -> Tensor:
        require_images(images)
        x = self.maxpool(self.stem(images))
        return self.stage4(self.stage3(self.stage2(x)))

    @property
    def conv5_stage(self) -> nn.Module:
        return self.stage5

    def filter_chain(self) -> tuple[str, ...]:
        # Through the branch with the larger receptive field.
        blocks = reversed(range(len(self.stage5)))
        return tuple(f"stage5.{block}.branch2.{place}.conv" for block in blocks for place in (2, 1))

    @property
    def trunk_stages(self) -> Sequence[Sequence[str]]:
        return ("stem",), ("stage2",), ("stage3",), ("stage4",)
