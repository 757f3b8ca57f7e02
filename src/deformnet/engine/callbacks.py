"""What happens around the iterations: checkpoints, stopping on request, the log, the bar."""

import csv
import io
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from deformnet._files import naming, replacing
from deformnet.engine.runs import load_checkpoint


class Agreement(Callback):
    """Ends a run whose processes were not started alike, before they wait for one another forever.

    Args:
        facts: what all of them must agree upon, by name.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = {name: str(value) for name, value in facts.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: in every process, with what differs and where.
        """
        if trainer.world_size == 1:
            return
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, self.facts)
        differences = []
        for name in everyone[0]:
            ranks: dict[str, list[str]] = {}
            for rank, facts in enumerate(everyone):
                ranks.setdefault(facts.get(name, "unknown"), []).append(str(rank))
            if len(ranks) > 1:
                found = (f"{value} on rank {', '.join(where)}" for value, where in ranks.items())
                differences.append(f"{name}: {'; '.join(found)}")
        if differences:
            raise ValueError(
                f"the processes of this run were not started alike: {' | '.join(differences)}"
            )


class Checkpoints(Callback):
    """Writes a checkpoint every few iterations, after the last, and when asked to stop.

    It takes over the signals until training ends; whoever runs the trainer gives them back after an
    error (see `own_signals`).

    Ctrl-C and SIGTERM (of a batch system, of torchrun) are such requests: the iteration under way
    is finished on every process, since a half-made step could not be resumed exactly. A second
    Ctrl-C interrupts at once and leaves the last checkpoint.

    Args:
        path: the checkpoint, replaced every time.
        every: iterations between checkpoints.
    Attributes:
        stopped: whether it was asked to stop; scoring is then left to the next call.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.stopped = False
        self._asked = False
        self._handlers: dict[int, Any] = {}
        self._written: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals belong to the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._ask_to_stop)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Scoring, which follows, has nothing to finish first.
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        finished = trainer.global_step >= trainer.max_steps
        # All processes must stop after the same iteration, whichever was asked first.
        self.stopped = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if self.stopped:
            trainer.should_stop = True
        if self.stopped or finished or trainer.global_step % self.every == 0:
            for name, parameter in pl_module.named_parameters():
                # The loss was finite, but its gradient need not have been.
                if not parameter.isfinite().all():
                    raise FloatingPointError(
                        f"{name} is not finite after iteration {trainer.global_step}; "
                        "a lower lr, a clip or a longer warmup may help"
                    )
            trainer.save_checkpoint(self.path, weights_only=False)
            self._written = trainer.global_step

    def state(self) -> str:
        """Which checkpoint there is, in words."""
        if not self.path.is_file():
            return "there is no checkpoint yet"
        if self._written is None:
            return f"the last checkpoint is the one that training went on from, {self.path}"
        return f"the last checkpoint is that of iteration {self._written}, {self.path}"

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def own_signals() -> Iterator[None]:
    """Gives SIGINT and SIGTERM back as they were: Lightning restores only what it set itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class WholeFileIO(TorchCheckpointIO):
    """Checkpoints that are replaced as a whole and read without running code from them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """
        Raises:
            OSError: if it cannot be written; the previous checkpoint is then untouched.
        """
        try:
            with replacing(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write by an error of its own that follows the system's.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            message = f"{path}: checkpoint not written, an earlier one stays ({cause.strerror})"
            raise OSError(message) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path), map_location)


class Timer(Callback):
    """Logs the mean seconds per iteration, loading included, since the last logged iteration.

    Args:
        every: iterations between logged ones.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._since = 0.0
        self._iterations = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()
        self._iterations = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._iterations += 1
        if trainer.global_step % self.every == 0:
            now = time.perf_counter()
            pl_module.log("seconds", (now - self._since) / self._iterations)
            self._since, self._iterations = now, 0


class CSVLog(Logger):
    """One row for each logged iteration, on disk at once, without repetition after a resume.

    (Lightning's own CSV logger deletes the rows of earlier sessions.)

    Args:
        path: the file.
        terms: names of the loss's terms, if it has several.
        every: iterations between rows. (Lightning logs once more when it is stopped.)
        keep: the iteration that the run is resumed from; later rows are dropped.
    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, terms: Sequence[str], every: int, keep: int) -> None:
        super().__init__()
        self.path = path
        self.columns = ("iteration", "loss", *terms, "learning_rate", "seconds")
        self.every = every
        self._begin(keep)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe is in a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "loss" not in metrics or step is None or (step + 1) % self.every != 0:
            return
        row = {"iteration": step + 1} | {k: f"{metrics[k]:.9g}" for k in self.columns[1:]}
        with naming(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv_text(self.columns, [row]))

    @rank_zero_only
    def _begin(self, keep: int) -> None:
        rows = [row for row in read_log(self.path) if int(row["iteration"]) <= keep]
        with replacing(self.path) as file:
            header = ",".join(self.columns) + "\n"
            file.write((header + _csv_text(self.columns, rows)).encode())


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV log; one that a crash cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole)))


def _csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [row[column] for column in columns] for row in rows
    )
    return text.getvalue()


class ProgressBar(TQDMProgressBar):
    """One bar over all iterations; sparse where the output is a file."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 50)

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        trainer = self.trainer
        # Here and not at the start of an "epoch", where a resumed run does not pass.
        self.train_progress_bar.total = trainer.max_steps
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("training")

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """The whole run is one epoch to Lightning."""

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
            self.val_progress_bar.set_description("scoring")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
