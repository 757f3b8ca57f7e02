"""Turns the convolutions of any model into deformable ones."""

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from deformnet.nn.deform_conv import DeformConv2d, make_conv_offset
from deformnet.nn.offsets import OffsetLayer


def deform_(
    model: nn.Module, *patterns: str, offset_groups: int = 1, modulated: bool = False
) -> list[str]:
    """Make the matching convolutions of a model deformable, in place.

    Each `nn.Conv2d` whose name matches becomes a `DeformConv2d` and stays the same object with the
    same parameters: optimizers, hooks, frozen weights and shared layers keep working. Its new
    child `conv_offset` starts at zero, so the model computes what it did before. Give an optimizer
    that already exists the new parameters, or make it afterwards with `parameter_groups`.

        >>> deform_(torchvision.models.resnet50(), "layer4.*.conv2")
        ['layer4.0.conv2', 'layer4.1.conv2', 'layer4.2.conv2']

    Args:
        model: any module that holds `nn.Conv2d` layers.
        patterns: shell-style globs on the names of `model.named_modules()`; `*` matches dots too.
            Modules that match and hold no weights of a convolution are left alone.
        offset_groups: as in `DeformConv2d`.
        modulated: as in `DeformConv2d`.

    Returns:
        The names of the layers that were converted, in the model's order. Layers that were
        deformable before are not converted again.

    Raises:
        TypeError: if `model` is no module or a pattern no string.
        ValueError: if there is no pattern; if a pattern matches no convolution; if one matches
            a convolution that cannot be converted: one that is transposed, 1-D or 3-D, of a class
            that changes what `nn.Conv2d` does, with channels that `offset_groups` does not divide,
            or deformable already with other options. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    if not patterns:
        raise ValueError('patterns: wanted at least one, such as "layer4.*.conv2", got none')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"patterns: wanted strings, got {pattern!r}")
    if offset_groups < 1:
        raise ValueError(f"offset_groups: wanted at least 1, got {offset_groups}")
    if isinstance(model, _ConvNd):
        raise ValueError(
            f"model: wanted a model that holds convolutions, got a single {type(model).__name__}; "
            "build a DeformConv2d, or put it into nn.Sequential"
        )

    modules = dict(_modules_to_match(model))
    matched: dict[nn.Module, str] = {}  # each layer once, by the first of its names that matches
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and any(fnmatchcase(name, p) for p in patterns):
            matched.setdefault(module, name)

    problems = [_no_match(p, modules) for p in patterns if not _matches_convolution(p, modules)]
    for module, name in matched.items():
        reason = _why_not(module, offset_groups, modulated)
        if reason is not None:
            problems.append(f"{name!r} {reason}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"deform_ changed nothing: {'; '.join(problems[:5])}{more}")

    # Everything that can fail comes before the first change.
    converted = [
        (name, module, make_conv_offset(module, offset_groups, modulated))
        for module, name in matched.items()
        if isinstance(module, nn.Conv2d) and not isinstance(module, DeformConv2d)
    ]
    for _, module, conv_offset in converted:
        # A new object in its place would lose hooks, attributes, and references held elsewhere.
        module.__class__ = DeformConv2d
        layer = cast(DeformConv2d, module)
        layer.offset_groups = offset_groups
        layer.modulated = modulated
        layer.conv_offset = conv_offset.train(layer.training)
    return [name for name, _, _ in converted]


def _modules_to_match(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names, without the model itself and the layers of offsets."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not isinstance(module, OffsetLayer):
            yield name, module


def _matches_convolution(pattern: str, modules: dict[str, nn.Module]) -> bool:
    return any(isinstance(m, _ConvNd) and fnmatchcase(name, pattern) for name, m in modules.items())


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
        return f"{text}, and the model has no nn.Conv2d"
    near = get_close_matches(pattern, convolutions, n=3)
    if near:
        return f"{text}, near misses: {', '.join(map(repr, near))}"
    return f"{text}, convolutions are {', '.join(map(repr, convolutions[:3]))}, ..."


def _why_not(module: nn.Module, offset_groups: int, modulated: bool) -> str | None:
    """What keeps a convolution from being converted, or None."""
    kind = type(module).__name__
    if not isinstance(module, nn.Conv2d):
        return f"is a {kind}, not an nn.Conv2d"
    if isinstance(module, DeformConv2d):
        if (module.offset_groups, module.modulated) != (offset_groups, modulated):
            return (
                f"is deformable already, with offset_groups={module.offset_groups} and "
                f"modulated={module.modulated}"
            )
        return None
    if isinstance(module, LazyModuleMixin):
        return f"is a {kind} without weights: run the model once before"
    if is_parametrized(module):
        return "has parametrized weights: convert first, then parametrize"
    changed = sorted(_changes(module))
    if changed:
        return f"is a {kind}, which changes nn.Conv2d ({', '.join(changed)})"
    if not module.weight.is_floating_point():
        return f"has weights of {module.weight.dtype}"
    if module.in_channels % offset_groups:
        return f"has {module.in_channels} input channels, no multiple of {offset_groups} groups"
    return None


def _changes(module: nn.Conv2d) -> set[str]:
    """What the module's own class, or the module itself, defines beside a constructor."""
    kinds = type(module).__mro__
    own = {name for kind in kinds[: kinds.index(nn.Conv2d)] for name in vars(kind)}
    own = {name for name in own if not name.startswith("__") or name == "__call__"}
    return own | ({"forward", "_conv_forward"} & set(vars(module)))
