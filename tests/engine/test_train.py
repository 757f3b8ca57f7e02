import csv
import dataclasses
import errno
import json
import resource
import shutil
import signal
from contextlib import closing

import pytest
import torch
from processes import assert_equal_weights, run, run_stopped, small

import deformnet
from deformnet import UserError
from deformnet.data.opening import open_segmentation
from deformnet.engine import Hardware, LoopOptions, evaluate, load_run, logs, train
from deformnet.engine.logs import TrainingLog, read_log
from deformnet.engine.runs import checkpoint_path, load_checkpoint, save_checkpoint
from deformnet.engine.sampling import Iterations
from deformnet.engine.training import _Run
from deformnet.metrics.segmentation import ConfusionMatrix, segmentation_scores
from deformnet.recipes import RFCNRecipe
from deformnet.tasks import TaskOptions
from deformnet.tasks.segmentation import collate
from small_sets import one_line


@pytest.fixture(scope="module")
def trained(shapes, quick, tmp_path_factory):
    """A finished run and what `train` returned."""
    out = tmp_path_factory.mktemp("runs") / "run"
    result = train(
        *(quick, str(shapes), str(out)),
        hardware=Hardware(workers=1),
        loop=LoopOptions(log_every=2, checkpoint_every=4, progress=False),
    )
    return out, result.to_json()


def test_contents_of_a_run_folder(trained, quick):
    out, metrics = trained
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (out / "recipe.json").read_text() == quick.to_json()
    assert metrics["split"] == "val"
    assert metrics["images"] == 3
    assert metrics["iterations"] == 6
    assert 0 <= metrics["mean_iou"] <= 1
    assert set(metrics["iou"]) == set(load_run(out).data.classes)
    assert metrics["seconds_per_iteration"] > 0
    assert {"torch", "deformnet", "python"} <= set(metrics["versions"])
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["iteration"] for row in rows] == ["2", "4", "6"]
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.001)
    assert list((out / "tensorboard").glob("events*"))
    assert not list(out.rglob("*.partial"))


def test_training_moves_the_weights_and_the_offsets(trained, quick):
    torch.manual_seed(quick.seed)
    _, model, data = load_run(trained[0])
    start, end = quick.build_model(len(data.classes)).state_dict(), model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("conv_offset.weight" in name for name in moved)
    assert any("classifier.weight" in name for name in moved)


def test_a_finished_run_is_not_trained_again(trained, shapes, quick):
    out, metrics = trained
    before = checkpoint_path(out).read_bytes()
    (out / "metrics.json").unlink()
    assert run(quick, shapes, out, val_split="val").to_json() == metrics
    assert checkpoint_path(out).read_bytes() == before


def test_another_recipe_or_other_data_are_refused(trained, shapes, quick):
    out, _ = trained
    other = dataclasses.replace(quick, lr=0.5)
    with pytest.raises(UserError, match=r"a run with lr=0.5, but it holds one with lr=0.01; "):
        run(other, shapes, out)
    with pytest.raises(UserError, match=r"a run on the same data .*, but it holds one on other"):
        train(quick, shapes, out, split="val")
    with pytest.raises(UserError, match="a run of rfcn, but it holds one of deeplab"):
        run(small(RFCNRecipe), shapes, out)


def test_scores_are_those_of_the_predictor(trained, shapes):
    """Two ways to the same number: `evaluate`, and label maps image by image."""
    out, metrics = trained
    predictor = deformnet.load(out, device="cpu")
    images = open_segmentation(shapes, "val")
    counts = ConfusionMatrix(len(images.classes))
    for i in range(len(images)):
        image, target = images[i]
        counts.update(predictor.predict(torch.as_tensor(image))[None].long(), target[None].long())
    assert segmentation_scores(counts.compute()).mean_iou == pytest.approx(metrics["mean_iou"])
    assert evaluate(str(out), str(shapes), "val", progress=False).to_json() == metrics


def test_scoring_at_the_size_of_the_network(trained, shapes):
    out, _ = trained
    options = TaskOptions(score_at="network")
    result = evaluate(out, shapes, "train", options=options, progress=False)
    assert result.images == 7
    metrics = result.to_json()
    assert metrics["score_at"] == "network"
    assert json.loads((out / "metrics-train.json").read_text()) == metrics


