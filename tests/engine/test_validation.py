"""Validation during training, the best network, patience, averaged weights, runs trained further.

All of it at once survives `kill -9` at any moment: the run ends with equal files.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import curve, run, small, start, wait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deformnet.engine.training as training
from deformnet import UserError
from deformnet.data import DataFiles
from deformnet.engine import load_run, train
from deformnet.engine.averaging import AveragedNetwork
from deformnet.engine.logs import TrainingLog, duration, read_log
from deformnet.engine.runs import (
    best_path,
    checkpoint_path,
    iterations_done,
    load_checkpoint,
    locked,
)
from deformnet.engine.settings import LoopOptions
from deformnet.engine.validation import Validator
from deformnet.recipes import DeepLabRecipe
from deformnet.tasks import task_of
from deformnet.tasks.base import Scores
from small_sets import save_labels

RECIPE = small(
    DeepLabRecipe,
    **{"norm": "trained", "batch": 2, "iterations": 8, "warmup": 2, "lr": 0.001, "ema": 0.9},
    **{"optimizer": "adamw", "schedule": "cosine"},
)
OPTIONS = {"val_split": "val", "validate_every": 2, "checkpoint_every": 3, "patience": 3}


def train_here(data: Path, out: Path, **changes: int | None) -> None:
    run(RECIPE, data, out, **(OPTIONS | changes))


def further(data: Path, out: Path, iterations: int) -> None:
    loop = LoopOptions(progress=False, log_every=1, validate_every=2, checkpoint_every=3)
    hardware = training.Hardware(accelerator="cpu", workers=0)
    train(RECIPE, data, out, continue_to=iterations, loop=loop, hardware=hardware)


def moments(act: Callable[[str], None], patch: pytest.MonkeyPatch) -> None:
    """Calls `act` with the name of each moment of the next run of this process."""

    def around(place: object, name: str, label: Callable[..., str]) -> None:
        original = getattr(place, name)

        def call(*args: object, **options: object) -> object:
            act(f"before {label(*args)}")
            value = original(*args, **options)
            act(f"after {label(*args)}")
            return value

        patch.setattr(place, name, call)

    around(torch.optim.AdamW, "step", lambda *_: "step")
    around(Validator, "score", lambda *_: "scoring")
    around(TrainingLog, "validated", lambda *_: "row")
    around(training, "save_checkpoint", lambda _, path: path.name)


def killed(at: tuple[str, int], act: Callable[[], None]) -> None:
    """Calls `act` in a forked process, which is killed at the nth moment of a name."""
    name, count = at

    def work() -> None:
        left = [count]

        def maybe(moment: str) -> None:
            left[0] -= moment == name
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.set_num_threads(1)
        moments(maybe, pytest.MonkeyPatch())
        act()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL, (at, process.exitcode)


@pytest.fixture(scope="module", autouse=True)
def scores() -> Iterator[None]:
    """Real scores, but with a main one that improves twice and then no more."""
    score, main = Validator.score, {2: 10.0, 4: 30.0}

    def scored(self: Validator, *args: object) -> Scores:
        value = main.get(self.validated["iteration"] + 2, 20.0)
        scores = score(self, *args)
        return dataclasses.replace(scores, main=("mean IoU", value), summary={"mean IoU": value})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "score", scored)
        yield


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_here(shapes, out)
    return out


def assert_same_files(out: Path, expected: Path) -> None:
    for path in (checkpoint_path, best_path):
        _equal(load_checkpoint(path(out)), load_checkpoint(path(expected)))
    assert (out / "validation.csv").read_text() == (expected / "validation.csv").read_text()
    logs = [[row["loss"] for row in read_log(run / "metrics.csv")] for run in (out, expected)]
    assert logs[0] == logs[1]


def _equal(value: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            _equal(value[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(value, expected, strict=True):
            _equal(one, other)
    else:
        assert value == expected


@pytest.mark.parametrize(
    "moments",
    [
        # A chain of kills: each run goes on where the one before was killed.
        [("before step", 2), ("before scoring", 1), ("after scoring", 1), ("after row", 1)],
        [("after best.ckpt", 1), ("before best.ckpt", 2), ("before last.ckpt", 2)],
        [("after step", 5), ("before scoring", 1), ("after last.ckpt", 2), ("after row", 1)],
    ],
    ids=["first validation", "best checkpoint", "later"],
)
def test_kills_change_nothing(shapes, undisturbed, tmp_path, moments):
    out = tmp_path / "run"
    for moment in moments:
        killed(moment, partial(train_here, shapes, out))
    train_here(shapes, out)
    assert_same_files(out, undisturbed)


def test_a_run_that_ends_early_is_finished(shapes, undisturbed, tmp_path):
    """Iterations 4, 6, 8 of 12 bring no improvement over iteration 4 in two validations."""
    recipe = dataclasses.replace(RECIPE, iterations=12)
    out, options = tmp_path / "run", OPTIONS | {"patience": 2}
    result = run(recipe, shapes, out, **options)
    rows = read_log(out / "validation.csv")
    assert [(int(row["iteration"]), float(row["mean IoU"])) for row in rows] == [
        *((2, 10), (4, 30), (6, 20), (8, 20))
    ]
    assert (iterations_done(out), result.iterations) == (8, 4)  # trained, and of the best network
    before = checkpoint_path(out).read_bytes()
    assert run(recipe, shapes, out, **options).to_json() == result.to_json()
    assert checkpoint_path(out).read_bytes() == before
    run(recipe, shapes, out, **(options | {"patience": 3}))
    assert iterations_done(out) == 10


def test_the_best_network_is_that_of_the_run(shapes, undisturbed):
    paths = (best_path, checkpoint_path)
    best, last = (load_checkpoint(path(undisturbed)) for path in paths)
    assert (best["iteration"], last["iteration"]) == (4, 8)
    assert last["validated"] == {"iteration": 8, "best": 30.0, "best_iteration": 4, "waited": 2}
    _equal(load_run(undisturbed).model.state_dict(), best["model"])
    _equal(load_run(checkpoint_path(undisturbed)).model.state_dict(), last["model"])
    assert (undisturbed / "metrics.json").read_text().count('"iterations": 4') == 1


def test_validation_does_not_disturb_training(shapes, undisturbed, tmp_path):
    run(RECIPE, shapes, tmp_path, checkpoint_every=8)
    kept = ("model", "unaveraged", "optimizer", "iteration")
    alone, expected = (load_checkpoint(checkpoint_path(out)) for out in (tmp_path, undisturbed))
    _equal({key: alone[key] for key in kept}, {key: expected[key] for key in kept})


def test_a_finished_run_is_trained_further(shapes, undisturbed, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    for path in (out, again):
        shutil.copytree(undisturbed, path)
    further(shapes, out, 12)
    assert json.loads((out / "recipe.json").read_text())["iterations"] == 12
    rates = [float(row["learning_rate"]) for row in read_log(out / "metrics.csv")]
    assert len(rates) == 12
    longer = dataclasses.replace(RECIPE, iterations=12)
    assert rates[8:] == pytest.approx([RECIPE.lr * longer.lr_factor(n) for n in range(8, 12)])
    for moment in (("after step", 2), ("before scoring", 2), ("before last.ckpt", 1)):
        killed(moment, partial(further, shapes, again, 12))
    further(shapes, again, 12)
    assert_same_files(again, out)


def test_what_cannot_be_trained_further(shapes, undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"at least the 8 iterations .* but got 4"):
        further(shapes, undisturbed, 4)
    with pytest.raises(UserError, match=r"expected a run to continue, but found no checkpoints"):
        further(shapes, tmp_path / "nothing", 12)
    other = dataclasses.replace(RECIPE, lr=0.5)
    with pytest.raises(UserError, match=r"a run with lr=0.5"):
        train(other, shapes, undisturbed, continue_to=12)
    with pytest.raises(UserError, match="expected epochs or continue_to, but got both"):
        train(RECIPE, shapes, undisturbed, continue_to=12, epochs=2)


def test_epochs_are_passes_over_the_images(shapes, tmp_path):
    hardware, loop = training.Hardware(accelerator="cpu", workers=0), LoopOptions(progress=False)
    recipe = small(DeepLabRecipe, batch=4)
    result = train(recipe, shapes, tmp_path, epochs=1.2, hardware=hardware, loop=loop)
    assert result.iterations == 3  # 8.4 of 7 images
    assert json.loads((tmp_path / "recipe.json").read_text())["iterations"] == 3
    with pytest.raises(UserError, match="expected epochs to be positive, but got nan"):
        train(recipe, shapes, tmp_path, epochs=math.nan)


def test_patience_requires_validation(shapes, tmp_path):
    with pytest.raises(UserError, match="expected validate_every to be set for patience"):
        run(RECIPE, shapes, tmp_path, val_split="val", patience=2)
    with pytest.raises(UserError, match="expected a validation split for patience"):
        run(RECIPE, shapes, tmp_path, validate_every=2, patience=2)


def test_the_average_of_weights():
    model = torch.nn.BatchNorm1d(1)
    average = AveragedNetwork(model, decay=0.6)
    values = []
    for iteration, value in enumerate((3.0, 7.0, 7.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0), start=1):
        torch.nn.init.constant_(model.weight, value)
        model.num_batches_tracked.fill_(iteration)
        average.update(model, iteration)
        values.append(average.model.weight.item())
    expected = 1.0
    for iteration, value in enumerate((3.0, 7.0, 7.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0), start=1):
        decay = min(0.6, iteration / (iteration + 9))
        expected = decay * expected + (1 - decay) * value
        assert values[iteration - 1] == pytest.approx(expected)
    assert average.model.num_batches_tracked == 10
    assert not average.model.training


def test_pictures_and_scores_in_tensorboard(undisturbed):
    events = EventAccumulator(str(undisturbed / "tensorboard"), {"images": 0})
    events.Reload()
    assert [e.value for e in events.Scalars("validation/mean IoU")] == [10, 30, 20, 20]
    tags = events.Tags()["images"]
    assert len(tags) == 3  # all there are to validate on
    assert [event.step for event in events.Images(tags[0])] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
    assert duration(53 * 3600) == "2 d 5 h"


def test_two_trainings_into_one_folder(shapes, tmp_path):
    """The second one names the first, and leaves the folder as it is."""
    out = tmp_path / "run"
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()

    def hold() -> None:
        with locked(out):
            held.set()
            release.wait(240)

    process = context.Process(target=hold)
    process.start()
    assert held.wait(240)
    try:
        who = f"process {process.pid} on {re.escape(socket.gethostname())}"
        with pytest.raises(UserError, match=f"but {who} writes to it"):
            run(RECIPE, shapes, out)
        assert [path.name for path in out.iterdir()] == [".lock"]
    finally:
        release.set()
        process.join(240)
    run(dataclasses.replace(RECIPE, iterations=1), shapes, out)


def test_two_processes_validate_as_one(shapes, tmp_path):
    """`--devices 2` starts another process."""
    recipe = small(DeepLabRecipe, deform_layers=3, iterations=4, ema=0.9, schedule="cosine")
    file, one, two = tmp_path / "recipe.json", tmp_path / "one", tmp_path / "two"
    file.write_text(recipe.to_json())
    command = ["train", "deeplab", "--recipe", file, "--data", shapes, "--out", two]
    command += ["--devices", "2", "--accelerator", "cpu", "--workers", "0", "--log-every", "1"]
    command += ["--validate-every", "2", "--patience", "9"]
    process = start([sys.executable, "-m", "deformnet", *map(str, command)])
    run(recipe, shapes, one, val_split="val", validate_every=2)
    (printed,) = wait(process)
    assert "device: 2 processes, CPU, 32-true" in printed
    assert printed.count("mean IoU") >= 2
    assert curve(two) == pytest.approx(curve(one), abs=1e-5, rel=0)
    states = [load_checkpoint(checkpoint_path(out)) for out in (one, two)]
    assert [state["validated"]["iteration"] for state in states] == [4, 4]
    for key in ("model", "unaveraged"):
        for name, tensor in states[0][key].items():
            torch.testing.assert_close(states[1][key][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "test"])
def test_a_validation_split_has_any_usual_name(name, tmp_path):
    for split in ("train", name):
        for kind in ("images", "masks"):
            save_labels(tmp_path / split / kind / "a.png", 1)
    task = task_of(RECIPE)
    assert task.validation(tmp_path, None, "val") == (tmp_path, "val")
    assert len(task.evaluation_set(tmp_path, "val")) == 1
    shutil.rmtree(tmp_path / name)
    assert task.validation(tmp_path, None, "val") is None
    apart = DataFiles(tmp_path / "train/images", tmp_path / "train/masks")
    assert task.validation(tmp_path, apart, "val") == (apart, "train")


def test_scores_that_are_no_numbers_are_never_the_best():
    validator = Validator(None, LoopOptions(), 8, 0)
    assert not validator.add(1, math.nan)
    assert validator.add(2, 10.0)
