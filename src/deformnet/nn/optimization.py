"""Learning rates and weight decay for models with deformable layers."""

from typing import Any

from torch import nn

from deformnet.nn.offsets import OffsetLayer


def parameter_groups(
    model: nn.Module, lr: float, *, offset_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters of a model, grouped for an optimizer.

    Layers that make offsets learn at `offset_lr_scale * lr`: the paper's beta, 1 by default and
    0.01 for the fully connected layer of the offsets in Faster R-CNN (section 2.3). Weight decay
    applies to parameters of two dimensions or more; biases and the scales and shifts of
    normalisation layers are not decayed. Parameters that do not require a gradient are left out,
    shared ones appear once.

        >>> torch.optim.SGD(parameter_groups(model, 0.01, weight_decay=5e-4), momentum=0.9)

    Args:
        model: any module.
        lr: learning rate.
        offset_lr_scale: beta, 0 or more.
        weight_decay: 0 or more. Give it here: every group carries its own, and one that is given
            to the optimizer would not apply to any.

    Returns:
        Up to four groups with the keys "name" ("weights", "biases", "offset weights",
        "offset biases"), "params", "lr" and "weight_decay"; none is empty.

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

    offset_parameters = {
        parameter
        for module in model.modules()
        if isinstance(module, OffsetLayer)
        for parameter in module.parameters()
    }
    groups: dict[str, dict[str, Any]] = {}
    for prefix, scale in (("", 1.0), ("offset ", offset_lr_scale)):
        for kind, decay in (("weights", weight_decay), ("biases", 0.0)):
            name = prefix + kind
            groups[name] = {"name": name, "params": [], "lr": scale * lr, "weight_decay": decay}
    for parameter in model.parameters():
        if parameter.requires_grad:
            prefix = "offset " if parameter in offset_parameters else ""
            kind = "weights" if parameter.ndim >= 2 else "biases"
            groups[prefix + kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
