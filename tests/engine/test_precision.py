"""Mixed precision: what can run where, and that it learns the same."""

import dataclasses

import pytest
import torch

from deformnet.engine.runs import checkpoint_path, load_checkpoint
from deformnet.engine import evaluate, train
from deformnet.engine.callbacks import read_log


def losses(recipe, shapes, out, **options):
    settings = {"val_split": None, "workers": 0, "progress": False, "log_every": 1}
    train(recipe, shapes, out, **(settings | options))
    return [float(row["loss"]) for row in read_log(out / "metrics.csv")]


def test_bfloat16_learns_what_float32_learns(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, iterations=10, batch=4, warmup=0, norm="frozen", lr=0.002)
    full = losses(recipe, shapes, tmp_path / "full", accelerator="cpu")
    half = dataclasses.replace(recipe, precision="bf16-mixed")
    mixed = losses(half, shapes, tmp_path / "mixed", accelerator="cpu")
    assert full[0] - full[-1] > 0.1, "the loss must move for this to show anything"
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)
    # The weights stay in float32, and parts of a batch are added up in it.
    state = load_checkpoint(checkpoint_path(tmp_path / "mixed"))["state_dict"]
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    parts = losses(half, shapes, tmp_path / "parts", accelerator="cpu", accumulate=2)
    assert parts == pytest.approx(mixed, rel=0.005)


def test_float16_needs_a_gpu(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, precision="16-mixed")
    with pytest.raises(ValueError, match="precision 16-mixed needs a GPU; bf16-mixed works on CPU"):
        losses(recipe, shapes, tmp_path, accelerator="cpu")
    assert not list(tmp_path.iterdir())


def test_a_float16_run_is_scored_on_a_cpu(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, iterations=1)
    train(recipe, shapes, tmp_path, accelerator="cpu", workers=0, progress=False)
    path = checkpoint_path(tmp_path)
    expected = evaluate(tmp_path, shapes, "val", accelerator="cpu", workers=0, progress=False)
    content = load_checkpoint(path)
    content["deformnet"]["recipe"]["precision"] = "16-mixed"
    torch.save(content, path)
    found = evaluate(tmp_path, shapes, "val", accelerator="cpu", workers=0, progress=False)
    assert found == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: float16 scales gradients there")
def test_float16_scales_gradients_and_resumes_with_its_scale(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, precision="16-mixed", iterations=10, batch=4)
    mixed = losses(recipe, shapes, tmp_path / "mixed", checkpoint_every=5, workers=1)
    assert all(value == value for value in mixed)
    scaler = load_checkpoint(checkpoint_path(tmp_path / "mixed"))["MixedPrecision"]
    assert scaler["scale"] > 1
    parts = losses(recipe, shapes, tmp_path / "parts", accumulate=2)
    assert parts == pytest.approx(mixed, rel=0.1)
