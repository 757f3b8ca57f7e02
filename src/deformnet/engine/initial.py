"""Initial network of a training run: random weights, a pretrained backbone, or an earlier run."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from deformnet._errors import users_values
from deformnet._hub import local
from deformnet.engine.runs import TrainedRun, load_run
from deformnet.models.backbones.weights import holds_run, misfit
from deformnet.recipes import Recipe

_NORM = re.compile(r".*\.num_batches_tracked$")  # only in trained batch norm
_MAY_LACK = re.compile(rf".*\.(conv_offset|fc_offset)\.|{_NORM.pattern}")


def initial(recipe: Recipe, classes: Sequence[str]) -> tuple[nn.Module, str]:
    """The network with its initial weights, which are the same in every process.

    A run of the same network with the same classes provides the whole network; any other run
    provides only the backbone.

    Returns:
        The network, and a line that describes the source of its weights.
    Raises:
        FileNotFoundError, UserError: if the weights that `init` names do not exist or do not fit.
        OSError: if the download fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        with users_values():
            model = recipe.build_model(len(classes))
    if recipe.init is None:
        return model, "initial weights: random"
    if not holds_run(path := local(recipe.init)):
        return model, f"initial weights of the backbone: {recipe.init}"
    run = load_run(path)
    state = run.model.state_dict()
    reason = _reason(model, run, recipe, classes)
    if reason is None:
        model.load_state_dict(state, strict=False)
        return model, f"initial weights: {recipe.init}, backbone and head: {len(state)} tensors"
    backbone = sum(name.startswith("backbone.") for name in state)
    return model, (
        f"initial weights: {recipe.init}, backbone only ({backbone} tensors), because {reason}"
    )


def _reason(
    model: nn.Module, run: TrainedRun, recipe: Recipe, classes: Sequence[str]
) -> str | None:
    """Why a network cannot start from all weights of a run; None if it can."""
    if run.recipe.network != recipe.network:
        return f"the run trained {run.recipe.network}, not {recipe.network}"
    if len(run.data.classes) != len(classes):
        return f"the run has {len(run.data.classes)} classes, not {len(classes)}"
    if tuple(run.data.classes) != tuple(classes):
        pairs = zip(run.data.classes, classes, strict=True)
        old, new = next((old, new) for old, new in pairs if old != new)
        return f"the classes differ ({old!r} in the run, {new!r} in the data)"
    state, own = run.model.state_dict(), model.state_dict()
    expected = {k: v for k, v in own.items() if k in state or not _MAY_LACK.match(k)}
    return misfit(expected, {k: v for k, v in state.items() if k in own or not _NORM.match(k)})
