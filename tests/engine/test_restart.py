"""A process that is killed: torchrun starts the group anew, or one process goes on alone."""

import os
import shutil
import signal

import pytest
import torch
from processes import (
    LIMIT,
    RECIPES,
    assert_close_weights,
    assert_equal_weights,
    curve,
    forked_torchrun,
    run,
    start,
    torchrun,
    wait,
    wait_for_rows,
    write_images,
)

from deformnet.engine.runs import iterations_done
from forks import command

RECIPE = RECIPES["rfcn"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes: undisturbed, and with a `kill -9` of one of them after iteration 7 of 10."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "data")
    job = {"recipe": RECIPE.to_dict(), "data": folder / "data"}
    job["options"] = {"checkpoint_every": 3}
    (folder / "undisturbed").mkdir()
    undisturbed = [{"do": "train", **job, "out": folder / "undisturbed/run"}]
    killed = [{"do": "killed", "after": 7, **job, "out": folder / "run"}]
    two = "--nproc-per-node=2"
    wait(start(torchrun(undisturbed, folder / "undisturbed", two)))
    # Without the variable torchrun gives new processes the addresses of the old ones.
    variable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    (printed,) = wait(forked_torchrun(killed, folder, two, "--max-restarts=2", **variable))
    attempts = [line for line in printed.splitlines() if line.startswith("attempt ")]
    assert attempts == ["attempt 0 from iteration 0", "attempt 1 from iteration 6"], printed
    return folder


def test_a_killed_process_changes_nothing(runs):
    assert_equal_weights(runs / "run", runs / "undisturbed/run")
    assert curve(runs / "run") == curve(runs / "undisturbed/run")


def test_one_process_goes_on_where_two_were_killed(runs, tmp_path):
    """It goes on from the very checkpoint, with the draws that would have come next."""
    shutil.copytree(runs / "run-when-killed", tmp_path / "run")
    assert iterations_done(tmp_path / "run") == 6
    run(RECIPE, runs / "data", tmp_path / "run", checkpoint_every=3)
    expected = curve(runs / "undisturbed/run")
    assert len(expected) == 10
    assert curve(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert_close_weights(tmp_path / "run", runs / "undisturbed/run")


def test_sigterm_to_everybody_stops_in_order(shapes, tmp_path):
    """As batch systems send it: to the processes that load images, too."""
    options = [
        "--recipe",
        "scratch",
        "--batch",
        "2",
        "--iterations",
        "1000",
        "--log-every",
        "1",
        "--workers",
        "1",
    ]
    options += ["--backbone", "resnet18", "--short-side", "32", "--max-side", "None"]
    options += ["--data", str(shapes), "--out", str(tmp_path / "run"), "--accelerator", "cpu"]
    process = command("train", "deeplab", *options, printed=tmp_path / "printed.txt")
    wait_for_rows(process, tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, printed
    done = iterations_done(tmp_path / "run")
    assert f"deformnet: stopped after {done} of 1000 iterations" in printed
    assert "Traceback" not in printed
