"""Training and scoring from folder to folder."""

import dataclasses
import logging
import os
import statistics
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from deformnet.analysis.health import holds_offsets
from deformnet.models.detection.detector import Detector
from deformnet.recipes import (
    ClassifierRecipe,
    DeepLabRecipe,
    TestTimeAugmentation,
    DetectorRecipe,
    Recipe,
)
from deformnet._files import replacing, write_json
from deformnet.engine.runs import DataIdentity, checkpoint_path, load_checkpoint, load_run, machine, recipe_and_data, versions
from deformnet.engine.callbacks import (
    Agreement,
    Checkpoints,
    CSVLog,
    ProgressBar,
    Timer,
    WholeFileIO,
    own_signals,
    read_log,
)
from deformnet.tasks.classification import ClassificationJob
from deformnet.engine.connections import closed_at_exit
from deformnet.tasks.detection import DetectionJob, ProposalModule
from deformnet.engine.health import OffsetHealth
from deformnet.engine.module import TrainingModule
from deformnet.tasks.proposals import StoredProposals, write_proposals
from deformnet.tasks.segmentation import ScoreAt, SegmentationJob
from deformnet.engine.shared_norm import share_statistics

Accelerator = Literal["auto", "cpu", "gpu"]


class TrainingStopped(Exception):
    """Training was asked to stop; its checkpoint is written and the message says how to go on."""


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    split: str = "train",
    val_split: str | None = "val",
    proposals: Sequence[Path] = (),
    devices: int | None = None,
    nodes: int | None = None,
    accumulate: int = 1,
    accelerator: Accelerator = "auto",
    workers: int | None = None,
    checkpoint_every: int = 200,
    log_every: int = 10,
    stop_on_runaway: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a network into a run folder, or continues the run that is there, and scores it.

    A continued run ends with exactly the weights that it would have had without the break, as far
    as the machine's arithmetic repeats itself (on a CPU: with the same number of threads).

    With several devices, Lightning starts the other processes by running the program again (or
    finds those that torchrun, SLURM or Ray started), so call this under
    `if __name__ == "__main__":`. Gradients are those of the whole batch, however it is divided
    among processes and into parts. Batch norm that is trained takes its statistics over all
    processes; with `accumulate`, over a part of the batch at a time.

    Args:
        recipe: network, image size and schedule.
        data: a folder in VOC or Cityscapes layout for DeepLab, in VOC or COCO layout for detectors,
            of the layout SPLIT/CLASS/IMAGE for classifiers.
        out: the run folder; see `deformnet.engine.runs` for what it holds.
        split: the images to train on.
        val_split: the images to score at the end; None for none. Those of a folder without this
            list are not scored either, if it is the default.
        proposals: files of stored proposals, of the images to train on and of those to score, that
            take the place of the detector's own; see `deformnet.engine.propose`.
        devices: processes (CPU) or GPUs on each node; None is what a launcher started, or else 1.
        nodes: machines; None is what a launcher spans, or else 1. All see the same `out`.
        accumulate: parts in which each process works through its share of a batch, one after the
            other; it takes the memory of one part.
        workers: processes that load images, for each training process; None chooses.
        checkpoint_every: iterations between checkpoints.
        log_every: iterations between rows of the logs. In those iterations the offsets of
            deformable layers are looked at, too, and a warning names a layer whose offsets run
            away (`OffsetHealth`); TensorBoard shows them as `offsets/...`.
        stop_on_runaway: end the run when offsets run away.
        progress: show a bar.
    Returns:
        What `metrics.json` holds.
    Raises:
        FileNotFoundError: if data or weights are missing.
        ValueError: if an image is unreadable, `out` holds a run of another recipe or other data,
            or the processes of the run were not started alike.
        OSError: if a file cannot be written; the last checkpoint is whole.
        FloatingPointError: if the loss is no longer finite when a checkpoint is due, or offsets run
            away and `stop_on_runaway` is set.
        TrainingStopped: after Ctrl-C or SIGTERM.
    """
    devices, nodes = _processes(devices, nodes)
    for name, value in (
        ("devices", devices),
        ("nodes", nodes),
        ("accumulate", accumulate),
        ("checkpoint_every", checkpoint_every),
        ("log_every", log_every),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    processes = devices * nodes
    if recipe.batch % (processes * accumulate) != 0:
        parts = f", in {accumulate} parts each" if accumulate > 1 else ""
        raise ValueError(
            f"batch {recipe.batch} cannot be shared evenly by {processes} processes{parts}"
        )
    if recipe.precision == "16-mixed" and not _uses_gpu(accelerator):
        raise ValueError("precision 16-mixed needs a GPU; bf16-mixed works on CPUs, too")
    job = _job(recipe, proposals=proposals)
    images = job.open(data, split)
    scored = None
    # The default list need not be there.
    if val_split is not None and (val_split != "val" or val_split in job.splits(data)):
        scored = job.open(data, val_split)
    identity = job.identity(images)

    checkpoint = checkpoint_path(out)
    done = _iterations_done(checkpoint, recipe, identity) if checkpoint.is_file() else None
    if done is None:
        _write_recipe(out / "recipe.json", recipe)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            model = recipe.build_model(len(identity.classes))
    else:
        model = load_run(out)[1].train()

    if recipe.norm == "trained" and processes > 1 and not _uses_gpu(accelerator):
        share_statistics(model)
    workers = _default_workers(devices) if workers is None else workers
    checkpoints = Checkpoints(checkpoint, checkpoint_every)
    health = OffsetHealth(every=log_every, stop=stop_on_runaway)
    facts = {
        **_described(recipe, identity, scored),
        "accumulate": accumulate,
        "checkpoint_every": checkpoint_every,
        "the run folder's last iteration": done,
    }
    with own_signals(), closed_at_exit(), _lightning():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=recipe.precision,
            sync_batchnorm=recipe.norm == "trained" and _uses_gpu(accelerator),
            max_steps=recipe.iterations,
            gradient_clip_val=recipe.clip,
            log_every_n_steps=log_every,
            logger=[
                CSVLog(out / "metrics.csv", job.loss_terms, every=log_every, keep=done or 0),
                TensorBoardLogger(out, "tensorboard", "", purge_step=done),
            ],
            callbacks=[
                Agreement(facts),
                Timer(log_every),
                *([health] if holds_offsets(model) else []),
                checkpoints,
                *([ProgressBar()] if progress else []),
            ],
            plugins=[WholeFileIO()],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            num_sanity_val_steps=0,
        )
        module = job.module(model, identity)
        if done is None or done < recipe.iterations:
            try:
                trainer.fit(
                    module,
                    datamodule=job.training_data(images, workers, accumulate),
                    ckpt_path=None if done is None else checkpoint,
                    weights_only=True,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {checkpoints.state()}") from error
            if health.stopped:
                raise FloatingPointError(f"{health.reason()}; {checkpoints.state()}")
            if checkpoints.stopped:
                raise TrainingStopped(
                    f"stopped after {trainer.global_step} of {recipe.iterations} iterations; "
                    "the same command continues"
                )
        metrics = _facts(recipe, model, out, recipe.iterations)
        if scored is not None:
            trainer.validate(module, datamodule=job.scoring_data(scored, workers), verbose=False)
            metrics = _scores(job, module, val_split, scored, out / "detections.jsonl") | metrics
    if trainer.is_global_zero:
        write_json(out / "metrics.json", metrics)
    return metrics


def evaluate(
    run: Path,
    data: Path,
    split: str,
    *,
    score_at: ScoreAt = "original",
    testing: TestTimeAugmentation = TestTimeAugmentation(),
    proposals: Sequence[Path] = (),
    out: Path | None = None,
    devices: int | None = None,
    nodes: int | None = None,
    accelerator: Accelerator = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores a trained run on a list of images, into `metrics-SPLIT.json` of its folder.

    Args:
        run: a run folder.
        data: a folder as for `train`, with the classes that the run was trained on.
        split: the list.
        score_at: of DeepLab: at which size predictions meet the truth; see `ScoreAt`.
        testing: of detectors: several sizes, mirrored images, refined and averaged boxes. What is
            found goes into `detections-SPLIT.jsonl`.
        proposals: files of stored proposals, for a detector that was trained on such.
        out: folder of the results; None is that of the run.
        devices, nodes, accelerator, workers, progress: as for `train`.
    Returns:
        What the file holds.
    Raises:
        FileNotFoundError: if run or data are missing.
        ValueError: if the checkpoint or an image is damaged, or the classes differ.
    """
    devices, nodes = _processes(devices, nodes)
    out = run if out is None else out
    recipe, model, trained_on = load_run(run)
    job = _job(recipe, score_at=score_at, testing=testing, proposals=proposals)
    if trained_on.proposals and not proposals:
        raise ValueError(f"{run}: was trained on stored proposals, so scoring it needs some too")
    images = job.open(data, split)
    if images.classes != trained_on.classes:
        raise ValueError(
            f"{data}: has the classes {_listed(images.classes)}; "
            f"{run} was trained on {_listed(trained_on.classes)}"
        )
    workers = _default_workers(devices) if workers is None else workers
    module = job.module(model, trained_on)
    with closed_at_exit(), _lightning():
        described = _described(recipe, trained_on, images)
        trainer = _scorer(recipe, described, devices, nodes, accelerator, progress)
        trainer.validate(module, datamodule=job.scoring_data(images, workers), verbose=False)
    found = out / f"detections-{_file_part(split)}.jsonl"
    metrics = _scores(job, module, split, images, found) | _facts(recipe, model, run, _done(run))
    if testing != TestTimeAugmentation():
        metrics["testing"] = dataclasses.asdict(testing)
    if trainer.is_global_zero:
        write_json(out / f"metrics-{_file_part(split)}.json", metrics)
    return metrics


