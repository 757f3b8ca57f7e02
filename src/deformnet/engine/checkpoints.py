"""Content of checkpoints, and its validation for training and loading."""

import math
from collections.abc import Mapping
from typing import NotRequired, TypedDict, cast

from torch import Tensor
from torch.optim import AdamW, Optimizer

from deformnet._errors import UserError
from deformnet.models._tensors import flaw, weights
from deformnet.models.backbones.weights import misfit


class Description(TypedDict):
    """A run in plain values; makes checkpoints and cards readable on their own."""

    recipe: dict[str, object]
    data: dict[str, object]


class Validated(TypedDict):
    """Outcome of the validations of a run so far."""

    iteration: int
    """Iteration of the last validation; 0 before the first."""
    best: float | None
    """Best score in percent."""
    best_iteration: int
    waited: int
    """Validations since the best one."""


class Checkpoint(TypedDict):
    """The content of a checkpoint; `precision` is the scale of gradients in float16."""

    deformnet: Description
    model: dict[str, Tensor]
    """The network, with averaged weights if the recipe has `ema`."""
    unaveraged: NotRequired[dict[str, Tensor] | None]
    """The weights that the optimizer updates, if they differ from those of the network."""
    optimizer: dict[str, object]
    precision: dict[str, float]
    iteration: int
    validated: NotRequired[Validated]


def checked(content: object) -> Checkpoint:
    """Returns the content of a file as a checkpoint.

    Raises:
        UserError: if a part is missing or has another type, or a weight is not finite.
    """
    if not isinstance(content, dict) or not Checkpoint.__required_keys__ <= set(content):
        raise UserError("not a checkpoint of deformnet")
    for key in ("deformnet", "optimizer", "precision"):
        if not isinstance(content[key], dict):
            raise UserError(f"expected {key} to be a dict, but got {type(content[key]).__name__}")
    for key in ("recipe", "data"):
        if not _is_plain(content["deformnet"].get(key)):
            raise UserError(f"expected {key} to be a dict of plain values")
    _require_count("iteration", content["iteration"])
    weights(content["model"])
    if content.get("unaveraged") is not None:
        weights(content["unaveraged"])
    if "validated" in content:
        _require_validated(content["validated"])
    return cast(Checkpoint, content)


def require_resumable(
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    averaged: bool,
    optimizer: Optimizer,
    precision: Mapping[str, float],
) -> None:
    """Checks that a run can resume from the training state of a checkpoint.

    Args:
        checkpoint: a checkpoint of the run.
        state: state dict of the network.
        averaged: whether the weights are averaged.
        optimizer: the optimizer.
        precision: state of the gradient scaler.
    Raises:
        UserError: if the state does not fit.
    """
    unaveraged = checkpoint.get("unaveraged")
    if (unaveraged is not None) != averaged:
        kinds = {True: "averaged weights (ema)", False: "weights without averaging (ema)"}
        raise UserError(f"expected {kinds[averaged]}, but got {kinds[not averaged]}")
    if unaveraged is not None and (problem := misfit(state, unaveraged)) is not None:
        raise UserError(f"unaveraged weights do not fit the network: {problem}")
    saved = checkpoint["precision"]
    kinds, expected = ({k: type(v) for k, v in it.items()} for it in (saved, precision))
    if kinds != expected or not all(math.isfinite(v) for v in saved.values()):
        raise UserError("expected the gradient scaler's state of this precision, but got another")
    _require_moments(checkpoint["optimizer"], optimizer)


def _is_plain(values: object) -> bool:
    """Whether it is a dict of strings, numbers, None, or lists of these."""
    return isinstance(values, dict) and all(
        isinstance(name, str)
        and all(
            isinstance(one, str | int | float | None)
            for one in (value if isinstance(value, list | tuple) else [value])
        )
        for name, value in values.items()
    )


def optimizer_state(
    checkpoint: Checkpoint, optimizer: Optimizer
) -> dict[str, list[dict[str, object]] | object]:
    """The optimizer state of a checkpoint that fits, with the recipe's settings except for the
    learning rates."""
    saved, own = checkpoint["optimizer"], optimizer.state_dict()
    pairs = zip(own["param_groups"], cast(list, saved["param_groups"]), strict=True)
    groups = [group | {"lr": other["lr"]} for group, other in pairs]
    return {"state": saved["state"], "param_groups": groups}


def _require_moments(saved: Mapping[str, object], optimizer: Optimizer) -> None:
    """Checks the state of each parameter, such as its momentum."""
    if not saved:
        raise UserError("expected the training state, but got only the network")
    kept = {"step", "exp_avg", "exp_avg_sq"}
    kept = kept if isinstance(optimizer, AdamW) else {"momentum_buffer"}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(states, dict) or not isinstance(groups, list):
        raise UserError("expected optimizer to have a dict `state` and a list `param_groups`")
    rates = [group.get("lr") for group in groups if isinstance(group, dict)]
    if len(rates) != len(optimizer.param_groups) or not all(map(_is_finite, rates)):
        raise UserError(
            f"expected optimizer to have finite learning rates of {len(optimizer.param_groups)} "
            "parameter groups"
        )
    for number, state in states.items():
        where = f"optimizer state {number!r:.20}"
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise UserError(f"{where}: expected the index of one of {len(parameters)} parameters")
        if not isinstance(state, dict) or set(state) != kept:
            raise UserError(f"{where}: expected a dict with {', '.join(sorted(kept))}")
        for name, value in state.items():
            shape = () if name == "step" else parameters[number].shape
            if value is None and name == "momentum_buffer":
                continue
            if (
                not isinstance(value, Tensor)
                or value.shape != shape
                or not value.is_floating_point()
                or flaw(value, finite=False) is not None
            ):
                raise UserError(f"{where}: expected {name} to be a float tensor {list(shape)}")


def _require_validated(saved: object) -> None:
    if not isinstance(saved, dict) or set(saved) != Validated.__required_keys__:
        keys = ", ".join(sorted(Validated.__required_keys__))
        raise UserError(f"expected validated to be a dict with {keys}")
    for name in ("iteration", "best_iteration", "waited"):
        _require_count(f"validated {name}", saved[name])
    best = saved["best"]
    if best is not None and not _is_finite(best):
        raise UserError(f"expected the best score to be a finite number, but got {best!r:.40}")


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _require_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise UserError(f"expected {name} to be a non-negative integer, but got {value!r:.40}")
