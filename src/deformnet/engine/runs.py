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

An exported run (`deformnet.engine.export`) is two files: the weights, NAME.safetensors, and their card,
NAME.json, which says what the checkpoint says beside the weights.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from deformnet.models.backbones.weights import read_safetensors
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


def card_path(weights: Path) -> Path:
    """Where the card of exported weights lies."""
    return weights.with_suffix(".json")


def load_run(run: Path) -> tuple[Recipe, nn.Module, DataIdentity]:
    """The recipe, the network (in evaluation mode, on the CPU) and the training data of a run.

    Args:
        run: a run folder, finished or not: the last checkpoint counts; or the .safetensors file of
            an exported run, with its card beside it.
    Raises:
        FileNotFoundError: if there is no such folder or file, no checkpoint in it, or no card.
        ValueError: if the checkpoint, the weights or the card are damaged, do not belong together,
            or are not deformnet's.
    """
    if run.suffix == ".safetensors" and run.is_file():
        path = run
        recipe, identity, state = _load_exported(path)
    else:
        path = checkpoint_path(run)
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such run folder")
        if not path.is_file():
            raise FileNotFoundError(
                f"{run}: not a trained run, there is no {path.relative_to(run)}"
            )
        checkpoint = load_checkpoint(path)
        recipe, identity = recipe_and_data(checkpoint, path)
        state = {
            name.removeprefix(_MODEL): tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith(_MODEL)
        }
    # All weights are here; the ones that training started from need not be there.
    model = dataclasses.replace(recipe, init=None).build_model(len(identity.classes))
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
    return _recipe_and_data(checkpoint["deformnet"], path)


def describe(recipe: Recipe, data: DataIdentity) -> dict[str, Any]:
    """What makes a checkpoint readable on its own, in plain values."""
    return {"recipe": recipe.to_dict(), "data": dataclasses.asdict(data)}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide numbers and speed.

    "commit" is that of deformnet's own code, with "-dirty" if it has been changed since; None where
    the code is not a git checkout.
    """
    packages = ("deformnet", "torch", "torchvision", "lightning")
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "commit": _commit(),
    }


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


def _load_exported(path: Path) -> tuple[Recipe, DataIdentity, dict[str, Tensor]]:
    """What a checkpoint holds, from exported weights and their card."""
    card_file = card_path(path)
    if not card_file.is_file():
        raise FileNotFoundError(f"{path}: its card {card_file.name} is not beside it")
    try:
        card = json.loads(card_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{card_file}: damaged, not a JSON file") from error
    try:
        wanted = card["sha256"]
        recipe, identity = _recipe_and_data(card, card_file)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{card_file}: damaged, or not the card of an exported run") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ValueError(
            f"{path}: not the weights of its card, the sha256 is {found[:12]}... and "
            f"{card_file.name} says {str(wanted)[:12]}..."
        )
    return recipe, identity, read_safetensors(path)[0]


def _recipe_and_data(described: Mapping[str, Any], path: Path) -> tuple[Recipe, DataIdentity]:
    recipe = recipe_from_dict(described["recipe"], source=path)
    data = described["data"]
    return recipe, DataIdentity(**{**data, "classes": tuple(data["classes"])})


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from, or None."""
    package = Path(__file__).parent
    root = package.parent.parent
    # Not that of a project that has the package in its own tree, as in a virtual environment.
    if package != root / "src" / "deformnet" or not (root / ".git").exists():
        return None
    try:
        with (root / "pyproject.toml").open("rb") as file:
            if tomllib.load(file)["project"]["name"] != "deformnet":
                return None
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", "src")
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(root: Path, *arguments: str) -> str:
    # Without locks: it must not get in the way of someone who is committing.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