def propose(
    run: Path,
    data: Path,
    split: str,
    out: Path,
    *,
    devices: int | None = None,
    nodes: int | None = None,
    accelerator: Accelerator = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> int:
    """Writes the proposals of a trained detector for all images of a list, for others to train on.

    Args:
        run: a run folder, of an RPN or another detector.
        data: a folder in VOC or COCO layout; its boxes and classes are not used.
        split: the list.
        out: the file; see `deformnet.tasks.proposals`.
        devices, nodes, accelerator, workers, progress: as for `train`.
    Returns:
        The number of images.
    Raises:
        FileNotFoundError: if run or data are missing.
        ValueError: if the run makes no proposals, or an image cannot be read.
        OSError: if the file cannot be written.
    """
    devices, nodes = _processes(devices, nodes)
    recipe, model, trained_on = load_run(run)
    if not isinstance(recipe, DetectorRecipe):
        raise ValueError(f"{run}: wanted a run of a detector, got one of {recipe.network}")
    if trained_on.proposals:
        raise ValueError(f"{run}: was trained on stored proposals and makes none itself")
    assert isinstance(model, Detector)
    job = DetectionJob(recipe, TestTimeAugmentation())
    images = job.open(data, split)
    workers = _default_workers(devices) if workers is None else workers
    module = ProposalModule(recipe, model, trained_on, testing=TestTimeAugmentation())
    with closed_at_exit(), _lightning():
        described = _described(recipe, trained_on, images)
        trainer = _scorer(recipe, described, devices, nodes, accelerator, progress)
        trainer.validate(module, datamodule=job.scoring_data(images, workers), verbose=False)
        if trainer.is_global_zero:
            indices = range(len(images))
            names = [images.name(index) for index in indices]
            write_proposals(out, names, [module.proposed[index] for index in indices])
        trainer.strategy.barrier()  # the file is there when any process goes on
    return len(images)


def _scorer(
    recipe: Recipe,
    described: dict[str, Any],
    devices: int,
    nodes: int,
    accelerator: Accelerator,
    progress: bool,
) -> pl.Trainer:
    """What brings images through a trained network."""
    precision = recipe.precision
    if precision == "16-mixed" and not _uses_gpu(accelerator):
        precision = "32-true"  # Lightning would take bfloat16
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        logger=False,
        callbacks=[Agreement(described), *([ProgressBar()] if progress else [])],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )


