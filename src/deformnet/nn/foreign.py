"""Conversion of other libraries' deformable convolutions, recognized without importing them."""

import inspect
from typing import Any, NamedTuple

from torch import nn

from deformnet.nn.deform_conv import DeformConv2d
from deformnet.nn.given_offsets import FOLLOWING, GivenOffsetsConv2d
from deformnet.nn.offsets import OffsetConv2d
from deformnet.ops._arguments import pair

# Names of the classes in mmcv (also before version 1.0), detectron2, BasicSR and DCNv2. They differ
# in the names of the child that predicts the offsets and of the attribute with the number of offset
# groups; all masks are sigmoid(.).
_PACKS = {
    *("DeformConv2dPack", "ModulatedDeformConv2dPack"),
    *("DeformConvPack", "ModulatedDeformConvPack", "DCNv2Pack"),
    "DCN",
}
_GIVEN_OFFSETS = {
    *("DeformConv2d", "ModulatedDeformConv2d"),  # the first is also torchvision's
    *("DeformConv", "ModulatedDeformConv"),
    "DCNv2",
}
_OFFSET_CONVS = ("conv_offset", "conv_offset_mask")
_GROUPS = ("deform_groups", "deformable_groups")
_PAIRS = ("kernel_size", "stride", "padding", "dilation")
_GEOMETRY = ("in_channels", "out_channels", "weight", *_PAIRS)


class ForeignConv(NamedTuple):
    """A deformable convolution of another library.

    Attributes:
        offset_conv: Name of the child that predicts offsets; None if they are an argument.
        offset_groups: Number of offset groups; 0 if the arguments of a call determine it.
        modulated: Whether the child also predicts masks.
        problem: Why it cannot be converted; None if it can.
    """

    offset_conv: str | None
    offset_groups: int
    modulated: bool
    problem: str | None


def foreign_conv(layer: Any) -> ForeignConv | None:
    """Describes a deformable convolution of another library; None for all other layers."""
    kind = type(layer).__name__
    if kind not in (*_PACKS, *_GIVEN_OFFSETS) or not all(hasattr(layer, it) for it in _GEOMETRY):
        return None
    if isinstance(layer, (DeformConv2d, GivenOffsetsConv2d)):
        return None
    if kind in _GIVEN_OFFSETS:
        takes_offsets = "offset" in inspect.signature(layer.forward).parameters
        problem = _other_layers(layer, FOLLOWING)
        return ForeignConv(None, 0, False, problem) if takes_offsets else None
    name = next((name for name in _OFFSET_CONVS if name in layer._modules), None)
    if name is None:
        return None
    groups = next((getattr(layer, name) for name in _GROUPS if hasattr(layer, name)), 1)
    offset_conv, unit = getattr(layer, name), groups * layer.weight.shape[2:].numel()
    channels = getattr(offset_conv, "out_channels", None)
    problem = _other_layers(layer, (name,))
    if type(offset_conv) is not nn.Conv2d or channels not in (2 * unit, 3 * unit):
        expected = f"an nn.Conv2d of {2 * unit} or {3 * unit} channels"
        problem = f"is a {kind} whose {name} is not {expected}"
    return ForeignConv(name, groups, channels == 3 * unit, problem)


def _other_layers(layer: nn.Module, known: tuple[str, ...]) -> str | None:
    """The problem of layers that a deformable convolution contains, which would no longer run."""
    others = [name for name, it in layer._modules.items() if it is not None and name not in known]
    if not others:
        return None
    return f"is a {type(layer).__name__} that contains other layers ({', '.join(others)})"


def foreign_offset_convs(model: nn.Module) -> set[nn.Module]:
    """The convolutions in a model that predict offsets for layers of other libraries."""
    found = ((layer, foreign_conv(layer)) for layer in model.modules())
    return {
        layer.get_submodule(foreign.offset_conv)
        for layer, foreign in found
        if foreign is not None and foreign.offset_conv is not None
    }


def take_over(theirs: Any, foreign: ForeignConv) -> None:
    """Convert a layer of another library in place to ours, which computes the same."""
    for name in _PAIRS:
        setattr(theirs, name, pair(name, getattr(theirs, name)))
    if not hasattr(theirs, "bias"):
        theirs.register_parameter("bias", None)
    theirs.groups = getattr(theirs, "groups", 1)  # DCNv2 has none
    theirs.transposed, theirs.output_padding = False, (0, 0)
    theirs.padding_mode = "zeros"
    top, left = theirs.padding
    theirs._reversed_padding_repeated_twice = [left, left, top, top]
    if foreign.offset_conv is None:
        theirs.__class__ = GivenOffsetsConv2d
        return
    offset_conv = theirs._modules.pop(foreign.offset_conv)
    offset_conv.__class__ = OffsetConv2d
    theirs.__class__ = DeformConv2d
    theirs._keeps_options = True
    theirs.offset_groups, theirs.modulated = foreign.offset_groups, foreign.modulated
    theirs.mask_scale, theirs.max_offset, theirs.offset_conv = 1.0, None, "dense"
    theirs.offset_in_channels = offset_conv.in_channels
    theirs.conv_offset = offset_conv