def test_a_folder_without_val_is_trained_on_and_not_scored(shapes, quick, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    lists = data / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "val.txt").write_text("nobody\n")
    with pytest.raises(FileNotFoundError, match="nobody"):
        run(quick, data, tmp_path / "run", val_split="val")
    (lists / "val.txt").unlink()
    recipe = dataclasses.replace(quick, iterations=1)
    result = run(recipe, data, tmp_path / "run", val_split="val")
    assert (result.scores, result.iterations) == (None, 1)
    assert "mean_iou" not in result.to_json()
    with pytest.raises(FileNotFoundError, match="the splits are: train"):
        run(recipe, data, tmp_path / "run", val_split="test")


def test_other_classes_are_refused(trained, shapes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "VOCdevkit").symlink_to(shapes / "VOCdevkit")
    (other / "classes.txt").write_text("background\n" + "\n".join("abcdefghij") + "\n")
    with pytest.raises(UserError, match=r"was trained on \(background, "):
        evaluate(trained[0], other, "val", progress=False)


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign", "another network"])
def test_a_wrong_checkpoint_is_named_in_one_line(trained, tmp_path, damage):
    path, good = checkpoint_path(tmp_path), checkpoint_path(trained[0])
    path.parent.mkdir()
    if damage == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    else:
        content = load_checkpoint(good)
        content["deformnet"]["recipe"]["backbone"] = "resnet34"
        torch.save(content, path)
    problem = "does not fit" if damage == "another network" else "checkpoint"
    with one_line(UserError, f"{path}: ", problem):
        load_run(tmp_path)


