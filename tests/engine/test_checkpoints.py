"""Checkpoints: a damaged or unsuitable one is never used; the last two are kept, and a run that
resumes from the earlier one ends with bitwise identical weights."""

import copy
import dataclasses
import errno
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from processes import CPU
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from damage import cases, flipped, result
from deformnet import UserError
from deformnet.engine import LoopOptions, export_run, load_run, train, training
from deformnet.engine.checkpoints import Checkpoint, optimizer_state, require_resumable
from deformnet.engine.runs import (
    best_path,
    checkpoint_path,
    existing_checkpoint,
    load_checkpoint,
    locked,
    previous_path,
    restored,
    save_checkpoint,
)
from deformnet.recipes import DeepLabRecipe
from small_sets import one_line

CASES = cases(200)


class Tiny(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))


@pytest.fixture
def tiny(monkeypatch) -> DeepLabRecipe:
    """A recipe whose network has 300 parameters."""
    monkeypatch.setattr(DeepLabRecipe, "build_model", lambda self, classes: Tiny())
    return DeepLabRecipe(ema=0.9, optimizer="adamw")


def checkpoint_of(recipe: DeepLabRecipe, iteration: int = 3) -> Checkpoint:
    torch.manual_seed(iteration)
    model = Tiny()
    optimizer = optimizer_of(model, recipe)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    data = {"classes": ("a", "b"), "images": 5, "digest": "0" * 64, "proposals": False}
    return {
        "deformnet": {"recipe": recipe.to_dict(), "data": data},
        "model": Tiny().state_dict(),
        "unaveraged": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": {"scale": 65536.0, "_growth_tracker": 2},
        "iteration": iteration,
        "validated": {"iteration": 2, "best": 30.5, "best_iteration": 2, "waited": 0},
    }


