"""Invalid and extreme values of options: every command reports them in one line.

DEFORMNET_FUZZ is the number of cases, out of a few thousand; DEFORMNET_FUZZ_SEED selects them.
"""

import dataclasses
import inspect
import os
import random
import signal
import typing
from contextlib import contextmanager

import pytest
import torch

from deformnet.cli import main
from deformnet.cli.app import Group, _commands
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.models.network import Network
from deformnet.paper.rows import ROWS
from deformnet.recipes import RFCNRecipe

FOLDER = "FOLDER"  # an existing one
HOSTILE = ("-1", "0", "nan", "inf", "1e300", str(10**30), "", FOLDER)
SECONDS = 60  # of a command, on a busy machine
_TRAIN = [
    *("--recipe", "scratch", "--backbone", "resnet18", "--deform-layers", "1"),
    *("--batch", "2", "--iterations", "1", "--accelerator", "cpu", "--workers", "0"),
]


def leaves(commands, words=()):
    """The words of all commands."""
    for name, command in commands.items():
        if isinstance(command, Group):
            yield from leaves(command.commands, (*words, name))
        else:
            yield (*words, name), command


def options(words):
    """The options of a command, each with the number of its values."""
    command = dict(leaves(_commands(words)))[words]
    hints = typing.get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        hint, *notes = typing.get_args(hints[name]) or (hints[name],)
        if dataclasses.is_dataclass(hint):
            of_fields = typing.get_type_hints(hint)
            for field in dataclasses.fields(hint):
                yield field.name, _values(of_fields[field.name])
        elif "Positional" not in str(hint) + str(notes):
            renamed = {"box_format": "format"}
            yield renamed.get(name, name), _values(typing.get_type_hints(command)[name])


def _values(hint):
    parts = [part for part in (*typing.get_args(hint), hint) if typing.get_origin(part) is tuple]
    lengths = [len(typing.get_args(part)) for part in parts if ... not in typing.get_args(part)]
    return lengths[0] if lengths else 1


ALL = [
    (words, option, count, value)
    for words, _ in leaves(_commands([]))
    for option, count in options(words)
    for value in HOSTILE
]
KNOWN = [
    (("train", "deeplab"), "lr", 1, "1e300"),
    (("train", "deeplab"), "lr", 1, "nan"),
    (("train", "deeplab"), "workers", 1, "-1"),
    (("train", "deeplab"), "batch", 1, str(10**12)),
    (("train", "classifier"), "crop", 1, str(10**30)),
    (("evaluate",), "workers", 1, "-1"),
    (("evaluate",), "scales", 1, str(10**30)),
    (("predict",), "scales", 1, "0"),
    (("predict",), "threshold", 1, "nan"),
    (("predict",), "threshold", 1, "-1"),
    (("predict",), "refine", 1, str(10**30)),
    (("predict",), "device", 1, "nonsense"),
    (("predict",), "device", 1, "cuda:99"),
    (("predict",), "device", 1, "meta"),
    (("predict",), "device", 1, "mps"),
    (("data", "synthesize"), "width", 1, str(10**30)),
    (("demo",), "size", 1, "-1"),
]
COUNT = min(len(ALL), int(os.environ.get("DEFORMNET_FUZZ", "16")))
SAMPLE = random.Random(int(os.environ.get("DEFORMNET_FUZZ_SEED", "0"))).sample(ALL, COUNT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data and a run of a detector."""
    from deformnet.data import open_detection
    from deformnet.engine.runs import checkpoint_path, describe, save_checkpoint
    from deformnet.tasks import DataIdentity

    root = tmp_path_factory.mktemp("options")
    write_shapes(root / "voc", Shapes(train=2, val=2, height=32, width=32))
    write_shapes(
        root / "folders", Shapes(train=6, val=6, height=32, width=32, layout="image-folder")
    )
    classes = open_detection(root / "voc", "val").classes
    sizes = {"short_side": 32, "max_side": 40, "anchor_sizes": (16,), "proposals": 8}
    recipe = RFCNRecipe(backbone="resnet18", **sizes)
    model: Network = recipe.build_model(len(classes))
    checkpoint = {
        "deformnet": describe(recipe, DataIdentity(classes, 2, "")),
        "model": model.state_dict(),
        "optimizer": {},
        "precision": {},
        "iteration": 1,
    }
    save_checkpoint(checkpoint, checkpoint_path(root / "run"))
    (root / "file").touch()
    return root


def arguments(words, root, out):
    """Arguments with which a command takes a second, or fails after checking its options."""
    image = next((root / "voc").rglob("*.jpg"))
    run, data = root / "run", ("--data", root / "voc")
    match words:
        case "train", "classifier":
            sizes = ("--resize", 32, 40, "--crop", 32, "--test-short-side", 32)
            return ["--data", root / "folders", "--out", out, *_TRAIN, *sizes]
        case "train", _:
            return [*data, "--out", out, *_TRAIN, "--short-side", 32, "--max-side", 64]
        case ("evaluate",):
            return [run, *data, "--accelerator", "cpu", "--workers", 0]
        case ("predict",):
            return [run, image, "--out", out, "--device", "cpu"]
        case ("propose",):
            return [run, *data, "--out", out / "p", "--accelerator", "cpu", "--workers", 0]
        case ("export",) | ("weights", *_):
            return [run, out / "x.safetensors"]
        case "data", "check":
            return [root / "voc", "--custom", "--record", out / "r", "--report", out / "r.txt"]
        case "data", "convert":
            return [root / "voc", out / "new", "--layout", "voc"]
        case "data", "synthesize":
            return [out / "new", "--train", 1, "--val", 1, "--height", 16, "--width", 16]
        case "inspect", "analyze":
            return [run, *data, "--out", out, "--device", "cpu"]
        case "inspect", "view":
            return [run, out / "missing.png", "--device", "cpu"]
        case "paper", "reproduce":
            return [next(iter(ROWS)).name, "--data", out / "nowhere", "--out", out]
        case "paper", "table4" | "training-step":
            return ["--device", "cuda"]
        case ("score",):
            return ["--boxes", root / "file", *data, "--split", "val"]
        case ("demo",):
            return ["--out", root / "file/x"]
    return []


@contextmanager
def limited(seconds):
    """Raises TimeoutError after some seconds."""

    def late(*_):
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("words", "option", "count", "value"),
    [*KNOWN, *SAMPLE],
    ids=lambda part: "-".join(part) if isinstance(part, tuple) else str(part)[:12],
)
def test_hostile_values(made, tmp_path, capfd, words, option, count, value, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)  # where files of these names appear
    given = str(tmp_path) if value == FOLDER else value
    line = [*words, *map(str, arguments(words, made, tmp_path / "out"))]
    line += [f"--{option.replace('_', '-')}", *[given] * count]
    code = 0
    with limited(SECONDS):
        try:
            main(line)
        except SystemExit as ended:
            code = ended.code
    out, err = capfd.readouterr()
    known = (words, option, count, value) in KNOWN
    assert code == 2 if known else code in (0, 2), err
    if code:
        lines = [it for it in err.splitlines() if it.startswith("deformnet: ")]
        # tyro reports parsing errors in a box; data check lists problems.
        assert len(lines) == 1 or "─ " in err or "problems" in out, err
        assert "Traceback" not in err
