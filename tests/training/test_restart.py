"""A process that is killed: torchrun starts the group anew, or one process goes on alone."""

import shutil

import pytest
import torch
from processes import RECIPES, curve, run, start, torchrun, wait, weights, write_images

from deformnet.runs import checkpoint_path, load_checkpoint

RECIPE = RECIPES["rfcn"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes: undisturbed, and with a `kill -9` of one of them after iteration 7 of 10."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "data")
    job = {
        "recipe": RECIPE.to_dict(),
        "data": folder / "data",
        "options": {"checkpoint_every": 3},
    }
    (folder / "undisturbed").mkdir()
    undisturbed = [{"do": "train", **job, "out": folder / "undisturbed/run"}]
    killed = [{"do": "killed", "after": 7, **job, "out": folder / "run"}]
    two = "--nproc-per-node=2"
    wait(start(torchrun(undisturbed, folder / "undisturbed", two)))
    (printed,) = wait(start(torchrun(killed, folder, two, "--max-restarts=2")))
    attempts = [line for line in printed.splitlines() if line.startswith("attempt ")]
    assert attempts == ["attempt 0 from iteration 0", "attempt 1 from iteration 6"], printed
    return folder


def test_a_killed_process_changes_nothing(runs):
    expected, found = weights(runs / "undisturbed/run"), weights(runs / "run")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert curve(runs / "run") == curve(runs / "undisturbed/run")


def test_one_process_goes_on_where_two_were_killed(runs, tmp_path):
    """It goes on from the very checkpoint, with the draws that would have come next."""
    shutil.copytree(runs / "run-when-killed", tmp_path / "run")
    assert load_checkpoint(checkpoint_path(tmp_path / "run"))["global_step"] == 6
    run(RECIPE, runs / "data", tmp_path / "run", checkpoint_every=3)
    expected = curve(runs / "undisturbed/run")
    assert len(expected) == 10
    assert curve(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(runs / "undisturbed/run").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-6)
