"""Backbones: networks that extract feature maps from images."""

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
    """Build a backbone by name.

    Args:
        name: resnet18, resnet34, resnet50, resnet101 or aligned-inception-resnet.
        deform_layers, dilation, offset_groups, modulated, norm, stride_in_1x1, output_stride:
            See `resnet`.
        weights, reduce_channels: See `resnet` and `aligned_inception_resnet`.

    Raises:
        ValueError: If the backbone does not have an option, or it is out of range.
        UserError: If the weights are of another model, or not a checkpoint.
        FileNotFoundError: If `weights` is neither a file nor a known name.
    """
    if name == "aligned-inception-resnet":
        if stride_in_1x1:
            raise ValueError(f"expected stride_in_1x1 to be False for {name}, but got True")
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
            f"expected name to be one of {', '.join(_DEPTHS)} or aligned-inception-resnet, "
            f"but got {name!r}"
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
