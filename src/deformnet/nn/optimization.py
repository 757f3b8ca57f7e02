"""Learning rates and weight decay of models with deformable layers."""

from typing import Any

from torch import nn

from deformnet.nn.offsets import OffsetLayer, non_negative


def parameter_groups(
    model: nn.Module, lr: float, *, offset_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the parameters of a model for an optimizer.

    The learning rate of layers that predict offsets is `offset_lr_scale * lr` times their own
    `lr_scale`, the paper's beta (section 2.3): 0.01 by default for the fully connected layer of
    `DeformRoIPool2d`, and 1 for all others. Weight decay applies to parameters of two or more
    dimensions, but not to biases and the parameters of normalization layers. Frozen parameters are
    left out; shared parameters appear once.

        >>> torch.optim.SGD(parameter_groups(model, 0.01, weight_decay=5e-4), momentum=0.9)

    Args:
        model: Any module.
        lr: Learning rate.
        offset_lr_scale: Learning rate factor of all layers that predict offsets, at least 0.
        weight_decay: Weight decay, at least 0. Each group has its own, so a weight decay passed to
            the optimizer has no effect.

    Returns:
        Non-empty groups with the keys "name", "params", "lr" and "weight_decay". The names are
        "weights", "biases", "offset weights" and "offset biases"; the last two have a suffix, as in
        "offset weights x0.01", for each `lr_scale` other than 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a number is negative.
    """
    lr = non_negative("lr", lr)
    offset_lr_scale = non_negative("offset_lr_scale", offset_lr_scale)
    weight_decay = non_negative("weight_decay", weight_decay)

    # A parameter that two layers share has the learning rate of the first.
    layer_scale: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, OffsetLayer):
            for parameter in module.parameters():
                layer_scale.setdefault(parameter, module.lr_scale)
    lr_scales = {("", ""): 1.0, ("offset ", ""): offset_lr_scale}  # by prefix and suffix
    for scale in layer_scale.values():
        lr_scales["offset ", _suffix(scale)] = offset_lr_scale * scale
    groups: dict[str, dict[str, Any]] = {}
    for (prefix, suffix), scale in lr_scales.items():
        for kind, decay in (("weights", weight_decay), ("biases", 0.0)):
            name = prefix + kind + suffix
            groups[name] = {"name": name, "params": [], "lr": scale * lr, "weight_decay": decay}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "weights" if parameter.ndim >= 2 else "biases"
            scale = layer_scale.get(parameter)
            name = kind if scale is None else f"offset {kind}{_suffix(scale)}"
            groups[name]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _suffix(scale: float) -> str:
    return "" if scale == 1 else f" x{scale}"
