"""Learning rates and weight decay for models with deformable layers."""

from typing import Any

from torch import nn

from deformnet.nn.offsets import OffsetLayer


def parameter_groups(
    model: nn.Module, lr: float, *, offset_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters of a model, grouped for an optimizer.

    Layers that make offsets learn at `offset_lr_scale * lr` times their own `lr_scale`: the paper's
    beta (section 2.3). Their own is 1, except for the fully connected layer of `DeformRoIPool2d`,
    whose `beta` is 0.01 unless it was built with another. Weight decay applies to parameters of
    two dimensions or more; biases and the scales and shifts of normalisation layers are not
    decayed. Parameters that do not require a gradient are left out, shared ones appear once.

        >>> torch.optim.SGD(parameter_groups(model, 0.01, weight_decay=5e-4), momentum=0.9)

    Args:
        model: any module.
        lr: learning rate.
        offset_lr_scale: factor for all layers that make offsets, 0 or more.
        weight_decay: 0 or more. Give it here: every group carries its own, and one that is given
            to the optimizer would not apply to any.

    Returns:
        Groups with the keys "name", "params", "lr" and "weight_decay"; none is empty. The names
        are "weights", "biases", "offset weights" and "offset biases"; the last two come again for
        each other `lr_scale` of the layers, as "offset weights x0.01".

    Raises:
        ValueError: if a number is negative.
    """
    for name, value in (
        ("lr", lr),
        ("offset_lr_scale", offset_lr_scale),
        ("weight_decay", weight_decay),
    ):
        if not value >= 0:
            raise ValueError(f"{name}: wanted a number of at least 0, got {value}")

    # A parameter that two layers share learns at the rate of the first.
    own_scale: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, OffsetLayer):
            for parameter in module.parameters():
                own_scale.setdefault(parameter, module.lr_scale)
    # What is left of the learning rate in each family of groups, by the two parts of its name.
    families = {("", ""): 1.0, ("offset ", ""): offset_lr_scale}
    for scale in own_scale.values():
        families["offset ", _suffix(scale)] = offset_lr_scale * scale
    groups: dict[str, dict[str, Any]] = {}
    for (prefix, suffix), scale in families.items():
        for kind, decay in (("weights", weight_decay), ("biases", 0.0)):
            name = prefix + kind + suffix
            groups[name] = {"name": name, "params": [], "lr": scale * lr, "weight_decay": decay}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 else "biases"
            scale = own_scale.get(parameter)
            name = kind if scale is None else f"offset {kind}{_suffix(scale)}"
            groups[name]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _suffix(scale: float) -> str:
    return "" if scale == 1 else f" x{scale}"