def test_a_checkpoint_holds_no_code(trained, tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "trap.ckpt"
    torch.save({"deformnet": Trap()}, path)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    names = ("deformnet", "model", "optimizer", "precision")
    checkpoint = {name: {} for name in names} | {"iteration": 1}
    checkpoint["deformnet"] = {"recipe": {}, "data": {}}
    save_checkpoint(checkpoint, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt: checkpoint not written, an earlier"):
            save_checkpoint(checkpoint | {"model": {"x": torch.zeros(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_named_by_tensorboard(tmp_path, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(TrainingLog(tmp_path, (), 0, 9)) as log:
        with monkeypatch.context() as patch:
            patch.setattr(log._tensorboard, "flush", full)
            with pytest.raises(OSError, match="No space") as caught:
                log.record(1, {"loss": 1.5, "learning_rate": 0.1}, {})
        assert caught.value.filename == str(tmp_path / "tensorboard")


def test_recomputed_activations_change_nothing(trained, shapes, quick, tmp_path):
    run(quick, shapes, tmp_path, checkpoint_activations=True, log_every=2)
    assert_equal_weights(tmp_path, trained[0])
    rows, expected = (read_log(out / "metrics.csv") for out in (tmp_path, trained[0]))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


class Clock:
    """Replaces the module `time`: a clock that only moves when told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def test_the_time_spent_waiting_for_data(shapes, quick, tmp_path, clock, monkeypatch, capfd):
    load, backward = Iterations.__getitem__, _Run._backward

    def load_in_three_seconds(self, iteration):
        clock.now += 3
        return load(self, iteration)

    def compute_in_one_second(self, *arguments):
        clock.now += 1
        return backward(self, *arguments)

    monkeypatch.setattr(Iterations, "__getitem__", load_in_three_seconds)
    monkeypatch.setattr(_Run, "_backward", compute_in_one_second)
    # Stopped and resumed, and validated in between: neither counts.
    loop = {"log_every": 2, "progress": True, "validate_every": 2}
    run_stopped(3, quick, shapes, tmp_path, **loop)
    run(quick, shapes, tmp_path, val_split="val", **loop)
    rows = read_log(tmp_path / "metrics.csv")
    assert [(row["iteration"], row["seconds"], row["data_fraction"]) for row in rows] == [
        (iteration, "4", "0.75") for iteration in ("2", "4", "6")
    ]
    assert "4 s per iteration (data 75%, step 25%), 8 s left" in capfd.readouterr().err


def test_one_hint_if_training_waits_for_data(tmp_path, clock, caplog):
    """Neither for the startup of the loader workers nor for a short wait."""
    waits = [*[9] * 5, 1, *[9] * 20]
    with closing(TrainingLog(tmp_path, (), 0, 300)) as log:
        for row, seconds in enumerate(waits, start=1):
            with log.waiting():
                clock.now += seconds
            clock.now += 1
            log.record(10 * row, {"loss": 1.5, "learning_rate": 0.1}, {})
            assert len(caplog.messages) == (row >= 11)
    assert caplog.messages == [
        "training spent more than half of the last 50 iterations waiting for data (90% now); use "
        "more --workers, smaller image files or, if the backbone is frozen, --feature-cache"
    ]


def test_the_log_drops_rows_after_the_resumed_iteration(tmp_path):
    path = tmp_path / "metrics.csv"
    values = {"loss": 1.5, "learning_rate": 0.1}
    with closing(TrainingLog(tmp_path, (), 0, 9)) as log:
        for iteration in range(1, 5):
            log.record(iteration, values, {})
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write("5,1.5,0.")  # as `kill -9` may leave it
    with closing(TrainingLog(tmp_path, (), 2, 9)) as log:
        log.record(3, values, {})
    lines = path.read_text().splitlines(keepends=True)
    assert lines[:3] == before[:3]
    assert lines[0] == "iteration,loss,learning_rate,seconds,data_fraction\n"
    rows = [line.rsplit(",", 2)[0] for line in lines[1:]]
    assert rows == [f"{n},1.5,0.1" for n in (1, 2, 3)]
    assert [row["iteration"] for row in read_log(path)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "content",
    [
        b"iteration,loss\n\xff,2\n",
        b"loss\n2\n",
        b"iteration,loss\nx,2\n",
        b"iteration,loss\n1,x\n",
        b"iteration,loss\n1\n",
        b"iteration,loss\n1,2,3\n",
        b"iteration,loss,mood\n1,2,3\n",
    ],
)
def test_a_log_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    command = f"mv {path} {tmp_path / 'metrics.damaged'}"
    with pytest.raises(UserError, match=f"^{path}: expected the rows .* to go on.*: {command}$"):
        TrainingLog(tmp_path, (), 0, 9)
    assert path.read_bytes() == content


def test_a_stop_between_rows_of_the_log(shapes, quick, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    # 2: a row has been written. 5: none has, and half a row must not become one.
    for every, rows in ((2, ["2"]), (5, [])):
        out = tmp_path / str(every)
        run_stopped(3, quick, shapes, out, log_every=every)
        assert [row["iteration"] for row in read_log(out / "metrics.csv")] == rows
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_diverged_run_keeps_its_last_good_checkpoint(shapes, quick, tmp_path, monkeypatch):
    wild = dataclasses.replace(quick, warmup=0, iterations=4)
    monkeypatch.setattr(type(wild), "lr_factor", lambda recipe, _: 1e20 / recipe.lr)
    message = "the segmentation loss is nan in iteration 2.*there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        run(wild, shapes, tmp_path)
    assert not checkpoint_path(tmp_path).exists()


def test_weights_that_are_not_finite_never_become_a_checkpoint(
    shapes, quick, tmp_path, monkeypatch
):
    step = torch.optim.SGD.step

    def step_too_far(self, closure=None):
        loss = step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(torch.inf)
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", step_too_far)
    with pytest.raises(FloatingPointError, match=r"is not finite after iteration 1; .*; there is"):
        run(quick, shapes, tmp_path, checkpoint_every=1)
    assert not checkpoint_path(tmp_path).exists()


def test_images_of_different_sizes_make_a_batch():
    small = torch.ones(3, 2, 3), torch.ones(2, 3, dtype=torch.int64)
    wide = torch.ones(3, 1, 5), torch.zeros(1, 5, dtype=torch.int64)
    images, masks, sizes = collate([small, wide])
    assert images.shape == (2, 3, 2, 5)
    assert images[0, :, :, 3:].eq(0).all()
    assert masks.tolist() == [
        [[1, 1, 1, 255, 255], [1, 1, 1, 255, 255]],
        [[0, 0, 0, 0, 0], [255, 255, 255, 255, 255]],
    ]
    assert sizes == [(2, 3), (1, 5)]
    larger = collate([small]).padded(2, 5)
    assert torch.equal(larger.images, images[:1])
    assert torch.equal(larger.masks, masks[:1])
    assert larger.weight() == 6
