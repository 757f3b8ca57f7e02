"""Training from folder to folder.

The loop is written with Lightning Fabric, which starts the processes (or joins those of torchrun,
SLURM and Ray), moves tensors, and handles mixed precision and the exchange of gradients. The order
of steps is `_Run.fit`, to be read from top to bottom.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deformnet._errors import UserError
from deformnet._files import FileVersion, file_version, write_json
from deformnet.analysis.health import has_deformable_layers
from deformnet.data.location import Location
from deformnet.data.workers import loaded
from deformnet.engine.averaging import AveragedNetwork
from deformnet.engine.checkpoints import Checkpoint, optimizer_state, require_resumable
from deformnet.engine.evaluation import require_frozen, score, shared_facts
from deformnet.engine.header import header
from deformnet.engine.health import OffsetHealth
from deformnet.engine.initial import initial
from deformnet.engine.interruption import StopRequested
from deformnet.engine.logs import TrainingLog, logger
from deformnet.engine.processes import FabricProcesses, Layout, launched
from deformnet.engine.results import Result
from deformnet.engine.runs import (
    best_path,
    checkpoint_path,
    describe,
    existing_checkpoint,
    load_checkpoint,
    locked,
    move,
    previous_path,
    recipe_and_data,
    restored,
    save_checkpoint,
)
from deformnet.engine.sampling import Iterations
from deformnet.engine.settings import Hardware, LoopOptions
from deformnet.engine.shared_norm import share_statistics
from deformnet.engine.validation import Validator, pictures_of
from deformnet.models.network import Network
from deformnet.nn import parameter_groups
from deformnet.recipes import Recipe
from deformnet.tasks import task_of
from deformnet.tasks.base import Batch, DataIdentity, TaskOptions
from deformnet.tasks.features import FeatureCache
from deformnet.tasks.own import Data


class TrainingStopped(Exception):
    """Training was asked to stop; the checkpoint is written and the message says how to go on."""


def train(
    recipe: Recipe,
    data: Data,
    out: str | Path,
    *,
    split: str = "train",
    val_split: str | None = "val",
    val_data: Data | None = None,
    proposals: Sequence[str | Path] = (),
    epochs: float | None = None,
    continue_to: int | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    loop: LoopOptions = LoopOptions(),  # noqa: B008
) -> Result:
    """Trains a network in a run folder, or resumes the run in it, and evaluates the network.

    A resumed run ends with exactly the same weights as an uninterrupted one, as far as the
    machine's arithmetic is reproducible (on a CPU: with the same number of threads).

    With several devices and no launcher, Fabric starts the other processes by running the program
    again, so call this under `if __name__ == "__main__":`. Gradients are those of the whole batch,
    however it is divided among processes and into parts. Trained batch norm takes its statistics
    over all processes; with `accumulate`, over one part of the batch at a time.

    Args:
        recipe: network, image size and schedule.
        data: folder of the data set, in a layout that the recipe's task reads; or a torch data set
            without splits (see `deformnet.tasks.own`).
        out: run folder; see `deformnet.engine.runs` for its contents.
        split: split to train on.
        val_split: split to evaluate on at the end, and during training as set by `loop`; None
            disables evaluation. The default split may be missing.
        val_data: data set with `val_split`, if it is not `data`; required to evaluate a network
            trained on a torch data set.
        proposals: files of stored proposals for both splits, which replace the detector's own
            proposals; see `deformnet.engine.propose`.
        epochs: passes over the training images, instead of the recipe's iterations.
        continue_to: total number of iterations for the run in `out`, whether finished or not,
            instead of the recipe's number. From the iteration that the run has reached, the
            learning rate follows the schedule for the new number. If the number differs from the
            run's, patience starts again from zero.
        hardware: processes and devices.
        loop: checkpoints, logs and memory.
    Returns:
        The contents of `metrics.json`, for the best network if there was validation during
        training, otherwise for the last one.
    Raises:
        FileNotFoundError: if data or weights are missing.
        UserError: if an image is unreadable, `out` contains a run with another recipe or other
            data, the batch cannot be divided, or the processes were started differently.
        OSError: if a file cannot be written; the last checkpoint stays intact.
        FloatingPointError: if the loss is not finite, the weights are not finite when a checkpoint
            is due, or offsets run away and `loop.stop_on_runaway` is set.
        TrainingStopped: after Ctrl-C or SIGTERM.
    """
    out = Path(out)
    layout = Layout.of(hardware)
    _require_fit(recipe, layout, loop, data)
    task = task_of(recipe, TaskOptions(proposals=tuple(map(Path, proposals))))
    images = task.training_set(data, split)
    recipe = _with_iterations(recipe, len(images), epochs, continue_to)
    validation = None
    val_data, val_split = task.validation(data, val_data, val_split) or (None, None)
    if val_data is not None and val_split is not None:
        validation = task.evaluation_set(val_data, val_split, images.identity)
    if validation is None and loop.patience is not None:
        raise UserError("expected a validation split for patience, but got none")
    found = file_version(checkpoint_path(out))
    checkpoint = _checkpoint_of(out, recipe, images.identity, further=continue_to is not None)
    done = 0 if checkpoint is None else checkpoint["iteration"]
    facts = {
        **shared_facts(recipe, images.identity, validation),
        "accumulate": loop.accumulate,
        "checkpoint_activations": loop.checkpoint_activations,
        "checkpoint_every": loop.checkpoint_every,
        "validate_every": loop.validate_every,
        "patience": loop.patience,
        "feature_cache": loop.feature_cache,
        "the run folder's last iteration": done,
    }
    if checkpoint is None:
        model, taken = initial(recipe, images.classes)
    else:
        model, taken = restored(checkpoint, checkpoint_path(out)).model, None
    task.freeze(model)
    backbone = cast(Network, model).backbone
    if loop.feature_cache is not None:
        require_frozen(backbone, recipe)
    with (
        launched(layout, recipe.precision, facts) as processes,
        processes.interruption.collected(),
        _alone(out, processes, found),
    ):
        fabric, total = processes.fabric, recipe.iterations
        earlier = None if checkpoint is None else checkpoint.get("validated")
        validator = Validator(validation, loop, total, processes, earlier)
        if val_data is not None and val_split is not None:
            validator.pictures = pictures_of(task, val_data, val_split, images.identity)
        if fabric.is_global_zero:
            if checkpoint is None or continue_to is not None:
                write_json(out / "recipe.json", recipe.to_dict())
            if validator.validated["best"] is None:
                best_path(out).unlink(missing_ok=True)  # of a validation that no checkpoint records
        fabric.barrier()
        cache = None
        if loop.feature_cache is not None:
            cache = FeatureCache(loop.feature_cache, backbone, fabric.device)
            validator.cache = cache
        if not validator.exhausted and (done < total or validator.due(done)):
            if cache is not None:
                processes.places.at("caching features")
                shown = dataclasses.replace(processes, progress=loop.progress)
                try:
                    images.features = cache.filled(images, recipe.flip, shown)
                except StopRequested:
                    raise TrainingStopped(
                        "stopped while caching features; run the same command to continue"
                    ) from None
            run = _Run(processes, recipe, model, images.identity, out, loop, checkpoint, validator)
            batches = loaded(
                Iterations(images, recipe, loop.accumulate, processes.rank, processes.count),
                range(done, total),
                workers=processes.workers,
                what=lambda index: f"the batch of iteration {index + 1}",
                pin=layout.gpu,
                timeout=processes.timeout,
                stopping=processes.stopping,
            )
            log = None
            if fabric.is_global_zero:
                for line in header(recipe, images, split, validation, val_split, fabric, model):
                    logger.info(line)
                logger.info(taken or f"resuming after iteration {done} of {total}")
                log = TrainingLog(
                    *(out, task.loss_terms, done, total),
                    validated=validator.validated["iteration"],
                    progress=loop.progress,
                )
            with closing(batches), closing(log) if log else nullcontext():
                run.fit(batches, log)
            del run  # frees the memory of the optimizer
        ended = load_checkpoint(path := existing_checkpoint(out))
        model = restored(ended, path).model
        result = Result.of(recipe, model, out, ended["iteration"])
        if validation is not None:
            try:
                scores = score(processes, model, validation, progress=loop.progress, cache=cache)
            except StopRequested:
                raise TrainingStopped(
                    "stopped during the evaluation after training; run the same command to continue"
                ) from None
            result = dataclasses.replace(
                result, split=val_split, images=len(validation), scores=scores
            )
        if fabric.is_global_zero:
            result = result.save(out)
    return result


@contextmanager
def _alone(run: Path, processes: FabricProcesses, found: FileVersion | None) -> Iterator[None]:
    """Locks the run folder in the first process.

    Raises:
        UserError: if another process is training in it, or has done so since its checkpoint, which
            is the one `found`, was read.
    """
    if processes.rank > 0:
        yield
        return
    with locked(run):
        if file_version(checkpoint_path(run)) != found:
            raise UserError(
                f"{run}: expected a run folder that is not in use, but another process has trained "
                "in it since this one began; run the same command again"
            )
        yield


class _Run:
    """The training of a network in one process."""

    def __init__(
        self,
        processes: FabricProcesses,
        recipe: Recipe,
        model: nn.Module,
        data: DataIdentity,
        out: Path,
        loop: LoopOptions,
        checkpoint: Checkpoint | None,
        validator: Validator,
    ) -> None:
        self.fabric = fabric = processes.fabric
        self.processes, self.recipe, self.loop, self.validator = processes, recipe, loop, validator
        self.described, self.path = describe(recipe, data), checkpoint_path(out)
        self.best_path, self.previous_path = best_path(out), previous_path(out)
        self.saved: int | None = None
        self.iteration = 0
        if fabric.world_size > 1:
            share_statistics(model, fabric.device)
        # Convolutions run faster on this layout, on CPUs and GPUs alike.
        self.model = model.train().to(fabric.device).to(memory_format=torch.channels_last)
        self.average = None if recipe.ema is None else AveragedNetwork(self.model, recipe.ema)
        if loop.checkpoint_activations:
            cast(Network, model).backbone.checkpoint_activations()
        optimizer = _optimizer(recipe, model)
        scaler = fabric.strategy.precision
        if checkpoint is not None:
            try:
                require_resumable(
                    *(checkpoint, self.model.state_dict(), recipe.ema is not None, optimizer),
                    scaler.state_dict(),
                )
            except UserError as error:
                raise UserError(f"{self.path}: cannot resume: {error}") from error
            if (trained := checkpoint.get("unaveraged")) is not None:
                self.model.load_state_dict(trained)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.losses, self.optimizer = fabric.setup(_Losses(model), optimizer)
        if checkpoint is not None:  # the network has its weights already
            self.iteration = checkpoint["iteration"]
            self.optimizer.load_state_dict(optimizer_state(checkpoint, self.optimizer))
            scaler.load_state_dict(checkpoint["precision"])
        self.health = None
        if has_deformable_layers(model):
            self.health = OffsetHealth(model, loop.log_every, warn=fabric.is_global_zero)

    def fit(self, batches: Iterator[list[Batch]], log: TrainingLog | None) -> None:
        """Trains until the last iteration or early stopping.

        Args:
            batches: batches of the remaining iterations; ends if the process is asked to stop.
            log: the log, in the first process.
        Raises:
            TrainingStopped: if any process was asked to stop; raised after the current iteration,
                since half a step could not be resumed exactly, and its checkpoint.
        """
        try:
            self._fit(batches, log)
        except StopRequested:
            if self.iteration not in (0, self.saved):
                self._save()
            raise TrainingStopped(
                f"stopped after {self.iteration} of {self.recipe.iterations} iterations; "
                "run the same command to continue"
            ) from None
        if self.validator.exhausted:
            validated = self.validator.validated
            logger.info(
                "stopped after %d of %d iterations: no improvement in %d validations",
                *(self.iteration, self.recipe.iterations, validated["waited"]),
            )

    def _fit(self, batches: Iterator[list[Batch]], log: TrainingLog | None) -> None:
        recipe, loop, total = self.recipe, self.loop, self.recipe.iterations
        if self.validator.due(self.iteration):  # it was interrupted
            self._validate(log)
        while self.iteration < total and not self.validator.exhausted:
            parts, height, width = self._next(batches, log)
            self.iteration += 1
            factor = recipe.lr_factor(self.iteration - 1)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad()
            with self.health.watch(self.iteration) if self.health else nullcontext():
                losses = self._backward(self.fabric.to_device(parts), height, width)
            if recipe.clip is not None:
                self.fabric.clip_gradients(
                    self.losses, self.optimizer, max_norm=recipe.clip, error_if_nonfinite=False
                )
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.model, self.iteration)
            if log is not None:
                log.step()
            if self.iteration % loop.log_every == 0:
                self._record(log, losses, recipe.lr * factor)
            if self.iteration % loop.checkpoint_every == 0 or self.iteration == total:
                self._save()
            if self.iteration % loop.log_every == 0 and loop.stop_on_runaway:
                self._require_stable_offsets()
            if self.validator.due(self.iteration):
                self._validate(log)

    def _next(
        self, batches: Iterator[list[Batch]], log: TrainingLog | None
    ) -> tuple[list[Batch], int, int]:
        """The next batch, and the maximum height and width of its images over all processes.

        The processes wait for the one with the largest images anyway.

        Raises:
            StopRequested: in all processes, if any has no batch because it was asked to stop.
        """
        self.processes.places.at(f"loading iteration {self.iteration + 1}")
        with log.waiting() if log else nullcontext():
            parts = next(batches, None)
        self.processes.places.at(f"iteration {self.iteration + 1}")
        sides = [[0, 0, 1]] if parts is None else [[*it.images.shape[-2:], 0] for it in parts]
        largest = torch.tensor(sides, device=self.fabric.device).amax(dim=0)
        height, width, stopped = self._over_processes(largest, "max").tolist()
        if parts is None or stopped:
            raise StopRequested
        return parts, height, width

    def _backward(self, parts: Sequence[Batch], height: int, width: int) -> dict[str, Tensor]:
        """Computes the gradients of a batch, the same however it is divided.

        All parts are padded to one size, and each counts by its weight.

        Returns:
            The loss, and its terms if there are several, detached; their means over all processes
            are those of the batch.
        """
        sums: dict[str, Tensor] = {}
        for number, (part, fraction) in enumerate(
            zip(parts, self._fractions(parts), strict=True), start=1
        ):
            if part.images.shape[-2:] != (height, width):
                part = part.padded(height, width)
            # Processes exchange gradients in the backward pass of the last part.
            with self.fabric.no_backward_sync(self.losses, enabled=number < len(parts)):
                terms = self.losses(part.losses)
                terms = {name: term * fraction for name, term in terms.items()}
                self._require_finite(terms)
                self.fabric.backward(torch.stack(list(terms.values())).sum())
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach()
        loss = torch.stack(list(sums.values())).sum()
        return {"loss": loss, **(sums if len(sums) > 1 else {})}

    def _fractions(self, parts: Sequence[Batch]) -> Tensor:
        """The weight of each part in the mean over the whole batch.

        The gradients of processes are averaged, those of the parts in a process added up.
        """
        weights = [torch.as_tensor(part.weight(), device=self.fabric.device) for part in parts]
        counts = torch.stack(weights).double()
        total = self._over_processes(counts.sum(), "sum")
        return (counts * self.fabric.world_size / total.clamp(min=1)).float()

    def _require_finite(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            if not math.isfinite(value := float(term.detach())):
                raise self._diverged(f"the {name} loss is {value} in iteration {self.iteration}")

    def _record(self, log: TrainingLog | None, losses: Mapping[str, Tensor], lr: float) -> None:
        """Logs the losses of the whole batch and the health of the offsets."""
        means = self._over_processes(torch.stack(list(losses.values())), "mean")
        scalars = self.health.scalars() if self.health else {}
        if log is not None:
            values = dict(zip(losses, means.tolist(), strict=True))
            log.record(self.iteration, {**values, "learning_rate": lr}, scalars)

    def _require_stable_offsets(self) -> None:
        if self.health and self._any(self.health.runaway()):
            # What runs away in another process is known there.
            messages = [*self.health.messages.values(), "the offsets run away in another process"]
            raise FloatingPointError(f"{messages[0]}; {self._last_checkpoint()}")

    @property
    def network(self) -> nn.Module:
        """The network of the run: the averaged one if the recipe has `ema`."""
        return self.model if self.average is None else self.average.model

    def _validate(self, log: TrainingLog | None) -> None:
        """Evaluates the network, and saves it if it is the best so far."""
        with log.aside() if log else nullcontext():
            scores = self.validator.score(self.network)
            improved = self.validator.add(self.iteration, scores.main[1])
            if log is not None:
                pictures = ()
                if scores.main[1] is not None:  # None: the ground truth is not published
                    pictures = self.validator.pictures(self.network, self.fabric.device)
                log.validated(self.iteration, scores.main, scores.summary, pictures)
                if improved:
                    best: Checkpoint = {**self._checkpoint(), "unaveraged": None, "optimizer": {}}
                    save_checkpoint(best, self.best_path)  # without the state of training
            self._save()

    def _save(self) -> None:
        for name, value in self.model.state_dict().items():
            # The loss was finite, but its gradient need not have been.
            if not value.isfinite().all():
                raise self._diverged(f"{name} is not finite after iteration {self.iteration}")
        self.processes.places.at(f"checkpoint of iteration {self.iteration}")
        if self.fabric.is_global_zero:
            save_checkpoint(self._checkpoint(), self.path, earlier=self.previous_path)
        self.processes.places.at(f"iteration {self.iteration}")
        self.fabric.barrier()
        self.saved = self.iteration

    def _checkpoint(self) -> Checkpoint:
        return {
            "deformnet": self.described,
            "model": self.network.state_dict(),
            "unaveraged": None if self.average is None else self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "iteration": self.iteration,
            "validated": self.validator.validated,
        }

    def _diverged(self, what: str) -> FloatingPointError:
        remedy = "a lower lr, gradient clipping (clip) or a longer warmup may help"
        return FloatingPointError(f"{what}; {remedy}; {self._last_checkpoint()}")

    def _last_checkpoint(self) -> str:
        if self.saved is not None:
            return f"the last checkpoint is that of iteration {self.saved}, {self.path}"
        if self.path.is_file():
            return f"the last checkpoint is the one that training resumed from, {self.path}"
        return "there is no checkpoint yet"

    def _over_processes(self, values: Tensor, operation: str) -> Tensor:
        reduced = self.fabric.all_reduce(values, reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _any(self, decision: bool) -> bool:
        """Whether it is so in any process: all must stop after the same iteration."""
        return self.fabric.strategy.reduce_boolean_decision(decision, all=False)


class _Losses(nn.Module):
    """A network whose forward pass gives the losses of a batch, as DDP needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, losses: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
        """
        Args:
            losses: method of a batch. (Fabric would cast the tensors of a batch to half precision,
                boxes included, where autocast knows better.)
        """
        return losses(self.model)


