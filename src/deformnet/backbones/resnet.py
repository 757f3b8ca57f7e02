"""torchvision's ResNet as a feature extractor at output stride 16, dilated and deformable.

Dai et al. 2017, section 2.3, "Deformable Convolution for Feature Extraction".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights

from deformnet.nn import deform_

Depth = Literal[18, 34, 50, 101]
Norm = Literal["frozen", "trained"]
_TRUNKS = {
    18: torchvision.models.resnet18,
    34: torchvision.models.resnet34,
    50: torchvision.models.resnet50,
    101: torchvision.models.resnet101,
}


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's fixed batch norm, computed by PyTorch's own kernel.

    One pass over the map in place of two, and the output keeps the type of a half-precision input
    where torchvision's formula promotes it to float32.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class ResNetFeatures(nn.Module):
    """A ResNet without its classifier, conv5 at the resolution of conv4; built by `resnet`.

    Unit (i, j) of its maps is centred on pixel (16*i, 16*j) of the image. Its state dict has the
    keys of torchvision's ResNet without `fc`; to these come `reduce.*`, and `conv_offset.*` of
    the deformable layers.

    Attributes:
        stride: 16, pixels of the image between units of the feature maps.
        conv4_channels: channels of conv4 (torchvision's layer3).
        conv5_channels: channels of conv5 (torchvision's layer4).
        out_channels: channels that `forward` returns.
    """

    stride = 16

    def __init__(self, trunk: torchvision.models.ResNet, reduce_channels: int | None) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = trunk.conv1, trunk.bn1, trunk.relu
        self.maxpool = trunk.maxpool
        self.layer1, self.layer2 = trunk.layer1, trunk.layer2
        self.layer3, self.layer4 = trunk.layer3, trunk.layer4
        self.conv5_channels = trunk.fc.in_features
        self.conv4_channels = self.conv5_channels // 2
        self.reduce: nn.Conv2d | None = None
        self.out_channels = self.conv5_channels
        if reduce_channels is not None:
            self.reduce = nn.Conv2d(self.conv5_channels, reduce_channels, 1)
            nn.init.normal_(self.reduce.weight, std=0.01)
            nn.init.zeros_(self.reduce.get_parameter("bias"))
            self.out_channels = reduce_channels

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, out_channels, ceil(H/16), ceil(W/16)]: conv5, reduced, after ReLU."""
        _, conv5 = self.stages(images)
        return self.reduced(conv5)

    def stages(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of conv4 and conv5 for images [N, 3, H, W], both at stride 16.

        Raises:
            ValueError: if `images` has another number of dimensions or channels.
        """
        conv4 = self.conv4(images)
        return conv4, self.layer4(conv4)

    def conv4(self, images: Tensor) -> Tensor:
        """The map of conv4 alone, [N, conv4_channels, ceil(H/16), ceil(W/16)]; as `stages`."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: wanted [N, 3, H, W], got {list(images.shape)}")
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x)))

    def reduced(self, conv5: Tensor) -> Tensor:
        """The map of conv5 as `forward` returns it, [N, out_channels, H, W]."""
        return conv5 if self.reduce is None else F.relu(self.reduce(conv5), inplace=True)


def resnet(
    depth: Depth,
    *,
    deform_layers: int = 0,
    dilation: int = 2,
    offset_groups: int = 1,
    modulated: bool = False,
    norm: Norm = "trained",
    weights: str | Path | None = None,
    reduce_channels: int | None = 1024,
) -> ResNetFeatures:
    """Build a ResNet feature extractor at output stride 16.

    conv5 (torchvision's layer4) has stride 1, and every filter in it that is larger than 1x1 is
    dilated; torchvision's own `replace_stride_with_dilation` leaves its first block undilated.
    torchvision strides in the 3x3 convolutions, the authors' ResNet in the 1x1 before them; at
    stride 1 there is no difference left in conv5.

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
        weights: the name of torchvision's weights for this depth ("IMAGENET1K_V1", ..., fetched
            once and cached by torch.hub), or a file with the state dict of torchvision's ResNet
            (or of a `ResNetFeatures`). None leaves random weights.
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
    if norm not in get_args(Norm):
        raise ValueError(f"norm: wanted one of {get_args(Norm)}, got {norm!r}")
    if dilation < 1:
        raise ValueError(f"dilation: wanted at least 1, got {dilation}")
    if reduce_channels is not None and reduce_channels < 1:
        raise ValueError(f"reduce_channels: wanted at least 1 or None, got {reduce_channels}")

    norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    trunk = _TRUNKS[depth](weights=None, norm_layer=norm_layer)
    _dilate(trunk.layer4, dilation)
    model = ResNetFeatures(trunk, reduce_channels)
    if norm == "frozen":
        model.conv1.requires_grad_(False)
        model.layer1.requires_grad_(False)
    filters = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    if not 0 <= deform_layers <= len(filters):
        raise ValueError(
            f"deform_layers: wanted 0 to {len(filters)}, the 3x3 convolutions of ResNet-{depth}, "
            f"got {deform_layers}"
        )
    if deform_layers:
        deform_(model, *filters[-deform_layers:], offset_groups=offset_groups, modulated=modulated)
    if weights is not None:
        source, state = _read_weights(weights, depth)
        _load(model, state, f"weights: {source} is not a ResNet-{depth} of this kind")
    return model


def _dilate(stage: nn.Module, dilation: int) -> None:
    """Give a stage stride 1, and dilate every filter larger than 1x1."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


def _read_weights(weights: str | Path, depth: Depth) -> tuple[str, Mapping[str, Tensor]]:
    """What the weights are called, and their state dict."""
    known = get_model_weights(f"resnet{depth}").__members__
    if isinstance(weights, str) and weights in known:
        try:
            return weights, known[weights].get_state_dict(check_hash=True)
        except OSError as error:
            raise OSError(
                f"weights: cannot fetch {weights} from {known[weights].url} ({error}); "
                "a local file can be given instead"
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: no file {path}, and no torchvision weights of ResNet-{depth} of that name "
            f"(there are {', '.join(known)})"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(
            f"weights: {path} is damaged, or no PyTorch checkpoint that holds tensors alone"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        found = (
            f"keys {', '.join(map(repr, list(state)[:3]))}" if isinstance(state, Mapping) else ""
        )
        raise ValueError(f"weights: {path} holds no state dict but {found or type(state).__name__}")
    return str(path), state


def _load(model: ResNetFeatures, state: Mapping[str, Tensor], problem: str) -> None:
    """Load a state dict that may lack the new layers, and may have torchvision's classifier."""
    own = model.state_dict()
    # torchvision's older files have no counts of batches.
    missing = [
        key
        for key in own
        if key not in state
        and not key.endswith(".num_batches_tracked")
        and ".conv_offset." not in key
        and not key.startswith("reduce.")
    ]
    unexpected = [
        key
        for key in state
        if key not in own and not key.endswith(".num_batches_tracked") and not key.startswith("fc.")
    ]
    for what, keys in (("misses", missing), ("has besides", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{problem}: it {what} {keys[0]}{more}")
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(
                f"{problem}: {key} has shape {list(value.shape)}, wanted {list(own[key].shape)}"
            )
    model.load_state_dict(dict(state), strict=False)
