"""Runs that are killed, stopped or distributed end where an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import run

from deformnet.engine.logs import read_log
from deformnet.engine.runs import checkpoint_path, iterations_done, load_checkpoint
from deformnet.recipes import DeepLabRecipe

RECIPE = DeepLabRecipe(
    backbone="resnet18",
    deform_layers=3,
    short_side=32,
    max_side=None,
    batch=3,
    iterations=16,
    warmup=4,
    lr=0.01,
)


def start(recipe, data, out, *options):
    """The command line in a process of its own, on one thread."""
    path = out.with_name(f"{out.name}.json")
    path.write_text(recipe.to_json())
    command = [sys.executable, "-m", "deformnet", "train", "deeplab"]
    command += ["--recipe", path, "--data", data, "--out", out, "--accelerator", "cpu"]
    command += ["--val-split", "None", "--log-every", "1", "--checkpoint-every", "4", *options]
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(recipe, data, out):
    run(recipe, data, out, checkpoint_every=4)
    return load_checkpoint(checkpoint_path(out))


def wait_for_rows(out, count, process):
    deadline = time.monotonic() + 300
    while len(read_log(out / "metrics.csv")) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return finish(RECIPE, shapes, out), read_log(out / "metrics.csv")


def assert_same_run(undisturbed, checkpoint, out):
    expected, rows = undisturbed
    assert checkpoint["iteration"] == expected["iteration"] == RECIPE.iterations
    assert checkpoint["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(checkpoint["model"][name], tensor), name
    momentum = checkpoint["optimizer"]["state"]
    for number, buffers in expected["optimizer"]["state"].items():
        assert torch.equal(momentum[number]["momentum_buffer"], buffers["momentum_buffer"])
    columns = ("iteration", "loss", "learning_rate")
    log = [[row[c] for c in columns] for row in read_log(out / "metrics.csv")]
    assert log == [[row[c] for c in columns] for row in rows]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_disturbed_run_ends_in_equal_weights(shapes, undisturbed, tmp_path, sign):
    out = tmp_path / "run"
    process = start(RECIPE, shapes, out)
    # In the middle of an epoch (7 images) and between two checkpoints, as far as it can be aimed.
    wait_for_rows(out, 6, process)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=300)
    done = iterations_done(out)
    assert 4 <= done < RECIPE.iterations
    if sign == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert done % 4 == 0
    else:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == (
            f"deformnet: stopped after {done} of 16 iterations; run the same command to continue"
        )
    assert_same_run(undisturbed, finish(RECIPE, shapes, out), out)


def test_two_processes_are_as_good_as_one(shapes, tmp_path):
    recipe = DeepLabRecipe(
        backbone="resnet18",
        deform_layers=3,
        norm="frozen",
        short_side=32,
        max_side=None,
        batch=4,
        iterations=20,
        warmup=0,
        lr=0.001,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(recipe, shapes, two, "--devices", "2")
    finish(recipe, shapes, one)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    losses = [[float(r["loss"]) for r in read_log(run / "metrics.csv")] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert losses[0][0] - losses[0][-1] > 0.01, "the loss must move for this to show anything"
    assert losses[1] == pytest.approx(losses[0], abs=1e-5, rel=0)
