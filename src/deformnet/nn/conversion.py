"""Conversion of the convolutions of any model to deformable convolutions."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from deformnet.nn.deform_conv import DeformConv2d, check_max_offset, make_conv_offset
from deformnet.nn.foreign import foreign_conv, foreign_offset_convs, take_over
from deformnet.nn.given_offsets import GivenOffsetsConv2d
from deformnet.nn.offsets import OffsetConv, OffsetLayer
from deformnet.ops._arguments import integer, one_of

_OURS = (DeformConv2d, GivenOffsetsConv2d)


def deform_(
    model: nn.Module,
    *patterns: str,
    offset_groups: int = 1,
    modulated: bool = False,
    max_offset: float | None = None,
    offset_conv: OffsetConv = "dense",
) -> list[str]:
    """Convert matching convolutions of a model to deformable convolutions, in place.

    Each `nn.Conv2d` whose name matches becomes a `DeformConv2d`. It stays the same object with the
    same parameters, so optimizers, hooks, frozen weights and shared layers keep working. The new
    child `conv_offset` is zero-initialized, so the model's output does not change. Add its
    parameters to an existing optimizer, or build the optimizer afterwards with `parameter_groups`.

        >>> deform_(torchvision.models.resnet50(), "layer4.*.conv2")
        ['layer4.0.conv2', 'layer4.1.conv2', 'layer4.2.conv2']

    Matching deformable convolutions of torchvision, mmcv, detectron2 and DCNv2 are converted to
    deformnet's operator: they compute the same, and keep their own options instead of those given
    here. Layers that predict their offsets (mmcv's `DeformConv2dPack` and
    `ModulatedDeformConv2dPack`, DCNv2's `DCN`) become a `DeformConv2d`, in which DCNv2's
    `conv_offset_mask` is called `conv_offset`. Layers that take offsets as an argument
    (torchvision's `DeformConv2d`, detectron2's `DeformConv` and `ModulatedDeformConv`, the other
    layers of mmcv and DCNv2) still do. Classes are recognized by name, so copies of these libraries
    in other code bases are converted as well; subclasses with other names are not. Copies that
    contain more layers than the libraries' raise an error, since these layers would no longer run.

    Args:
        model: Any module that contains `nn.Conv2d` layers.
        patterns: Shell-style globs on the names of `model.named_modules()`; `*` also matches dots.
            Matching modules other than convolutions are ignored.
        offset_groups: See `DeformConv2d`.
        modulated: See `DeformConv2d`.
        max_offset: See `DeformConv2d`.
        offset_conv: See `DeformConv2d`; "separable" is the cheap choice for depthwise convolutions.

    Returns:
        Names of the converted layers, in the order of the model. Deformable layers of deformnet are
        skipped.

    Raises:
        TypeError: If `model` is not a module, a pattern is not a string, `offset_groups` is not an
            integer, or `max_offset` is not a number.
        ValueError: If there is no pattern, a pattern matches no convolution, or a matching
            convolution cannot be converted: it is transposed, 1-D or 3-D, its class overrides
            methods of `nn.Conv2d`, `offset_groups` does not divide its channels, it is a copy with
            more layers, or it is already deformable with other options; or `max_offset` is not
            positive and finite. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, but got {type(model).__name__}")
    if not patterns:
        raise ValueError(
            'expected patterns to be at least one glob such as "layer4.*.conv2", but got none'
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"expected patterns to be strings, but got {pattern!r}")
    offset_groups, modulated = integer("offset_groups", offset_groups), bool(modulated)
    max_offset = check_max_offset(max_offset)
    one_of("offset_conv", offset_conv, get_args(OffsetConv))
    if offset_groups < 1:
        raise ValueError(f"expected offset_groups to be at least 1, but got {offset_groups}")
    if isinstance(model, _ConvNd):
        raise ValueError(
            "expected model to be a model that contains convolutions, "
            f"but got a single {type(model).__name__}; build a DeformConv2d, or wrap it in "
            "nn.Sequential"
        )

    # All submodules under all of their names, except layers that predict offsets.
    theirs = foreign_offset_convs(model)
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not isinstance(module, OffsetLayer) and module not in theirs
    }
    matched: dict[nn.Module, str] = {}  # shared layers once, by their first matching name
    used: set[str] = set()
    for name, module in modules.items():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if matching and (isinstance(module, _ConvNd) or foreign_conv(module) is not None):
            matched.setdefault(module, name)
            used.update(matching)

    problems = [_no_match(pattern, modules) for pattern in patterns if pattern not in used]
    for module, name in matched.items():
        reason = _why_not(module, (offset_groups, modulated, max_offset, offset_conv))
        if reason is not None:
            problems.append(f"{name!r} {reason}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"deform_ left the model unchanged: {'; '.join(problems[:5])}{more}")

    # Build everything that can fail before the first change.
    built = {
        module: make_conv_offset(module, offset_groups, modulated, offset_conv)
        for module in matched
        if isinstance(module, nn.Conv2d) and not isinstance(module, _OURS)
    }
    converted = []
    for module, name in matched.items():
        if isinstance(module, _OURS):
            continue
        converted.append(name)
        foreign = foreign_conv(module)
        if foreign is not None:
            take_over(module, foreign)
            continue
        # Replacing the object would lose hooks, attributes and references to it.
        module.__class__ = DeformConv2d
        layer = cast(DeformConv2d, module)
        layer.offset_groups = offset_groups
        layer.modulated = modulated
        layer.mask_scale = 2.0
        layer.max_offset = max_offset
        layer.offset_conv = offset_conv
        layer.offset_in_channels = layer.in_channels
        layer.conv_offset = built[module].train(layer.training)  # pyright: ignore[reportArgumentType]
    return converted


def _no_match(pattern: str, modules: dict[str, nn.Module]) -> str:
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    others = [name for name in modules if fnmatchcase(name, pattern)]
    if others:
        kind = type(modules[others[0]]).__name__
        text = f"{pattern!r} matches no convolution, only {others[0]!r} ({kind})"
        text += f" and {len(others) - 1} more" if len(others) > 1 else ""
    else:
        text = f"{pattern!r} matches no module"
    if not convolutions:
        return f"{text}, and the model contains no nn.Conv2d"
    near = get_close_matches(pattern, convolutions, n=3)
    if near:
        return f"{text}, near misses: {', '.join(map(repr, near))}"
    return f"{text}, convolutions are {', '.join(map(repr, convolutions[:3]))}, ..."


def _why_not(module: nn.Module, options: tuple[int, bool, float | None, OffsetConv]) -> str | None:
    """Why a convolution cannot be converted with the given options; None if it can."""
    kind = type(module).__name__
    if (foreign := foreign_conv(module)) is not None:
        return foreign.problem
    if isinstance(module, DeformConv2d):
        own = (module.offset_groups, module.modulated, module.max_offset, module.offset_conv)
        if module._keeps_options or own == options:
            return None
        return (
            f"is already deformable with offset_groups={module.offset_groups}, "
            f"modulated={module.modulated}, max_offset={module.max_offset} "
            f"and offset_conv={module.offset_conv}"
        )
    if not isinstance(module, nn.Conv2d):
        return f"is a {kind}, not an nn.Conv2d"
    if isinstance(module, GivenOffsetsConv2d):
        return None
    if isinstance(module, LazyModuleMixin):
        return f"is an uninitialized {kind}: run the model once first"
    if is_parametrized(module):
        return "has parametrized weights: convert first, then parametrize"
    overridden = sorted(_overridden(module))
    if overridden:
        return f"is a {kind}, which overrides nn.Conv2d ({', '.join(overridden)})"
    if not module.weight.is_floating_point():
        return f"has weights of {module.weight.dtype}"
    if module.in_channels % options[0]:
        return f"has {module.in_channels} input channels, not a multiple of {options[0]} groups"
    return None


def _overridden(module: nn.Conv2d) -> set[str]:
    """Methods of nn.Conv2d that the class of a module, or the module itself, overrides."""
    classes = type(module).__mro__
    names = {name for cls in classes[: classes.index(nn.Conv2d)] for name in vars(cls)}
    names = {name for name in names if not name.startswith("__") or name == "__call__"}
    return names | ({"forward", "_conv_forward"} & set(vars(module)))
