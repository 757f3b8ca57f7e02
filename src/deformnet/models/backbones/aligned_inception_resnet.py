"""Aligned-Inception-ResNet (Dai et al. 2017, appendix B, Table 6 and Figure 8).

The valid convolutions of Inception-ResNet-v2 move the centre of a unit's receptive field away from
the place in the image that the unit stands for. Here every filter is padded by half its reach, so
that unit (i, j) is centred on pixel (stride * i, stride * j).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from deformnet.models.backbones.features import (
    Backbone,
    FrozenBatchNorm2d,
    Norm,
    OutputStride,
    deform_last,
    dilate,
    norm_layer,
    require_images,
)
from deformnet.models.backbones.weights import load_weights, read_weights

# Table 6: widths and numbers of the blocks of conv2, conv3, conv4 and conv5; Figure 8: the widths
# of the two branches inside them.
_WIDTHS = (256, 512, 1024, 2048)
_BLOCKS = (3, 4, 23, 3)
_BRANCHES = ((64, 32), (128, 64), (256, 128), (512, 256))

_NormLayer = type[FrozenBatchNorm2d] | type[nn.BatchNorm2d]


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the place of its units, batch norm, and ReLU ("(BN, ReLU)")."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, norm: _NormLayer, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.norm = norm(outputs)
        self.relu = nn.ReLU(inplace=True)


class InceptionResidualBlock(nn.Module):
    """Figure 8: one and two 3x3 filters in a row side by side, joined by a 1x1, and a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        one: channels of the branch with one 3x3 filter.
        two: channels of the branch with two.
        norm: class of the batch norm layers.
        stride: of the 1x1 filters at the beginning.
    """

    def __init__(
        self, inputs: int, outputs: int, one: int, two: int, norm: _NormLayer, *, stride: int
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
            self.shortcut = nn.Sequential()
            self.shortcut.add_module(
                "conv", nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            )
            self.shortcut.add_module("norm", norm(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H/stride), ceil(W/stride)]."""
        joined = self.join(torch.cat([self.branch1(x), self.branch2(x)], dim=1))
        return self.relu(joined + self.shortcut(x))


class AlignedInceptionResNetFeatures(Backbone):
    """Aligned-Inception-ResNet without its classifier; built by `aligned_inception_resnet`.

    The paper leaves open where the branches of a block stride (here in their first 1x1, like the
    authors' ResNet) and whether shortcuts have a batch norm (here, as in ResNet, yes).

    Args:
        norm: class of the batch norm layers.
        output_stride, reduce_channels: see `Backbone`.
    """

    name = "Aligned-Inception-ResNet"

    def __init__(
        self, norm: _NormLayer, output_stride: OutputStride, reduce_channels: int | None
    ) -> None:
        super().__init__(_WIDTHS[2], _WIDTHS[3], output_stride, reduce_channels)
        self.stem = ConvNormReLU(3, 64, 7, norm, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        inputs = 64
        for stage, (outputs, blocks, (one, two)) in enumerate(
            zip(_WIDTHS, _BLOCKS, _BRANCHES, strict=True)
        ):
            layers = []
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(
                    InceptionResidualBlock(inputs, outputs, one, two, norm, stride=stride)
                )
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # What blocks add to their shortcuts is never negative, so it piles up: the sum of all of
        # them begins at the size of one. (From 1 instead, gradients begin ten times as large.)
        for module in self.modules():
            if isinstance(module, InceptionResidualBlock):
                nn.init.constant_(module.join.norm.weight, sum(_BLOCKS) ** -0.5)
        self._add_reduction()

    def conv4(self, images: Tensor) -> Tensor:
        require_images(images)
        x = self.maxpool(self.stem(images))
        return self.stage4(self.stage3(self.stage2(x)))

    def conv5(self, conv4: Tensor) -> Tensor:
        return self.stage5(conv4)

    def filter_chain(self) -> tuple[str, ...]:
        # By the branch that reaches farther, from block to block.
        blocks = reversed(range(len(self.stage5)))
        return tuple(f"stage5.{block}.branch2.{place}.conv" for block in blocks for place in (2, 1))

    def freeze_first_stages(self) -> None:
        self.stem.requires_grad_(False)
        self.stage2.requires_grad_(False)


def aligned_inception_resnet(
    *,
    deform_layers: int = 0,
    dilation: int = 2,
    offset_groups: int = 1,
    modulated: bool = False,
    norm: Norm = "trained",
    output_stride: OutputStride = 16,
    weights: str | Path | None = None,
    reduce_channels: int | None = 1024,
) -> AlignedInceptionResNetFeatures:
    """Build an Aligned-Inception-ResNet feature extractor, by default at output stride 16.

    conv5 then has stride 1, and every 3x3 filter in it is dilated.

    Args:
        deform_layers: how many 3x3 convolutions are deformable, counted from the end of the
            network: the last block's two in a row, its single one, and so on, three in each block.
        dilation: of conv5.
        offset_groups: G of the deformable layers.
        modulated: whether the deformable layers also learn a mask.
        norm: "frozen" fixes all batch norm, conv1 and conv2; "trained" trains everything.
        output_stride: 16; 32 leaves conv5 at stride 2 and undilated, for classification.
        weights: a file with the state dict of such a backbone, or a run folder; there are no
            public weights. None leaves random ones.
        reduce_channels: width of the randomly initialised 1x1 convolution and ReLU at the end;
            None leaves both out.

    Raises:
        ValueError: if an argument is out of its range, or if the weights are of another model.
        FileNotFoundError: if there is no file `weights`.
    """
    model = AlignedInceptionResNetFeatures(norm_layer(norm), output_stride, reduce_channels)
    if output_stride == 16:
        dilate(model.stage5, dilation)
    if norm == "frozen":
        model.freeze_first_stages()
    deform_last(model, deform_layers, offset_groups=offset_groups, modulated=modulated)
    if weights is not None:
        if not Path(weights).exists():
            raise FileNotFoundError(
                f"weights: no file {weights}, and there are no public weights of {model.name}"
            )
        load_weights(model, read_weights(Path(weights)), weights)
    return model
