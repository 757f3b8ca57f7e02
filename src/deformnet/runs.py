"""A run folder: what lies in it, and how its files are written and read.

```
RUN/
  recipe.json             the recipe that repeats the run
  checkpoints/last.ckpt   network, optimiser and progress; training continues from here
  metrics.csv             one row per few iterations: loss, learning rate, seconds per iteration
  tensorboard/            the same, for TensorBoard
  metrics.json            scores on the validation images, and what they took
  metrics-SPLIT.json      scores on another list of images
  detections.jsonl        of a detector: what was scored; detections-SPLIT.jsonl likewise
```

Every file but the logs is written under another name and renamed into place, so that a crash at any
moment leaves the old file or the new one.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from deformnet.recipes import Recipe, recipe_from_dict

_MODEL = "model."  # the network's prefix in the state dict of a checkpoint


@dataclass(frozen=True)
class DataIdentity:
    """What a run remembers of its training data, to notice when it is continued on other data."""

    classes: tuple[str, ...]
    images: int
    digest: str
    proposals: bool = False
    """Whether a detector was trained on stored proposals, so that it needs them again."""

    @classmethod
    def of(
        cls, classes: tuple[str, ...], names: Iterator[str], proposals: str | None = None
    ) -> "DataIdentity":
        """The identity of a data set with these classes and image names, in this order.

        Args:
            proposals: digest of the stored proposals that belong to it.
        """
        listed = list(names)
        parts = (*classes, "", *listed, *([] if proposals is None else ["", proposals]))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cls(classes, len(listed), digest, proposals is not None)


def checkpoint_path(run: Path) -> Path:
    """Where a run keeps its checkpoint."""
    return run / "checkpoints" / "last.ckpt"


def load_run(run: Path) -> tuple[Recipe, nn.Module, DataIdentity]:
    """The recipe, the network (in evaluation mode, on the CPU) and the training data of a run.

    Args:
        run: a run folder, finished or not: the last checkpoint counts.
    Raises:
        FileNotFoundError: if there is no such folder or no checkpoint in it.
        ValueError: if the checkpoint is damaged, or is not one of deformnet's.
    """
    path = checkpoint_path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    if not path.is_file():
        raise FileNotFoundError(f"{run}: not a trained run, there is no {path.relative_to(run)}")
    checkpoint = load_checkpoint(path)
    recipe, identity = recipe_and_data(checkpoint, path)
    # The checkpoint holds all weights; the ones that training started from need not be there.
    model = dataclasses.replace(recipe, init=None).build_model(len(identity.classes))
    state = {
        name.removeprefix(_MODEL): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_MODEL)
    }
    expected = model.state_dict()
    for name in expected.keys() | state.keys():
        if name not in state:
            raise ValueError(f"{path}: does not fit the network of its recipe, {name} is missing")
        if name not in expected:
            raise ValueError(f"{path}: does not fit the network of its recipe, {name} is unknown")
        if expected[name].shape != state[name].shape:
            raise ValueError(
                f"{path}: does not fit the network of its recipe, {name} must have shape "
                f"{tuple(expected[name].shape)}, got {tuple(state[name].shape)}"
            )
    model.load_state_dict(state)
    return recipe, model.eval(), identity


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain Python values, never code.

    Raises:
        ValueError: if the file is damaged or is not a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or "deformnet" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of deformnet")
    return checkpoint


def recipe_and_data(checkpoint: Mapping[str, Any], path: Path) -> tuple[Recipe, DataIdentity]:
    """What `describe` put into a checkpoint."""
    described = checkpoint["deformnet"]
    recipe = recipe_from_dict(described["recipe"], source=path)
    data = described["data"]
    return recipe, DataIdentity(**{**data, "classes": tuple(data["classes"])})


def describe(recipe: Recipe, data: DataIdentity) -> dict[str, Any]:
    """What makes a checkpoint readable on its own, in plain values."""
    return {"recipe": recipe.to_dict(), "data": dataclasses.asdict(data)}


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: if writing fails, a full disk included; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to errors of writing it, which the system reports without."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file as a whole."""
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers and speed."""
    packages = ("deformnet", "torch", "torchvision", "lightning")
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in packages}


def machine() -> str:
    """One line that names the machine: processor, cores, threads in use, accelerator."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    parts = [name, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
