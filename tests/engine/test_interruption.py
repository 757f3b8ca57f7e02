"""Runs that are killed, stopped or distributed end where an undisturbed one does."""

import signal
import sys

import processes
import pytest
import torch
from processes import run, small

from deformnet.engine.logs import read_log
from deformnet.engine.runs import checkpoint_path, iterations_done, load_checkpoint
from deformnet.recipes import DeepLabRecipe
from forks import command

# Not the tiny ResNet, with which a run could end before a signal reaches it.
CHANGES = {"backbone": "resnet18", "norm": "trained", "deform_layers": 3}
RECIPE = small(DeepLabRecipe, **CHANGES, batch=3, iterations=16, warmup=4, lr=0.01)


def words(recipe, data, out):
    """The command line."""
    path = out.with_name(f"{out.name}.json")
    path.write_text(recipe.to_json())
    words = ["train", "deeplab", "--recipe", path, "--data", data, "--out", out]
    words += ["--accelerator", "cpu", "--val-split", "None", "--log-every", "1"]
    return [*map(str, words), "--checkpoint-every", "4"]


def finish(recipe, data, out):
    run(recipe, data, out, checkpoint_every=4)
    return load_checkpoint(checkpoint_path(out))


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
    line = words(RECIPE, shapes, out)
    if sign == signal.SIGINT:
        process = processes.start([sys.executable, "-m", "deformnet", *line])
    else:
        process = command(*line, printed=tmp_path / "printed.txt")
    # In the middle of an epoch (7 images) and between two checkpoints, as far as it can be aimed.
    processes.wait_for_rows(process, out, 6)
    process.send_signal(sign)
    printed, _ = process.communicate(timeout=300)
    done = iterations_done(out)
    assert 4 <= done < RECIPE.iterations
    if sign == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert done % 4 == 0
    else:
        assert process.returncode == 130
        message = f"stopped after {done} of 16 iterations; run the same command to continue"
        assert f"deformnet: {message}" in printed.splitlines()
    assert_same_run(undisturbed, finish(RECIPE, shapes, out), out)