def _require_fit(recipe: Recipe, layout: Layout, loop: LoopOptions, data: Data) -> None:
    """Refuses a recipe that these processes cannot train."""
    if recipe.batch % (layout.processes * loop.accumulate) != 0:
        raise UserError(
            f"expected batch to be a multiple of the processes ({layout.processes}) times the "
            f"parts of each (accumulate={loop.accumulate}), but got {recipe.batch}"
        )
    if recipe.precision == "16-mixed" and not layout.gpu:
        raise UserError("precision 16-mixed needs a GPU; bf16-mixed works on CPUs, too")
    if loop.patience is not None and loop.validate_every is None:
        raise UserError("expected validate_every to be set for patience, but got None")
    if loop.feature_cache is not None:
        varied = ("scale_jitter", "color_jitter", "crop", "resize")
        if changing := [name for name in varied if getattr(recipe, name, None)]:
            raise UserError(
                "expected whole images of one scale and their own colors for feature_cache, but "
                f"got {', '.join(changing)}, which need other features in every iteration; train "
                "without them, or without feature_cache"
            )
        if not isinstance(data, Location):
            raise UserError(
                "expected a folder of a data set for feature_cache, but got a torch data set, "
                "whose images may change"
            )


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    groups = parameter_groups(
        model,
        recipe.lr,
        offset_lr_scale=recipe.offset_lr_scale,
        weight_decay=recipe.weight_decay,
    )
    if recipe.optimizer == "adamw":
        return AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def _with_iterations(
    recipe: Recipe, images: int, epochs: float | None, continue_to: int | None
) -> Recipe:
    """The recipe with the number of iterations given by `epochs` or `continue_to`."""
    if epochs is not None and continue_to is not None:
        raise UserError("expected epochs or continue_to, but got both")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError(f"expected epochs to be positive, but got {epochs}")
    if continue_to is not None and continue_to < 1:
        raise UserError(f"expected continue_to to be at least 1, but got {continue_to}")
    iterations = recipe.iterations if continue_to is None else continue_to
    if epochs is not None:
        iterations = max(1, math.ceil(epochs * images / recipe.batch))
    return dataclasses.replace(recipe, iterations=iterations)


