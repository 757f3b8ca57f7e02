"""Mixed precision: what can run where, and that it learns the same."""

import dataclasses

import pytest
import torch
from processes import CPU, curve, run, stop_after, weights

from deformnet.engine import Hardware, LoopOptions, TrainingStopped, evaluate, train
from deformnet.engine.runs import checkpoint_path, load_checkpoint


def losses(recipe, shapes, out, **options):
    run(recipe, shapes, out, **options)
    return curve(out)


def test_bfloat16_learns_what_float32_learns(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, iterations=10, batch=4, warmup=0, norm="frozen", lr=0.01)
    full = losses(recipe, shapes, tmp_path / "full")
    half = dataclasses.replace(recipe, precision="bf16-mixed")
    mixed = losses(half, shapes, tmp_path / "mixed")
    assert full[0] - full[-1] > 0.1, "the loss must move for this to show anything"
    assert mixed != full
    assert mixed == pytest.approx(full, rel=0.02)
    # The weights stay in float32, and parts of a batch are added up in it.
    state = weights(tmp_path / "mixed")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    parts = losses(half, shapes, tmp_path / "parts", accumulate=2)
    assert parts == pytest.approx(mixed, rel=0.005)


def test_float16_needs_a_gpu(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, precision="16-mixed")
    with pytest.raises(ValueError, match="precision 16-mixed needs a GPU; bf16-mixed works on CPU"):
        run(recipe, shapes, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float16_run_is_scored_on_a_cpu(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, iterations=1)
    run(recipe, shapes, tmp_path)
    path = checkpoint_path(tmp_path)
    expected = evaluate(tmp_path, shapes, "val", hardware=CPU, progress=False).to_json()
    content = load_checkpoint(path)
    content["deformnet"]["recipe"]["precision"] = "16-mixed"
    torch.save(content, path)
    again = evaluate(tmp_path, shapes, "val", hardware=CPU, progress=False).to_json()
    assert again == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: float16 scales gradients there")
def test_float16_scales_gradients_and_resumes_with_its_scale(shapes, quick, tmp_path):
    recipe = dataclasses.replace(quick, precision="16-mixed", iterations=10, batch=4)
    gpu = Hardware(accelerator="gpu", workers=1)

    def losses(out, **options):
        loop = LoopOptions(log_every=1, progress=False, **options)
        train(recipe, shapes, out, val_split=None, hardware=gpu, loop=loop)
        return curve(out)

    mixed = losses(tmp_path / "mixed", checkpoint_every=5)
    assert all(value == value for value in mixed)
    scaler = load_checkpoint(checkpoint_path(tmp_path / "mixed"))["precision"]
    assert scaler["scale"] > 1
    with pytest.MonkeyPatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(TrainingStopped):
            losses(tmp_path / "broken")
    assert load_checkpoint(checkpoint_path(tmp_path / "broken"))["precision"]["scale"] > 1
    assert losses(tmp_path / "broken") == pytest.approx(mixed, rel=1e-3)
    assert losses(tmp_path / "parts", accumulate=2) == pytest.approx(mixed, rel=0.1)