def _file_part(split: str) -> str:
    """A split in the name of a file: that of a year of VOC has a slash."""
    return split.replace("/", "-")


def _processes(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Processes on each node and nodes, as asked for or as a launcher has set them up."""
    launched, spanned = 1, 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun, Ray
        launched = int(os.environ["LOCAL_WORLD_SIZE"])
        spanned = int(os.environ["WORLD_SIZE"]) // launched
    elif "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        spanned = int(os.environ["SLURM_NNODES"])
        launched = int(os.environ["SLURM_NTASKS"]) // spanned
    return launched if devices is None else devices, spanned if nodes is None else nodes


def _described(recipe: Recipe, trained_on: DataIdentity, scored: Any) -> dict[str, Any]:
    """What every process of a run must agree upon, by name."""
    return {
        **recipe.to_dict(),
        "data": f"{trained_on.images} images ({trained_on.digest[:8]})",
        "images to score": None if scored is None else len(scored),
        **versions(),
    }


@rank_zero_only
def _write_recipe(path: Path, recipe: Recipe) -> None:
    with replacing(path) as file:
        file.write(recipe.to_json().encode())


def _iterations_done(path: Path, recipe: Recipe, data: DataIdentity) -> int:
    """How far a run has come.

    Raises:
        ValueError: if it is a run of another recipe or on other data.
    """
    checkpoint = load_checkpoint(path)
    old_recipe, old_data = recipe_and_data(checkpoint, path)
    run = path.parent.parent
    if type(old_recipe) is not type(recipe):
        raise ValueError(
            f"{run}: holds a run of {old_recipe.network}, but {recipe.network} is asked for; "
            "choose another folder"
        )
    for field in dataclasses.fields(recipe):
        old, new = getattr(old_recipe, field.name), getattr(recipe, field.name)
        if old != new:
            raise ValueError(
                f"{run}: holds a run with {field.name}={old!r}, but {field.name}={new!r} is asked "
                "for; continue it with its own recipe or choose another folder"
            )
    if old_data != data:
        raise ValueError(
            f"{run}: holds a run on other data ({old_data.images} images, "
            f"{len(old_data.classes)} classes; here {data.images} and {len(data.classes)})"
        )
    return checkpoint["global_step"]


def _job(
    recipe: Recipe,
    *,
    score_at: ScoreAt = "original",
    testing: TestTimeAugmentation = TestTimeAugmentation(),
    proposals: Sequence[Path] = (),
) -> Any:
    """What the loop needs to know of a kind of network, such as a SegmentationJob.

    Raises:
        ValueError: for options that the network does not have.
    """
    if score_at != "original" and not isinstance(recipe, DeepLabRecipe):
        raise ValueError(f"score_at is for deeplab, not for {recipe.network}")
    if (testing != TestTimeAugmentation() or proposals) and not isinstance(recipe, DetectorRecipe):
        raise ValueError(
            f"proposals and options of testing are for detectors, not for {recipe.network}"
        )
    if isinstance(recipe, DeepLabRecipe):
        return SegmentationJob(recipe, score_at)
    if isinstance(recipe, ClassifierRecipe):
        return ClassificationJob(recipe)
    assert isinstance(recipe, DetectorRecipe)
    return DetectionJob(recipe, testing, StoredProposals(proposals) if proposals else None)


def _listed(names: Sequence[str]) -> str:
    """Names in a line that can still be read where there are a thousand."""
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return ", ".join(names[:30]) + more


def _scores(job: Any, module: TrainingModule, split: str | None, images: Any, found: Path) -> dict:
    """The scores, computed (and what was found written) by one process for all."""
    if not module.trainer.is_global_zero:
        return {}
    return {"split": split, "images": len(images), **job.metrics(module, images, found)}


def _done(run: Path) -> int:
    """How many iterations the network of a run has been trained for."""
    return load_checkpoint(checkpoint_path(run))["global_step"]


def _facts(recipe: Recipe, model: torch.nn.Module, run: Path, iterations: int) -> dict[str, Any]:
    seconds = [float(row["seconds"]) for row in read_log(run / "metrics.csv")]
    return {
        "network": recipe.network,
        "iterations": iterations,
        "seconds_per_iteration": statistics.median(seconds) if seconds else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(),
    }


def _default_workers(devices: int) -> int:
    """Loader processes for each training process: half the cores, at most 4."""
    return max(1, min(4, (os.cpu_count() or 1) // (2 * devices)))


def _uses_gpu(accelerator: Accelerator) -> bool:
    return accelerator != "cpu" and torch.cuda.is_available()


@contextmanager
def _lightning() -> Iterator[None]:
    """Lightning without what it says on every run and nobody can act upon.

    It also ends the program on Ctrl-C, which is for the caller to decide: KeyboardInterrupt it is.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    report = threading.excepthook

    def report_others(error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread; what it cannot write is raised where it logs, as well.
        if not isinstance(error.exc_value, OSError):
            report(error)

    threading.excepthook = report_others
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*your dataloader is not resumable.*",  # it is: see `deformnet.engine.sampling`
            ".*smaller than the logging interval.*",
            ".*defined a `validation_step` but have no `val_dataloader`.*",  # scoring comes after
            ".*isinstance.treespec, LeafSpec.*",
            ".*GPU available but not used.*",
            ".*modules? in eval mode.*",  # frozen batch norm
            ".*sync_dist=True.*",
            ".*`srun` command is available.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        except SystemExit as exit:
            raise KeyboardInterrupt from exit
        finally:
            threading.excepthook = report
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