def _checkpoint_of(
    run: Path, recipe: Recipe, data: DataIdentity, *, further: bool
) -> Checkpoint | None:
    """The checkpoint to resume from, if there is one.

    Args:
        further: whether the recipe's number of iterations may differ from the run's.
    Raises:
        UserError: if it belongs to another recipe or other data; or, with `further`, if there is
            none or it already has more iterations.
    """
    path = checkpoint_path(run)
    if not path.exists():
        if (previous := previous_path(run)).exists():
            raise UserError(
                f"{path}: expected the last checkpoint, but it is missing; to resume from the one "
                f"before it, run: {move(previous, path)}"
            )
        if further:
            raise UserError(
                f"{run}: expected a run to continue, but found no {path.relative_to(run)}"
            )
        return None
    checkpoint = load_checkpoint(path)
    old_recipe, old_data = recipe_and_data(checkpoint["deformnet"], path)
    if old_recipe.network != recipe.network:
        raise UserError(
            f"{run}: expected a run of {recipe.network}, but it holds one of {old_recipe.network}; "
            "choose another folder"
        )
    for field in dataclasses.fields(recipe):
        old, new = getattr(old_recipe, field.name), getattr(recipe, field.name)
        if old != new and not (further and field.name == "iterations"):
            remedy = "continue it with its own recipe or choose another folder"
            if field.name == "iterations":
                remedy = f"train it to {new} with continue_to, or choose another folder"
            raise UserError(
                f"{run}: expected a run with {field.name}={new!r}, but it holds one with "
                f"{field.name}={old!r}; {remedy}"
            )
    if old_data != data:
        raise UserError(
            f"{run}: expected a run on the same data ({data.images} images, {len(data.classes)} "
            f"classes), but it holds one on other data ({old_data.images} and "
            f"{len(old_data.classes)})"
        )
    if old_recipe.iterations != recipe.iterations:
        return _continued(checkpoint, old_recipe.iterations, recipe.iterations, run)
    return checkpoint


def _continued(checkpoint: Checkpoint, before: int, after: int, run: Path) -> Checkpoint:
    """The checkpoint of a run, to be trained to another number of iterations."""
    if after < checkpoint["iteration"]:
        raise UserError(
            f"{run}: expected continue_to to be at least the {checkpoint['iteration']} iterations "
            f"that the run has been trained for, but got {after}"
        )
    if "validated" not in checkpoint:
        return checkpoint
    return {**checkpoint, "validated": {**checkpoint["validated"], "waited": 0}}
