"""Training of the demo's networks, in parallel."""

import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch

from deformnet._errors import UserError
from deformnet._files import file_version, read_json, write_json
from deformnet.analysis import AnnotatedImage, LayerDilation, MeanStd, dilation_statistics
from deformnet.data.workers import end_with_parent
from deformnet.demo.plan import Run
from deformnet.engine import Hardware, LoopOptions, TrainingStopped, train
from deformnet.engine.initial import initial
from deformnet.engine.results import UnsavedScores
from deformnet.engine.runs import checkpoint_path, iterations_done, versions
from deformnet.inspection.runs import OpenedRun
from deformnet.models import Network
from deformnet.tasks import task_of
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.base import DataIdentity, Processes
from deformnet.tasks.features import FeatureCache

SIDE = 600
"""Shorter side of the images that Table 2's sizes refer to; boxes of the demo are scaled to it."""
_SCORES = "demo.json"
"""File in a run folder with its scores and effective dilation."""
_MOST_PROCESSES = 4  # each takes about 1 GB


class Trained(NamedTuple):
    """The result of a run.

    Attributes:
        scores: scores in percent by name; None if undefined.
        dilation: effective dilation by object size; empty without deformable convolutions.
        note: how it was obtained, such as "trained in 60 s".
    """

    scores: Mapping[str, float | None]
    dilation: Sequence[LayerDilation]
    note: str


def processes() -> int:
    """Number of parallel runs: one per core, up to 4, or a single one on a GPU."""
    if torch.cuda.is_available():
        return 1
    return min(torch.get_num_threads(), _MOST_PROCESSES)


def cache_features(run: Run) -> None:
    """Computes the features of all images of a run."""
    task = task_of(run.recipe)
    for split in run.splits:
        images = task.training_set(run.data, split)
        backbone = cast(Network, initial(run.recipe, images.classes)[0]).backbone
        cache = FeatureCache(run.features, backbone, _device())
        cache.filled(images, run.recipe.flip, Processes(progress=True))


def train_all(runs: Sequence[Run], say: Callable[[str], None]) -> list[Trained]:
    """Trains and scores networks, or resumes their training.

    Args:
        say: receives a line about each finished run.
    Returns:
        The results, in the order of the runs.
    Raises:
        TrainingStopped: after Ctrl-C.
        UserError, OSError: see `deformnet.engine.train`.
    """
    begin = time.monotonic()
    found: dict[Run, Trained] = {}
    with closing(_results(runs)) as results:
        for run, trained in results:
            found[run] = trained
            done = f"[{len(found)}/{len(runs)}]"
            scores = ", ".join(f"{name} {_score(it)}" for name, it in trained.scores.items())
            minutes = (time.monotonic() - begin) / 60 * (len(runs) / len(found) - 1)
            left = f"; {math.ceil(minutes)} min left" if len(found) < len(runs) else ""
            say(f"{done} {run.name}: {trained.note}; {scores}{left}")
    return [found[run] for run in runs]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _results(runs: Sequence[Run]) -> Generator[tuple[Run, Trained]]:
    """The runs as they finish, with their results."""
    count = min(processes(), len(runs))
    if count == 1:
        yield from ((run, _train(run)) for run in runs)
        return
    # Tensors are small: one process per core is faster than one thread per core.
    todo = iter(runs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (os.getpid(),)) as pool:
        pending = {pool.submit(_train, run): run for run in itertools.islice(todo, count)}
        try:
            while pending:
                for done in wait(pending, return_when=FIRST_COMPLETED).done:
                    run, result = pending.pop(done), done.result()
                    # One at a time, since submitted runs start even after Ctrl-C.
                    pending |= {pool.submit(_train, it): it for it in itertools.islice(todo, 1)}
                    yield run, result
        except KeyboardInterrupt:  # the processes receive it, too, and stop after an iteration
            raise TrainingStopped("stopped; run the same command to continue") from None
        except BrokenProcessPool:
            raise UserError(
                "a training process was killed, probably out of memory; to continue with one "
                "process, set OMP_NUM_THREADS=1 and run the same command"
            ) from None


def _begin(parent: int) -> None:
    """Prepares a process for its runs."""
    if sys.platform == "linux":
        end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # training handles it
    torch.set_num_threads(1)


def _train(run: Run) -> Trained:
    if (scored := _scored(run)) is not None:
        return scored
    path = checkpoint_path(run.folder)
    done = iterations_done(run.folder) if path.is_file() else 0
    begin = time.monotonic()
    try:
        result = train(
            run.recipe,
            run.data,
            run.folder,
            split=run.splits[0],
            val_split=run.splits[1],
            hardware=Hardware(devices=1, workers=0),
            loop=LoopOptions(feature_cache=run.features, progress=False),
        )
    except UnsavedScores as error:  # its scores cannot be sent to another process
        raise error.error from error
    assert result.scores is not None
    note = f"trained in {time.monotonic() - begin:.0f} s"
    if done == run.recipe.iterations:
        note = "already trained"
    elif done:
        note = f"resumed after iteration {done}"
    trained = Trained(result.scores.summary, _dilation(run), note)
    dilation = [asdict(layer) for layer in trained.dilation]
    content = {"of": _facts(run), "scores": trained.scores, "effective dilation": dilation}
    write_json(run.folder / _SCORES, content)
    return trained


def _scored(run: Run) -> Trained | None:
    """The saved result of an earlier call; None if there is none, or the run has changed."""
    try:
        content = read_json(run.folder / _SCORES)
        if content["of"] != _facts(run):
            return None
        dilation = [_layer(row) for row in content["effective dilation"]]
        return Trained(content["scores"], dilation, "already trained and scored")
    except (FileNotFoundError, UserError, TypeError, KeyError, ValueError):  # absent, or damaged
        return None


def _layer(row: dict[str, Any]) -> LayerDilation:
    sizes = {size: MeanStd(**it) for size, it in row.items() if size != "layer"}
    return LayerDilation(row["layer"], **sizes)


def _facts(run: Run) -> dict[str, object]:
    """What the result of a run depends on. Changes inside image files are not detected."""
    images = [task_of(run.recipe).annotated(run.data, split) for split in run.splits]
    version = file_version(checkpoint_path(run.folder))
    return {
        "recipe": run.recipe.to_json(),
        "images": [DataIdentity.of(tuple(it.classes), it.names).digest for it in images],
        "checkpoint": None if version is None else list(version),
        "versions": versions(),
    }


def _dilation(run: Run) -> list[LayerDilation]:
    """Table 2 on the validation images."""
    if not run.recipe.deform_layers:
        return []
    opened = OpenedRun(run.folder)
    backbone = opened.model.backbone
    backbone.recall = FeatureCache(run.features, backbone, opened.predictor.device).recall
    images = opened.task.annotated(run.data, run.splits[1], opened.data)
    return dilation_statistics(
        opened.model, _inputs(opened, images), stride=backbone.stride, call=backbone
    )


def _inputs(opened: OpenedRun, images: AnnotatedImages) -> Iterator[AnnotatedImage]:
    """Prepared images, with boxes scaled to the image size of Table 2."""
    for index in range(len(images)):
        image, annotation = images[index]
        prepared = opened.predictor.prepare(image)
        larger = SIDE / min(image.shape[1:])
        boxes = annotation.contents(images.countable or images.classes).boxes()
        scale = math.sqrt(math.prod(prepared.scale)) / larger
        yield AnnotatedImage(prepared.input[0], boxes * larger, scale)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
