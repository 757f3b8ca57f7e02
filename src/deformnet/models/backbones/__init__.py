"""Backbones: networks that extract feature maps from images."""

from pathlib import Path
from typing import get_args

from torch import nn
from torchvision.transforms import InterpolationMode as InterpolationMode  # also for recipes.py

from deformnet.models.backbones.aligned_inception_resnet import AlignedInceptionResNetFeatures
from deformnet.models.backbones.features import (
    Backbone,
    FrozenBatchNorm2d,
    Norm,
    OutputStride,
    deform_last,
)
from deformnet.models.backbones.neck import BackboneWithNeck, Neck
from deformnet.models.backbones.resnet import ResNetFeatures
from deformnet.models.backbones.weights import initial_weights, load_weights
from deformnet.nn.offsets import OffsetConv
from deformnet.ops._arguments import one_of

__all__ = [
    "AlignedInceptionResNetFeatures",
    "Backbone",
    "BackboneWithNeck",
    "ResNetFeatures",
    "backbone",
    "interpolation",
]

_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "aligned-inception-resnet")
_TIMM = "timm/"


def backbone(
    name: str,
    *,
    deform_layers: int = 0,
    dilation: int = 2,
    offset_groups: int = 1,
    modulated: bool = False,
    offset_conv: OffsetConv = "dense",
    norm: Norm = "trained",
    freeze: int | None = None,
    stride_in_1x1: bool = False,
    output_stride: OutputStride = 16,
    center: bool = True,
    weights: str | Path | None = None,
    reduce_channels: int | None = 1024,
    neck: Neck = "none",
    neck_channels: int = 96,
    neck_layers: int = 3,
) -> Backbone:
    """Build a backbone by name, by default at output stride 16.

    conv5 (layer4 of ResNet) then has stride 1 and dilated 3x3 convolutions, all of them, as in the
    authors' code. In networks of timm, the convolution that had the stride, and those before it,
    get half the dilation, as in torchvision's `replace_stride_with_dilation`: with the default, the
    features are then those of the pretrained network, at more positions.

    At output stride 8, conv4 has stride 1 and dilation 2 as well, and conv5 (or the neck) twice the
    dilation: the features are those of output stride 16, at twice as many positions in each
    direction.

    Args:
        name: resnet18, resnet34, resnet50, resnet101, aligned-inception-resnet, or timm/NAME for a
            convolutional network of timm, whose stage of stride 32 is conv5.
        deform_layers: Number of deformable 3x3 convolutions, counted from the end (Table 1: 0, 1,
            2, 3, 6); for timm networks, of convolutions larger than 1x1, including depthwise ones.
            conv5 has three in ResNet-50 and 101 (so 6 includes the last three of conv4), four in
            ResNet-18 and six in ResNet-34. Aligned-Inception-ResNet has three in each block: the
            two consecutive ones of the last block, its single one, and so on.
        dilation: Dilation of conv5 at output stride 16 (2; Table 3 tries 4, 6 and 8). It is doubled
            at output stride 8 and not used at 32.
        offset_groups: Offset groups of the deformable layers.
        modulated: Whether the deformable layers also learn a mask.
        offset_conv: Kind of the convolutions that predict offsets; see `DeformConv2d`.
        norm: "frozen" fixes the statistics and parameters of all batch norm; "trained" trains them.
        freeze: Number of stages to freeze, from 0 to 5 (conv1 to conv5); requires frozen batch
            norm. Offsets of deformable layers in these stages are still trained. None freezes conv1
            and conv2 with frozen batch norm, as in the authors' fine-tuning, and nothing otherwise.
        stride_in_1x1: Whether conv3 and conv4 stride in the first 1x1 convolution of their blocks,
            as in He et al. 2016, the authors' code and detectron2's older models, rather than in
            the 3x3 convolution, as in torchvision. Weights belong to one of the two, which their
            shapes do not tell.
        output_stride: 16; 8 for finer maps, which HRNet does not support; or 32, as in
            classification, where conv5 has stride 2 and no dilation.
        center: Whether to move the units of timm networks to where label maps and boxes expect
            them; see `TimmFeatures`. False keeps the padding that they were trained with.
        weights: Name of torchvision's weights ("IMAGENET1K_V1", ..., cached by torch.hub), a file
            with the state dict of this backbone or of torchvision's ResNet, or a run folder. There
            are no public weights of Aligned-Inception-ResNet. For timm/NAME: "timm" (downloaded
            from timm's hub), a state dict of timm's network, or one with the same shapes in the
            same order. For any backbone, also the name of an installed package that contains such a
            file, or hf://OWNER/REPO, an exported network on the Hugging Face Hub. None initializes
            randomly.
        reduce_channels: Output channels of the randomly initialized 1x1 convolution and ReLU after
            conv5; None leaves both out.
        neck: "residual" adds a 1x1 convolution and residual 3x3 convolutions in place of the
            channel reduction, with random weights and trained batch norm. They are then the conv5
            that `deform_layers` and `dilation` apply to, and conv5 of the backbone has dilation 2;
            see `BackboneWithNeck`.
        neck_channels: Channels of the neck.
        neck_layers: Number of 3x3 convolutions in the neck.

    Raises:
        ValueError: If the backbone does not have an option, or it is out of range.
        UserError: If the weights are of another model, or not a checkpoint.
        FileNotFoundError: If `weights` is neither a file nor the name of torchvision's weights.
        OSError: If named weights cannot be downloaded.
    """
    if not name.startswith(_TIMM):
        one_of("name", name, _NAMES)
    one_of("norm", norm, get_args(Norm))
    one_of("neck", neck, get_args(Neck))
    if neck == "residual":
        reduce_channels = None
    freeze = (2 if norm == "frozen" else 0) if freeze is None else freeze
    if freeze and norm == "trained":
        raise ValueError(f"expected norm to be frozen for freeze={freeze}, but got trained")
    if not 0 <= freeze <= 5:
        raise ValueError(f"expected freeze to be 0 to 5, but got {freeze}")
    norm_layer = FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d
    if name.startswith("resnet"):
        model = ResNetFeatures(name, norm_layer, stride_in_1x1, output_stride, reduce_channels)
    elif stride_in_1x1:
        raise ValueError(f"expected stride_in_1x1 to be False for {name}, but got True")
    elif name.startswith(_TIMM):
        # timm takes seconds to import, so other backbones do not import it.
        from deformnet.models.backbones.timm import TimmFeatures

        name = name.removeprefix(_TIMM)
        model = TimmFeatures(name, norm, output_stride, center, reduce_channels)
    else:
        model = AlignedInceptionResNetFeatures(norm_layer, output_stride, reduce_channels)
    if neck == "residual":
        model = BackboneWithNeck(model, output_stride, neck_channels, neck_layers)
    if output_stride < 32:
        model.dilate(dilation)
    model.freeze(freeze)
    deform_last(
        model,
        deform_layers,
        offset_groups=offset_groups,
        modulated=modulated,
        offset_conv=offset_conv,
    )
    if weights is not None:
        state = initial_weights(model, weights, stride_in_1x1)
        load_weights(model, model.own_names(state), weights)
    return model


def interpolation(name: str) -> InterpolationMode:
    """How images are resized for the published weights of a backbone.

    Args:
        name: see `backbone`.

    Raises:
        UserError: If timm has no such network.
    """
    if not name.startswith(_TIMM):
        return InterpolationMode.BILINEAR
    from deformnet.models.backbones.timm import interpolation_of

    return interpolation_of(name.removeprefix(_TIMM))
