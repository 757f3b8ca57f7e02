"""Offsets that run away, seen while the model trains."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from deformnet.analysis import LayerHealth, OffsetObserver

REMEDY = "a lower offset_lr_scale, gradient clipping or a longer warm-up may help"


class OffsetHealth(Callback):
    """Logs how far the offsets of each deformable layer reach, and warns when they run away.

    For any Lightning module that holds deformnet's or torchvision's `DeformConv2d`, or deformable
    RoI pooling. Logged are, by the name of the layer, `offsets/NAME/` with `mean_shift`,
    `largest_shift`, `outside` and `gradient_ratio`, as `LayerHealth` has them; with several
    processes, those of the first. Between the logged iterations it does nothing.

    What running away means, `LayerHealth.runaway` says. Each layer is warned of once.

    Args:
        every: iterations between logged ones; a multiple of the trainer's `log_every_n_steps`, or
            the loggers do not get all of them. Warnings come no later than that after the offsets
            have left.
        stop: end the training when a layer runs away in any process.
    Attributes:
        ran_away: for each layer that has run away, what was said.
        stopped: whether training was ended for it.
    Raises:
        ValueError: if `every` is below 1; at the start of training, if the module has no
            deformable layer.
    """

    def __init__(self, every: int = 10, *, stop: bool = False) -> None:
        if every < 1:
            raise ValueError(f"every: wanted at least 1, got {every}")
        self.every = every
        self.stop = stop
        self.ran_away: dict[str, str] = {}
        self.stopped = False
        self._observer: OffsetObserver | None = None
        self._health: list[LayerHealth] | None = None
        self._watches = False
        self._due = every

    def reason(self) -> str:
        """Why training was ended, in words."""
        # What ran away in another process is known there.
        return next(iter(self.ran_away.values()), "the offsets run away in another process")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observer = OffsetObserver(pl_module)
        self._due = self._next(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The batches of one iteration may be several, when gradients are accumulated; and a batch
        # several iterations, when there are several optimizers.
        if not self._watches and trainer.global_step + 1 >= self._due:
            assert self._observer is not None
            self._observer.__enter__()
            self._watches = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Here all gradients are there, and not yet clipped."""
        if self._watches:
            assert self._observer is not None
            self._health = self._observer.health()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._health is None:
            return
        health, self._health = self._health, None
        self._end()
        self._due = self._next(trainer.global_step)
        found = {layer.layer: reason for layer in health if (reason := layer.runaway())}
        for layer in health:
            for name in ("mean_shift", "largest_shift", "outside", "gradient_ratio"):
                value = getattr(layer, name)
                if value is not None:
                    pl_module.log(f"offsets/{layer.layer}/{name}", value)
        for name, reason in found.items():
            if name not in self.ran_away:
                self.ran_away[name] = (
                    f"the offsets of {name} run away in iteration {trainer.global_step}: "
                    f"{reason}; {REMEDY}"
                )
                rank_zero_warn(self.ran_away[name])
        # All processes must stop after the same iteration.
        if self.stop and trainer.strategy.reduce_boolean_decision(bool(found), all=False):
            self.stopped = True
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _next(self, iteration: int) -> int:
        """The first one after it that is looked at."""
        return (iteration // self.every + 1) * self.every

    def _end(self) -> None:
        if self._observer is not None:
            self._observer.stop()
        self._watches = False
