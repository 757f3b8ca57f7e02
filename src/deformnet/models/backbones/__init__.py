"""Networks that turn images into feature maps."""

from pathlib import Path

from deformnet.models.backbones.aligned_inception_resnet import (
    AlignedInceptionResNetFeatures,
    aligned_inception_resnet,
)
from deformnet.models.backbones.features import Backbone, Norm, OutputStride
from deformnet.models.backbones.resnet import Depth, ResNetFeatures, resnet

_DEPTHS: dict[str, Depth] = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}

__all__ = [
    "AlignedInceptionResNetFeatures",
    "Backbone",
    "ResNetFeatures",
    "aligned_inception_resnet",
    "backbone",
    "resnet",
]


def backbone(
    name: str,
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
) -> Backbone:
    """A backbone by its name.

    The other arguments are those of `resnet` and of `aligned_inception_resnet`.

    Args:
        name: resnet18, resnet34, resnet50, resnet101 or aligned-inception-resnet.
        stride_in_1x1: of ResNets; see `resnet`.
    Raises:
        ValueError: for an argument that the backbone cannot have, or weights of another one.
        FileNotFoundError: if `weights` is neither a file nor a known name.
    """
    if name == "aligned-inception-resnet":
        if stride_in_1x1:
            raise ValueError(f"stride_in_1x1: is for ResNets, not for {name}")
        return aligned_inception_resnet(
            deform_layers=deform_layers,
            dilation=dilation,
            offset_groups=offset_groups,
            modulated=modulated,
            norm=norm,
            output_stride=output_stride,
            weights=weights,
            reduce_channels=reduce_channels,
        )
    if name not in _DEPTHS:
        raise ValueError(
            f"name: wanted {', '.join(_DEPTHS)} or aligned-inception-resnet, got {name!r}"
        )
    return resnet(
        _DEPTHS[name],
        deform_layers=deform_layers,
        dilation=dilation,
        offset_groups=offset_groups,
        modulated=modulated,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
        output_stride=output_stride,
        weights=weights,
        reduce_channels=reduce_channels,
    )
