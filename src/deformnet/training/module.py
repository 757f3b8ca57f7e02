"""What the Lightning modules of all networks share: optimiser, schedule, checkpoints, the log."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from deformnet.nn import parameter_groups
from deformnet.recipes import Recipe
from deformnet.runs import DataIdentity, describe


class TrainingModule(pl.LightningModule):
    """Trains a network by its recipe. Abstract: a subclass makes the loss.

    Args:
        recipe: the schedule.
        model: the network of that recipe.
        data: what is written into checkpoints about the training data.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, data: DataIdentity) -> None:
        super().__init__()
        self.recipe = recipe
        # Convolutions run faster on this layout, on CPUs and GPUs alike.
        self.model = model.to(memory_format=torch.channels_last)
        self.data = data

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms of the loss; it and they are logged.

        Raises:
            FloatingPointError: if a term is not finite.
        """
        for name, term in terms.items():
            if not math.isfinite(value := float(term.detach())):
                raise FloatingPointError(
                    f"the {name} loss is {value} in iteration {self.trainer.global_step + 1}; "
                    "a lower lr, a clip or a longer warmup may help"
                )
        loss = torch.stack(list(terms.values())).sum()
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True)
        if len(terms) > 1:
            self.log_dict({name: term.detach() for name, term in terms.items()}, sync_dist=True)
        self.log("learning_rate", self.recipe.lr * self.recipe.lr_factor(self.trainer.global_step))
        return loss

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model,
            self.recipe.lr,
            offset_lr_scale=self.recipe.offset_lr_scale,
            weight_decay=self.recipe.weight_decay,
        )
        optimizer = SGD(groups, lr=self.recipe.lr, momentum=self.recipe.momentum)
        schedule = LambdaLR(optimizer, self.recipe.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["deformnet"] = describe(self.recipe, self.data)
