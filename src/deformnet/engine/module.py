"""What the Lightning modules of all networks share: optimiser, schedule, checkpoints, the log."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from deformnet.nn import parameter_groups
from deformnet.recipes import Recipe
from deformnet.engine.runs import DataIdentity, describe


class Part(Protocol):
    """Some images of the batch of an iteration: those that a process works through at a time."""

    @property
    def images(self) -> Tensor:
        """[N, 3, H, W], those that are smaller extended to the right and below."""
        ...

    def weight(self) -> Tensor | int:
        """Of how many things the loss is the mean: of images, or of valid pixels."""
        ...

    def extended(self, height: int, width: int) -> Self:
        """The same with images of this size, which is at least their own."""
        ...


class TrainingModule(pl.LightningModule):
    """Trains a network by its recipe. Abstract: a subclass makes the loss.

    An iteration gives the same gradient however its batch is divided among processes and, in each
    of them, into parts: all are extended to one size, and each counts by its weight. (Batch norm
    that is trained is the exception: its statistics are those of one part, over all processes.)

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

    @abstractmethod
    def terms(self, part: Any) -> dict[str, Tensor]:
        """The terms of the loss by name, each the mean over what the part's weight counts."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Makes the gradients of all parts but the last, whose loss Lightning goes on with.

        Logs the loss of the whole batch, over all processes, and its terms if there are several.

        Raises:
            FloatingPointError: if a term is not finite.
        """
        self.zero_grad()
        height, width = self._largest(batch)
        sums: dict[str, Tensor] = {}
        loss = torch.zeros(())
        for number, (part, share) in enumerate(zip(batch, self._shares(batch), strict=True)):
            if number > 0:
                # Between processes gradients are added up only in the backward pass after this
                # method, which finds there what the passes in here have left.
                with torch.autocast(self.device.type, enabled=False):
                    self.trainer.strategy.backward(loss, None)
            if part.images.shape[-2:] != (height, width):
                part = part.extended(height, width)
            terms = {name: term * share for name, term in self.terms(part).items()}
            self._require_finite(terms)
            loss = torch.stack(list(terms.values())).sum()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
        total = torch.stack(list(sums.values())).sum()
        self.log("loss", total, prog_bar=True, sync_dist=True)
        if len(sums) > 1:
            self.log_dict(sums, sync_dist=True)
        self.log("learning_rate", self.recipe.lr * self.recipe.lr_factor(self.trainer.global_step))
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning's moment for it is after `training_step`, which has made gradients by then."""

    def _largest(self, batch: Sequence[Part]) -> tuple[int, int]:
        """Height and width of the largest images of the batch, over all processes.

        The processes wait for the one with the largest images anyway.
        """
        sides = torch.tensor([part.images.shape[-2:] for part in batch]).amax(dim=0)
        if self.trainer.world_size > 1:
            sides = self.trainer.strategy.reduce(sides.to(self.device), reduce_op="max")
        height, width = sides.tolist()
        return height, width

    def _shares(self, batch: Sequence[Part]) -> Tensor:
        """The weight of each part in the mean over the whole batch.

        The gradients of processes are averaged, those of the parts in a process added up.
        """
        weights = [torch.as_tensor(part.weight(), device=self.device) for part in batch]
        counts = torch.stack(weights).double()
        total, processes = counts.sum(), self.trainer.world_size
        if processes > 1:
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return (counts * processes / total.clamp(min=1)).float()

    def _require_finite(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            if not math.isfinite(value := float(term.detach())):
                raise FloatingPointError(
                    f"the {name} loss is {value} in iteration {self.trainer.global_step + 1}; "
                    "a lower lr, a clip or a longer warmup may help"
                )

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
