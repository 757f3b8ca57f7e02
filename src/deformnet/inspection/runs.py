"""Runs that are opened for inspection."""

from pathlib import Path
from typing import cast

import torch

from deformnet._errors import UserError
from deformnet.engine import load_run
from deformnet.models import Network
from deformnet.nn import DeformConv2d
from deformnet.tasks import task_of


class OpenedRun:
    """A trained run, opened for inspection.

    Args:
        path: run folder, or the file of an exported run.
        device: device to compute on; None uses a GPU if there is one.
    Attributes:
        network: name of the network.
        task: task of the network.
        data: identity of the training data.
        predictor: predictor of the network.
        model: the network itself.
        deformable: names of its deformable convolutions.
        chain: names of the 3x3 convolutions of conv5 along one path, from the output to the input.
    Raises:
        FileNotFoundError, UserError: as `deformnet.engine.load_run`; also if the network does not
            run conv5, where deformable convolutions are.
    """

    def __init__(self, path: Path, device: torch.device | str | None = None) -> None:
        recipe, model, self.data = load_run(path)
        self.path = path
        self.network = recipe.network
        self.task = task_of(recipe)
        self.predictor = self.task.predictor(model, self.data, device)
        self.model = cast(Network, self.predictor.model)
        self.deformable = tuple(
            name for name, layer in self.model.named_modules() if isinstance(layer, DeformConv2d)
        )
        self.chain = tuple(f"backbone.{name}" for name in self.model.backbone.filter_chain())
        if not self.model.uses_conv5:
            raise UserError(
                f"{path}: expected a network that runs conv5, where deformable layers are, but got "
                f"{self.network}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictor.classes

    @property
    def deformable_layers(self) -> int:
        """Number of deformable convolutions and RoI pooling layers that classes depend on."""
        return len(self.deformable) + (self.predictor.pooling is not None)


def open_runs(
    path: Path, baseline: Path | None, device: torch.device | str | None = None
) -> tuple[OpenedRun, OpenedRun | None]:
    """Open a run with deformable layers, and its baseline without, if there is one.

    Raises:
        FileNotFoundError, UserError: as `OpenedRun`; also if the run has no deformable layers, or
            the baseline has some, is of another network, or was trained on other classes.
    """
    run = OpenedRun(path, device)
    if not run.deformable_layers:
        raise UserError(
            f"{path}: expected a network with deformable layers, but got none; pass a deformable "
            "run, and this one as its --baseline"
        )
    if baseline is None:
        return run, None
    other = OpenedRun(baseline, device)
    if other.network != run.network:
        raise UserError(
            f"{baseline}: expected a baseline of {run.network} for {path}, but got {other.network}"
        )
    if other.classes != run.classes:
        raise UserError(
            f"{baseline}: expected a baseline with the classes of {path} "
            f"({', '.join(run.classes)}), but got {', '.join(other.classes)}"
        )
    if other.deformable_layers:
        raise UserError(
            f"{baseline}: expected a baseline without deformable layers, but got "
            f"{other.deformable_layers}"
        )
    return run, other
