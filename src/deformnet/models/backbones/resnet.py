"""torchvision's ResNet as a feature extractor, dilated and deformable.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from pathlib import Path
from typing import Literal, get_args

import torchvision
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock

from deformnet.models.backbones.features import (
    Backbone,
    Norm,
    OutputStride,
    deform_last,
    dilate,
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
    """A ResNet without its classifier; built by `resnet`.

    Its state dict has the keys of torchvision's ResNet without `fc`; to these come `reduce.*`, and
    `conv_offset.*` of the deformable layers.

    Args:
        trunk: the network whose stages are taken.
        depth: its layers.
        output_stride, reduce_channels: see `Backbone`.
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

    def conv5(self, conv4: Tensor) -> Tensor:
        return self.layer4(conv4)

    def filter_chain(self) -> tuple[str, ...]:
        # Basic blocks have two 3x3 filters, in a row; bottlenecks one, between 1x1 filters.
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

    conv5 (torchvision's layer4) has stride 1, and every filter in it that is larger than 1x1 is
    dilated; torchvision's own `replace_stride_with_dilation` leaves its first block undilated.

    Args:
        depth: 18, 34, 50 or 101.
        deform_layers: how many 3x3 convolutions are deformable, counted from the end (Table 1:
            0, 1, 2, 3, 6). In ResNet-50 and 101 conv5 has three, so 6 includes the last three of
            conv4; in ResNet-18 it has four, in ResNet-34 six.
        dilation: of conv5 (2; Table 3 tries 4, 6 and 8).
        offset_groups: G of the deformable layers.
        modulated: whether the deformable layers also learn a mask.
        norm: "frozen" is the authors' fine-tuning: all batch norm is fixed, statistics and
            affine, in training too, and so are conv1 and layer1. "trained" trains everything, as
            random weights need.
        stride_in_1x1: put the strides of conv3 and conv4 into the first 1x1 convolution of their
            blocks, as He et al. 2016, the authors and detectron2's older models do, and not into
            the 3x3 convolution, as torchvision does. Weights belong to one of the two; their
            shapes do not tell.
        output_stride: 16; 32 leaves conv5 at stride 2 and undilated, for classification.
        weights: the name of torchvision's weights for this depth ("IMAGENET1K_V1", ..., fetched
            once and cached by torch.hub), a file with the state dict of torchvision's ResNet (or of
            a `ResNetFeatures`), or a run folder. None leaves random weights.
        reduce_channels: width of the randomly initialised 1x1 convolution and ReLU at the end;
            None leaves both out.

    Raises:
        ValueError: if an argument is out of its range, or if the weights are of another model or
            no checkpoint at all.
        FileNotFoundError: if `weights` is neither a file nor a name that torchvision knows.
        OSError: if named weights cannot be downloaded.
    """
    if depth not in get_args(Depth):
        raise ValueError(f"depth: wanted one of {get_args(Depth)}, got {depth}")
    trunk = _TRUNKS[depth](weights=None, norm_layer=norm_layer(norm))
    if stride_in_1x1:
        _move_strides(trunk, depth)
    model = ResNetFeatures(trunk, depth, output_stride, reduce_channels)
    if output_stride == 16:
        dilate(model.layer4, dilation)
    if norm == "frozen":
        model.freeze_first_stages()
    deform_last(model, deform_layers, offset_groups=offset_groups, modulated=modulated)
    if weights is not None:
        known = get_model_weights(f"resnet{depth}").__members__
        if isinstance(weights, str) and weights in known:
            try:
                state = known[weights].get_state_dict(check_hash=True)
            except OSError as error:
                raise OSError(
                    f"weights: cannot fetch {weights} from {known[weights].url} ({error}); "
                    "a local file can be given instead"
                ) from error
        elif Path(weights).exists():
            _require_strides(Path(weights), stride_in_1x1)
            state = read_weights(Path(weights))
        else:
            raise FileNotFoundError(
                f"weights: no file {weights}, and no torchvision weights of {model.name} of that "
                f"name (there are {', '.join(known)})"
            )
        load_weights(model, state, weights)
    return model


def _require_strides(weights: Path, stride_in_1x1: bool) -> None:
    """Refuses the run of a network that strides elsewhere, which its weights do not show."""
    recipe = recorded_recipe(weights)
    if recipe is not None and recipe.get("stride_in_1x1", False) != stride_in_1x1:
        raise ValueError(
            f"weights: {weights} was trained with stride_in_1x1={not stride_in_1x1}, "
            f"wanted {stride_in_1x1}"
        )


def _move_strides(trunk: torchvision.models.ResNet, depth: Depth) -> None:
    """Strides in the 1x1 convolutions in the place of the 3x3 ones after them."""
    blocks = [m for m in trunk.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
    if not blocks:
        raise ValueError(f"stride_in_1x1: the blocks of ResNet-{depth} begin with no 1x1")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
