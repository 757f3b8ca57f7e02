"""torchvision's ResNet as a dilated and deformable feature extractor.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

from deformnet._errors import UserError
from deformnet.models.backbones.features import (
    Backbone,
    Norm,
    OutputStride,
    configure,
    norm_layer,
    require_images,
)
from deformnet.models.backbones.weights import load_weights, read_weights, recorded_recipe

Depth = Literal[18, 34, 50, 101]
_TRUNKS = {
    18: torchvision.models.resnet18,
    34: torchvision.models.resnet34,
    50: torchvision.models.resnet50,
    101: torchvision.models.resnet101,
}


class ResNetFeatures(Backbone):
    """A ResNet without its classifier; see `resnet`.

    Its state dict has the keys of torchvision's ResNet without `fc`, and `reduce.*` and
    `conv_offset.*` of the deformable layers.

    Args:
        trunk: torchvision's ResNet, whose stages are used.
        depth: Number of layers.
        output_stride, reduce_channels: See `Backbone`.
    """

    def __init__(
        self,
        trunk: torchvision.models.ResNet,
        depth: Depth,
        output_stride: OutputStride,
        reduce_channels: int | None,
    ) -> None:
        channels = trunk.fc.in_features
        super().__init__(channels // 2, channels, output_stride, reduce_channels)
        self.name = f"ResNet-{depth}"
        self.conv1, self.bn1, self.relu = trunk.conv1, trunk.bn1, trunk.relu
        self.maxpool = trunk.maxpool
        self.layer1, self.layer2 = trunk.layer1, trunk.layer2
        self.layer3, self.layer4 = trunk.layer3, trunk.layer4
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
        return tuple(
            f"layer4.{block}.{conv}"
            for block in reversed(range(len(self.layer4)))
            for conv in inside
        )

    def freeze_first_stages(self) -> None:
        self.conv1.requires_grad_(False)
        self.layer1.requires_grad_(False)


def resnet(
    depth: Depth,
    *,
    deform_layers: int = 0,
    dilation: int = 2,
    offset_groups: int = 1,
    modulated: bool = False,
    norm: Norm = "trained",
    stride_in_1x1: bool = False,
    output_stride: OutputStride = 16,
    weights: str | Path | None = None,
    reduce_channels: int | None = 1024,
) -> ResNetFeatures:
    """Build a ResNet feature extractor, by default at output stride 16.

    conv5 (torchvision's layer4) then has stride 1 and dilated 3x3 convolutions. (torchvision's
    `replace_stride_with_dilation` leaves the first block undilated.)

    Args:
        depth: 18, 34, 50 or 101.
        deform_layers: Number of deformable 3x3 convolutions, counted from the end (Table 1: 0, 1,
            2, 3, 6). conv5 has three of them in ResNet-50 and 101 (so 6 includes the last three of
            conv4), four in ResNet-18 and six in ResNet-34.
        dilation: Dilation of conv5 (2; Table 3 tries 4, 6 and 8).
        offset_groups: Offset groups of the deformable layers.
        modulated: Whether the deformable layers also learn a mask.
        norm: "frozen" fixes the statistics and parameters of all batch norm, and conv1 and layer1,
            as in the authors' fine-tuning. "trained" trains everything, which random weights need.
        stride_in_1x1: Whether conv3 and conv4 stride in the first 1x1 convolution of their blocks,
            as in He et al. 2016, the authors' code and detectron2's older models, rather than in
            the 3x3 convolution, as in torchvision. Weights belong to one of the two, which their
            shapes do not tell.
        output_stride: 16, or 32 for classification, where conv5 has stride 2 and no dilation.
        weights: Name of torchvision's weights for this depth ("IMAGENET1K_V1", ..., cached by
            torch.hub), a file with the state dict of torchvision's ResNet or a `ResNetFeatures`,
            or a run folder. None initializes randomly.
        reduce_channels: Output channels of the randomly initialized 1x1 convolution and ReLU after
            conv5; None leaves both out.

    Raises:
        ValueError: If an argument is out of range.
        UserError: If the weights are of another model, or not a checkpoint.
        FileNotFoundError: If `weights` is neither a file nor the name of torchvision's weights.
        OSError: If named weights cannot be downloaded.
    """
    if depth not in get_args(Depth):
        raise ValueError(f"expected depth to be one of {get_args(Depth)}, but got {depth}")
    trunk = _TRUNKS[depth](weights=None, norm_layer=norm_layer(norm))
    if stride_in_1x1:
        _move_strides(trunk, depth)
    model = ResNetFeatures(trunk, depth, output_stride, reduce_channels)
    configure(
        model,
        deform_layers=deform_layers,
        dilation=dilation,
        offset_groups=offset_groups,
        modulated=modulated,
        norm=norm,
        output_stride=output_stride,
    )
    if weights is not None:
        load_weights(model, _read_weights(model, depth, weights, stride_in_1x1), weights)
    return model


def _read_weights(
    model: ResNetFeatures, depth: Depth, weights: str | Path, stride_in_1x1: bool
) -> Mapping[str, Tensor]:
    """State dict of torchvision's weights by name, of a file or of a run folder."""
    named = get_model_weights(f"resnet{depth}").__members__
    if isinstance(weights, str) and weights in named:
        try:
            return named[weights].get_state_dict(check_hash=True)
        except OSError as error:
            raise OSError(
                f"cannot download {weights} from {named[weights].url} ({error}); pass a local file "
                "instead"
            ) from error
    if not Path(weights).exists():
        raise FileNotFoundError(
            f"{weights}: no such file, and no torchvision weights of {model.name} of that name; "
            f"expected a file, a run folder or one of {', '.join(named)}"
        )
    _require_strides(Path(weights), stride_in_1x1)
    return read_weights(Path(weights))


def _require_strides(weights: Path, stride_in_1x1: bool) -> None:
    """Check the `stride_in_1x1` of a run, which its weights do not tell."""
    recipe = recorded_recipe(weights)
    if recipe is not None and recipe.get("stride_in_1x1", False) != stride_in_1x1:
        raise UserError(
            f"{weights}: expected weights trained with stride_in_1x1={stride_in_1x1}, "
            f"but got {not stride_in_1x1}"
        )


def _move_strides(trunk: torchvision.models.ResNet, depth: Depth) -> None:
    """Move the stride of each block from its 3x3 convolution to the 1x1 convolution before it."""
    blocks = [m for m in trunk.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise ValueError(
            f"expected stride_in_1x1 to be False for ResNet-{depth}, "
            "whose blocks do not start with a 1x1 convolution"
        )
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
