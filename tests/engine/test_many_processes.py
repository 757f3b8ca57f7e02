"""However the work is divided among processes and into parts, a run gives the same numbers."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from processes import (
    CPU,
    RECIPES,
    assert_close_weights,
    assert_equal_weights,
    curve,
    forked_torchrun,
    norm_case,
    propose_boxes,
    run,
    run_stopped,
    small,
    wait,
)

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine import evaluate
from deformnet.engine.runs import iterations_done
from deformnet.recipes import DeepLabRecipe

TOLERANCE = 1e-5  # relative
NAMES = list(RECIPES)
TRAINED_NORM = small(DeepLabRecipe, norm="trained", iterations=3, lr=0.01)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A folder of the runs of one process, scored."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in RECIPES.items():
        run(recipe, data, folder / name)
        evaluate(folder / name, data, "val", hardware=CPU, progress=False)
    return folder


@pytest.fixture(scope="module")
def together(data, alone, tmp_path_factory):
    """Everything that is tested here, done by a number of processes that are started once."""
    made = {}

    def folder(processes):
        if processes in made:
            return made[processes]
        out = made[processes] = tmp_path_factory.mktemp(f"processes-{processes}")
        other = out / "other"
        write_shapes(other, Shapes(train=5, val=1, height=40, width=48))
        jobs = []
        for name, recipe in RECIPES.items():
            job = {"recipe": recipe.to_dict(), "data": data}
            jobs.append({"do": "train", **job, "out": out / name})
            shutil.copytree(alone / name, out / f"scored-{name}")
            (out / f"scored-{name}/metrics-val.json").unlink()
            jobs.append({"do": "evaluate", "data": data, "out": out / f"scored-{name}"})
            if processes == 2:
                parts = {"options": {"accumulate": 2}}
                jobs.append({"do": "train", **job, **parts, "out": out / f"parts-{name}"})
        proposing = {"do": "propose", "run": alone / "rfcn", "data": data}
        jobs.append(proposing | {"out": out / "proposals.safetensors"})
        if processes == 2:
            jobs.append({"do": "norm", "out": out / "norm"})
            job = {"do": "train", "recipe": TRAINED_NORM.to_dict(), "data": data}
            options = {"checkpoint_activations": True}
            jobs.append({**job, "options": options, "out": out / "recomputed"})
            job = {"do": "disagree", "recipe": RECIPES["deeplab"].to_dict()}
            changes = [{}, {"lr": 0.5}]
            jobs.append(job | {"data": [data, data], "changes": changes, "out": out / "recipe"})
            jobs.append(job | {"data": [data, other], "changes": [{}, {}], "out": out / "data"})
        wait(forked_torchrun(jobs, out, f"--nproc-per-node={processes}"))
        return out

    return folder


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_processes_make_the_same_curve_as_one(alone, together, name, processes):
    expected = curve(alone / name)
    assert len(expected) == RECIPES[name].iterations
    assert expected[0] - expected[-1] > 0.1, "the loss must move for this to show anything"
    assert curve(together(processes) / name) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_processes_score_as_one(alone, together, name, processes):
    """To the last digit, of five images."""
    scored = together(processes) / f"scored-{name}"
    first, second = (
        json.loads((run / "metrics-val.json").read_text()) for run in (alone / name, scored)
    )
    for differs in ("machine", "seconds_per_iteration"):
        del first[differs], second[differs]
    assert first["images"] == 5
    assert second == first
    if name == "rfcn":
        files = [run / "detections-val.jsonl" for run in (alone / name, scored)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_propose_as_one(data, alone, together, tmp_path, processes):
    propose_boxes(alone / "rfcn", data, tmp_path / "proposals.safetensors")
    expected = (tmp_path / "proposals.safetensors").read_bytes()
    assert (together(processes) / "proposals.safetensors").read_bytes() == expected


@pytest.mark.parametrize(("name", "parts"), [("deeplab", 4), ("rfcn", 2)])
def test_parts_make_the_same_curve_as_the_whole(data, alone, tmp_path, name, parts):
    run(RECIPES[name], data, tmp_path, accumulate=parts)
    assert curve(tmp_path) == pytest.approx(curve(alone / name), rel=TOLERANCE)
    assert_close_weights(tmp_path, alone / name)


@pytest.mark.parametrize("name", NAMES)
def test_parts_in_two_processes(alone, together, name):
    assert curve(together(2) / f"parts-{name}") == pytest.approx(curve(alone / name), rel=TOLERANCE)


def test_two_processes_recompute_activations(data, together, tmp_path):
    """Including synchronized batch norm, whose running statistics are updated once."""
    run(TRAINED_NORM, data, tmp_path)
    assert curve(together(2) / "recomputed") == pytest.approx(curve(tmp_path), rel=TOLERANCE)
    assert_close_weights(together(2) / "recomputed", tmp_path)


def test_a_stopped_run_in_parts_ends_in_equal_weights(data, tmp_path):
    recipe = dataclasses.replace(RECIPES["rfcn"], iterations=5, clip=1.0)
    run(recipe, data, tmp_path / "whole", accumulate=2)
    run_stopped(3, recipe, data, tmp_path / "broken", accumulate=2)
    run(recipe, data, tmp_path / "broken", accumulate=2)
    assert iterations_done(tmp_path / "broken") == 5
    assert_equal_weights(tmp_path / "broken", tmp_path / "whole")
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")


def test_shared_batch_norm_is_that_of_the_whole_batch(together):
    layer, x, direction = norm_case()
    x.requires_grad_()
    y = layer(x)
    (y * direction).sum().backward()
    saved = [torch.load(together(2) / f"norm-{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, own in enumerate(saved):
        torch.testing.assert_close(own["y"], y[rank::2].detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own["x"], x.grad[rank::2], rtol=1e-10, atol=1e-10)
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(own[name], value, rtol=1e-10, atol=1e-10)
    gradient = sum(own["weight.grad"] for own in saved)
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-10, atol=1e-10)


def test_processes_that_were_not_started_alike_say_how(together):
    out = together(2)
    alike = "expected all processes of this run to be started alike, but got"
    data = rf"{alike} data: 7 images \(.* on rank 0; 5 images \(.* on rank 1"
    for rank in range(2):
        message = (out / f"recipe-{rank}.txt").read_text()
        assert message == f"{alike} lr: 0.01 on rank 0; 0.5 on rank 1"
        assert re.fullmatch(data, (out / f"data-{rank}.txt").read_text())


@pytest.mark.parametrize(
    ("batch", "devices", "parts", "message"),
    [
        (6, 4, 1, r"batch to be a multiple of the processes \(4\) .*=1\), but got 6"),
        (6, 2, 2, r"batch to be a multiple of the processes \(2\) .*=2\), but got 6"),
        (6, 1, 0, "expected accumulate to be at least 1, but got 0"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path, batch, devices, parts, message):
    with pytest.raises(ValueError, match=message):
        run(small(DeepLabRecipe, batch=batch), data, tmp_path, devices=devices, accumulate=parts)
    assert not list(tmp_path.iterdir())