def optimizer_of(model: nn.Module, recipe: DeepLabRecipe) -> Optimizer:
    if recipe.optimizer == "adamw":
        return AdamW(model.parameters(), lr=0.1)
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def use(path: Path, recipe: DeepLabRecipe) -> Checkpoint:
    """Does everything that training does with a checkpoint, and one step."""
    checkpoint = load_checkpoint(path)
    model = restored(checkpoint, path).model.train()
    optimizer = optimizer_of(model, recipe)
    precision = {"scale": 1.0, "_growth_tracker": 0}
    try:
        require_resumable(
            *(checkpoint, model.state_dict(), recipe.ema is not None, optimizer, precision)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if (unaveraged := checkpoint.get("unaveraged")) is not None:
        model.load_state_dict(unaveraged)
    optimizer.load_state_dict(optimizer_state(checkpoint, optimizer))
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return checkpoint


def same(value: object, other: object) -> bool:
    """Whether two values are bitwise identical."""
    if isinstance(value, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (value.dtype, value.shape) == (other.dtype, other.shape)
            and value.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(value, dict):
        return (
            isinstance(other, dict)
            and list(value) == list(other)
            and all(same(value[key], other[key]) for key in value)
        )
    if isinstance(value, list | tuple):
        return (
            type(value) is type(other) and len(value) == len(other) and all(map(same, value, other))
        )
    return type(value) is type(other) and value == other


def test_no_flipped_bit_is_used(tiny, tmp_path):
    path = checkpoint_path(tmp_path)
    save_checkpoint(checkpoint_of(tiny), path)
    expected, found, count = load_checkpoint(path), 0, max(CASES, 500)
    for content in flipped(path.read_bytes(), count):
        path.write_bytes(content)
        checkpoint = result(path, load_checkpoint)
        assert checkpoint is None or same(checkpoint, expected)
        found += checkpoint is None
    assert found > count / 3


def garbage() -> list[object]:
    nested: object = []
    for _ in range(300):
        nested = [nested]
    return [
        *(None, "x", "", -1, 0, 1.5, float("nan"), float("inf"), True, 10**40, b"x", 2**63),
        *([], {}, (), set(), [1, 2], {"a": 1}, {1: 2}, nested, 1j, torch.float32, torch.Size([2])),
        *(torch.zeros(0), torch.zeros(3), torch.ones(8, 3, 3, 3).to_sparse(), torch.ones(()).int()),
        *(torch.ones(8).double(), torch.ones(8).half(), torch.ones(8, dtype=torch.complex64)),
        *(torch.ones(8) * float("nan"), torch.ones(1).expand(1 << 20), torch.ones(8) > 0),
        *(
            torch.ones(8, device="meta"),
            torch.quantize_per_tensor(torch.ones(8), 1, 0, torch.qint8),
        ),
        *(nn.Parameter(torch.ones(8)), torch.nested.nested_tensor([torch.ones(8)]), ["a", 1]),
    ]


def places(content: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The paths to all values in nested dicts and lists."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else ()
    for key, value in enumerate(content) if isinstance(content, list) else inner:
        yield from places(value, (*path, key))


def spoiled(checkpoint: Checkpoint, rng: random.Random) -> object:
    content = copy.deepcopy(checkpoint)
    *way, last = rng.choice(list(places(content)))
    inside = content
    for key in way:
        inside = inside[key]
    action = rng.randrange(8)
    if action == 0:
        del inside[last]
    elif action == 1 and isinstance(inside, dict):
        inside[rng.choice(["more", 7, 0, "weight"])] = rng.choice(garbage())
    elif action == 2 and isinstance(inside[last], torch.Tensor):
        changes = (
            lambda it: it.flatten()[:-1],
            lambda it: it[None],
            lambda it: it.double(),
            lambda it: it.long(),
            lambda it: it.to_sparse() if it.ndim else it,
            lambda it: it * float("inf"),
        )
        inside[last] = rng.choice(changes)(inside[last])
    else:
        inside[last] = rng.choice(garbage())
    return content


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_content_is_named(optimizer, tiny, tmp_path):
    recipe = DeepLabRecipe(optimizer=optimizer, ema=0.9 if optimizer == "adamw" else None)
    checkpoint = checkpoint_of(recipe)
    if recipe.ema is None:
        checkpoint["model"], checkpoint["unaveraged"] = checkpoint["unaveraged"], None
    path, rng = tmp_path / "a.ckpt", random.Random(0)
    save_checkpoint(checkpoint, path)
    use(path, recipe)
    refused = 0
    for _ in range(CASES // 2):
        torch.save(spoiled(checkpoint, rng), path)
        refused += result(path, partial(use, recipe=recipe)) is None
    assert refused > CASES / 4


def test_content_that_is_no_checkpoint(tmp_path, tiny):
    path = tmp_path / "a.ckpt"
    for content in garbage():
        torch.save(content, path)
        with one_line(UserError, path):
            load_checkpoint(path)


def test_a_checkpoint_without_the_state_of_training(tiny):
    checkpoint = checkpoint_of(tiny) | {"unaveraged": None, "optimizer": {}}
    model = Tiny()
    optimizer, precision = optimizer_of(model, tiny), checkpoint["precision"]
    with one_line(UserError, "expected the training state, but got only the network"):
        require_resumable(checkpoint, model.state_dict(), False, optimizer, precision)
    with one_line(UserError, "expected averaged weights (ema), but got weights without"):
        require_resumable(checkpoint, model.state_dict(), True, optimizer, precision)


# The last two.


def test_the_last_two_are_kept(tiny, tmp_path):
    last, previous = checkpoint_path(tmp_path), previous_path(tmp_path)
    for number in (1, 2, 3):
        save_checkpoint(checkpoint_of(tiny, number), last, earlier=previous)
        kept = [load_checkpoint(path)["iteration"] for path in (previous, last) if path.exists()]
        assert kept == [1] if number == 1 else [number - 1, number]
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_the_other_checkpoint_is_offered(tiny, tmp_path):
    last, previous, best = (p(tmp_path) for p in (checkpoint_path, previous_path, best_path))
    for path, number in ((previous, 1), (last, 2), (best, 1)):
        save_checkpoint(checkpoint_of(tiny, number), path)
    whole = last.read_bytes()
    best.write_bytes(whole[:1000])
    with one_line(UserError, f"{best}: damaged", "last.ckpt of iteration 2 is intact", "mv "):
        load_run(tmp_path)
    with pytest.raises(UserError) as error:
        load_checkpoint(best)
    subprocess.run(str(error.value).rpartition("to use it, run: ")[2], shell=True, check=True)
    assert same(load_run(tmp_path).model.state_dict(), load_checkpoint(last)["model"])
    last.write_bytes(whole[:1000])
    with one_line(UserError, f"{last}: damaged", "previous.ckpt of iteration 1 is intact"):
        load_run(tmp_path)
    previous.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="damaged") as error:
        load_run(tmp_path)
    assert "intact" not in str(error.value)


def test_permission_denied_is_not_damaged(tiny, tmp_path, monkeypatch):
    path = checkpoint_path(tmp_path)
    save_checkpoint(checkpoint_of(tiny), path)

    def refused(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError) as error:
        load_run(tmp_path)
    assert error.value.filename == str(path)


def test_an_earlier_checkpoint_stays_only_if_there_is_one(tiny, tmp_path, monkeypatch):
    path = checkpoint_path(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    for message in ("checkpoint not written (No space", "not written, an earlier one is kept (No"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with one_line(OSError, path, message):
                save_checkpoint(checkpoint_of(tiny), path, earlier=previous_path(tmp_path))
        save_checkpoint(checkpoint_of(tiny), path)


def test_a_killed_training_leaves_nothing_behind(tmp_path):
    path = checkpoint_path(tmp_path)
    path.parent.mkdir()
    (path.parent / ".0123456789abcdef.partial").write_bytes(b"half")
    with locked(tmp_path):
        assert list(path.parent.iterdir()) == []


def test_resuming_from_the_checkpoint_before(shapes, quick, tmp_path):
    recipe, out = dataclasses.replace(quick, iterations=3), tmp_path / "run's"

    def fit() -> str:
        """Trains; returns the command in the error message, or an empty string on success."""
        loop = LoopOptions(checkpoint_every=1, progress=False)
        try:
            train(recipe, shapes, out, val_split=None, hardware=CPU, loop=loop)
        except UserError as error:
            message = str(error)
        else:
            return ""
        assert message.startswith(f"{path}: ")
        return "mv " + message.rpartition(": mv ")[2]

    path, previous = checkpoint_path(out), previous_path(out)
    assert not fit()
    expected, content = load_checkpoint(path), bytearray(path.read_bytes())
    assert load_checkpoint(previous)["iteration"] == 2
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    command = fit()
    path.unlink()
    assert fit() == command
    subprocess.run(command, shell=True, check=True)
    assert load_checkpoint(path)["iteration"] == 2
    assert not fit()
    assert same(load_checkpoint(path), expected)


def test_a_checkpoint_that_is_replaced_after_it_was_read(shapes, quick, tmp_path, monkeypatch):
    """Another training ended between reading and locking: its iterations must not be lost."""
    path, read = checkpoint_path(tmp_path), training._checkpoint_of

    def replaced(*arguments, **options):
        result = read(*arguments, **options)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes() + b"more" if path.exists() else b"first")
        return result

    monkeypatch.setattr(training, "_checkpoint_of", replaced)
    with pytest.raises(UserError, match="another process has trained in it since"):
        train(quick, shapes, tmp_path, val_split=None, hardware=CPU)
    assert path.read_bytes() == b"first"
    assert sorted(it.name for it in tmp_path.iterdir()) == [".lock", "checkpoints"]


def test_a_pipe_in_the_place_of_a_checkpoint_is_refused(shapes, quick, tmp_path):
    """It is not taken for a run without a checkpoint, which would start anew."""
    path = checkpoint_path(tmp_path)
    path.parent.mkdir()
    os.mkfifo(path)
    with one_line(UserError, f"{path}: ", "got a pipe"):
        train(quick, shapes, tmp_path, val_split=None, hardware=CPU)
    with one_line(UserError, f"{path}: ", "got a pipe"):
        load_checkpoint(existing_checkpoint(tmp_path))


def test_a_full_disk_under_the_lock_is_named(tmp_path):
    """A limit on the size of files fails every write, also those when the lock is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*\.lock"), locked(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    """Training continues, and removes nothing that may be of another training."""
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(number, os.strerror(number))))
    (tmp_path / "checkpoints").mkdir()
    other = tmp_path / "checkpoints/.0123456789abcdef.partial"
    other.touch()
    message = r"file system does not support locks \(.*\), so"
    with pytest.warns(UserWarning, match=message), locked(tmp_path):
        assert other.exists()


def test_a_failing_disk_under_the_lock_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output") as error, locked(tmp_path):
        pass
    assert error.value.filename == str(tmp_path / ".lock")


# Exports.


def test_an_export_replaces_only_a_card(tiny, tmp_path):
    run = tmp_path / "run"
    save_checkpoint(checkpoint_of(tiny), checkpoint_path(run))
    recipe = run / "recipe.json"
    recipe.write_text(tiny.to_json())
    with one_line(UserError, recipe, "got another file, which was not changed"):
        export_run(run, run / "recipe.safetensors")
    assert recipe.read_text() == tiny.to_json()
    assert not (run / "recipe.safetensors").exists()
    for _ in range(2):
        export_run(run, tmp_path / "net.safetensors")
    exported = load_run(tmp_path / "net.safetensors").model
    assert same(exported.state_dict(), load_run(run).model.state_dict())


def test_no_flipped_bit_of_an_export_is_used(tiny, tmp_path):
    run, path = tmp_path / "run", tmp_path / "net.safetensors"
    save_checkpoint(checkpoint_of(tiny), checkpoint_path(run))
    export_run(run, path)
    load_run(path)
    for content in flipped(path.read_bytes(), CASES):
        path.write_bytes(content)
        with one_line(UserError, f"{path}: not the weights of its card"):
            load_run(path)
