"""Run folders: layout, reading and writing.

```
RUN/
  recipe.json                the recipe that repeats the run
  checkpoints/last.ckpt      network, optimizer and iteration; training resumes from here
  checkpoints/previous.ckpt  the checkpoint before it, in case last.ckpt is damaged
  checkpoints/best.ckpt      the network with the best score, if validated during training
  validation.csv             scores of each validation, in percent
  metrics.csv                one row every few iterations: loss, learning rate, seconds per
                             iteration, and the fraction of time spent waiting for data
  tensorboard/               the same for TensorBoard
  metrics.json               scores on the validation images, and a description of the run
  metrics-SPLIT.json         scores on another split
  confusion-matrix.png       confusion matrix; confusion-matrix-SPLIT.png of another split
  precision-recall.png       for detectors: precision-recall curves; precision-recall-SPLIT.png
  detections.jsonl           for detectors: predictions behind the scores; detections-SPLIT.jsonl
```

Every file except the logs is written under a temporary name (`.*.partial`) and then renamed, so
that a crash at any time leaves either the old file or the new one; running the same command again
removes the temporary files that a killed process left. After the first checkpoint,
`last.ckpt` always exists; a new one moves its predecessor to `previous.ckpt`.

A checkpoint is an archive of `torch.save` with a checksum per record, which is verified on reading:
a damaged file raises an error and is never loaded. All names, shapes and types are checked against
those that the run expects, and weights have to be finite.

An exported run (`deformnet.engine.export`) is three files: the weights, NAME.safetensors; their
card, NAME.json, with the rest of the checkpoint and the SHA-256 of the weights; and a model card.
"""

import dataclasses
import os
import platform
import re
import shlex
import socket
import subprocess
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deformnet._errors import UserError
from deformnet._files import UNSUPPORTED, naming, read_json, remove_partial, replacing
from deformnet._hub import address_of, local
from deformnet.engine.checkpoints import Checkpoint, Description, checked
from deformnet.engine.settings import SUFFIXES
from deformnet.models import _tensors
from deformnet.models.backbones.weights import misfit
from deformnet.recipes import Recipe, recipe_from_dict
from deformnet.tasks import task_of
from deformnet.tasks.base import DataIdentity, TaskOptions
from deformnet.tasks.predictor import Predictor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PACKAGE = Path(__file__).parents[1]


class TrainedRun(NamedTuple):
    """The network of a run, in evaluation mode, on the CPU; its recipe and its training data."""

    recipe: Recipe
    model: nn.Module
    data: DataIdentity


def checkpoint_path(run: Path) -> Path:
    """The checkpoint from which training in a run folder resumes."""
    return run / "checkpoints" / "last.ckpt"


def previous_path(run: Path) -> Path:
    """The checkpoint of a run folder before the last one."""
    return run / "checkpoints" / "previous.ckpt"


def best_path(run: Path) -> Path:
    """The checkpoint of the best network of a run folder."""
    return run / "checkpoints" / "best.ckpt"


def existing_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's network: the best one if there is one, otherwise the last.

    Args:
        run: run folder, or one of its checkpoints.
    Raises:
        FileNotFoundError: if there is no such folder, or no checkpoint in it.
    """
    path = checkpoint_path(run)
    if run.suffix == ".ckpt" and run.is_file():
        return run
    if run.is_file():
        raise UserError(f"{run}: expected a run folder or an exported .safetensors, but got a file")
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    if not path.exists():
        raise FileNotFoundError(
            f"{run}: expected a trained run, but there is no {path.relative_to(run)}"
        )
    return best if (best := best_path(run)).exists() else path


def require_folder(run: Path, purpose: str = "") -> None:
    """Requires a run folder rather than a file or an hf:// URI.

    Raises:
        UserError: if `run` is a file or an hf:// URI.
    """
    if (address := address_of(run)) is not None:
        raise UserError(f"{address}: expected a run folder{purpose}, but got an hf:// URI")
    if run.is_file():
        raise UserError(f"{run}: expected a run folder{purpose}, but got a file")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run folder against concurrent training; warns if the file system has no locks.

    An evaluation does not lock it and can run at the same time: it replaces its own files as a
    whole, and has none in checkpoints/, whose unfinished files are removed here.

    Raises:
        UserError: if another process is training in it.
    """
    if fcntl is None:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    # Unbuffered, or closing it on a full disk would fail a second time, without naming the file.
    with (run / ".lock").open("a+b", buffering=0) as file:
        is_locked = True
        try:
            with naming(run / ".lock"):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loaders
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            process = file.read().decode(errors="replace")
            raise UserError(
                f"{run}: expected a run folder that is not in use, but process {process} "
                "writes to it; wait for that run to end, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            is_locked = False
            warnings.warn(
                f"{run}: the file system does not support locks ({error.strerror}), so a second "
                "training in this folder would not be noticed; start only one at a time",
                stacklevel=1,
            )
        if is_locked:
            with naming(run / ".lock"):
                file.truncate(0)
                # With the host: on another one, or in a container, it is another process.
                file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
            remove_partial(run / "checkpoints")  # of a process that was killed
        yield


def card_path(weights: Path) -> Path:
    """The card of exported weights."""
    return weights.with_suffix(".json")


def load(
    run: str | Path,
    *,
    options: TaskOptions = TaskOptions(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
) -> Predictor:
    """Loads a trained network as a predictor, which takes images.

        >>> predictor = deformnet.load("runs/camvid")
        >>> prediction = predictor("street.jpg")

    Args:
        run: run folder, one of its checkpoints, or an exported run: its .safetensors file, a folder
            that contains model.safetensors, or a repository on the Hugging Face Hub,
            hf://OWNER/REPO or hf://OWNER/REPO@REVISION. Also a network exported to .onnx or .pt2;
            see `deformnet.engine.whole`.
        options: test-time augmentation, for detectors.
        device: device to run on; None uses a GPU if there is one.
    Raises:
        FileNotFoundError, UserError, OSError: see `load_run`.
    """
    path = Path(run)
    if path.suffix in SUFFIXES:
        from deformnet.engine.whole import load_whole  # which imports this module

        return load_whole(path, options, device)
    recipe, model, data = load_run(run)
    return task_of(recipe, options).predictor(model, data, device)


def load_run(run: str | Path) -> TrainedRun:
    """Loads the recipe, the network and the identity of the training data of a run.

    Args:
        run: run folder, finished or not (its best checkpoint if the network was validated during
            training, otherwise the last one); a checkpoint file; the .safetensors file of an
            exported run, with its card in the same folder; a folder that contains
            model.safetensors and its card; or an hf:// URI, see `load`.
    Raises:
        FileNotFoundError: if the folder or file, its checkpoint or its card does not exist.
        UserError: if the checkpoint, weights or card are damaged, do not belong together, or were
            not written by deformnet; or an hf:// URI is malformed.
        OSError: if a download fails.
    """
    path = local(run)
    if path.suffix == ".safetensors" and path.is_file():
        described, state = _load_exported(path)
        return _restored(*recipe_and_data(described, card_path(path)), state, path)
    path = existing_checkpoint(path)
    return restored(load_checkpoint(path), path)


def restored(checkpoint: Checkpoint, path: Path) -> TrainedRun:
    """The network of a checkpoint that was loaded from `path`."""
    return _restored(*recipe_and_data(checkpoint["deformnet"], path), checkpoint["model"], path)


def _restored(
    recipe: Recipe, data: DataIdentity, state: Mapping[str, Tensor], path: Path
) -> TrainedRun:
    # All weights are here; those that training started from need not exist any more.
    try:
        model = dataclasses.replace(recipe, init=None).build_model(len(data.classes))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    problem = misfit(model.state_dict(), state)
    if problem is not None:
        raise UserError(f"{path}: does not fit the network of its recipe: {problem}")
    model.load_state_dict(state)
    return TrainedRun(recipe, model.eval(), data)


def iterations_done(run: str | Path) -> int:
    """Number of iterations for which the network in a run folder has been trained.

    Raises:
        FileNotFoundError, UserError: see `load_run`.
    """
    existing_checkpoint(run := Path(run))
    return load_checkpoint(checkpoint_path(run))["iteration"]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Loads a checkpoint: tensors on the CPU and plain Python values, never code.

    Raises:
        OSError: if the file does not exist or cannot be read.
        UserError: if the file is damaged or not a checkpoint of deformnet; the message names
            another checkpoint of the run, if there is an intact one.
    """
    path = Path(path)
    try:
        return _read_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}{_instead_of(path)}") from error


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        content = _tensors.read_torch(path)
    except UserError as error:
        raise UserError(f"{path}: damaged, or not a checkpoint ({error})") from error
    try:
        return checked(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _instead_of(path: Path) -> str:
    """What to do about a damaged checkpoint of a run; empty if there is no intact one."""
    run = path.parent.parent
    last, previous, best = checkpoint_path(run), previous_path(run), best_path(run)
    remedies = {last: (previous, previous, last), best: (last, best, best.with_suffix(".damaged"))}
    if path not in remedies:
        return ""
    other, old, new = remedies[path]
    try:
        iteration = _read_checkpoint(other)["iteration"]
    except (OSError, UserError):
        return ""
    return f"; {other.name} of iteration {iteration} is intact; to use it, run: {move(old, new)}"


def move(old: Path, new: Path) -> str:
    """The shell command that renames a file."""
    return shlex.join(["mv", str(old), str(new)])


def save_checkpoint(checkpoint: Checkpoint, path: Path, *, earlier: Path | None = None) -> None:
    """Replaces the checkpoint of a run.

    Args:
        checkpoint: the new checkpoint.
        path: file to write or replace.
        earlier: where to keep the checkpoint that was at `path`.
    Raises:
        OSError: if it cannot be written; the existing checkpoints are then unchanged.
    """
    try:
        with replacing(path, earlier=earlier) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # PyTorch reports a failed write by an error of its own that follows the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = ", an earlier one is kept" if path.is_file() else ""
        raise OSError(f"{path}: checkpoint not written{kept} ({cause.strerror})") from error


def describe(recipe: Recipe, data: DataIdentity) -> Description:
    """Recipe and training data in plain values."""
    return {"recipe": recipe.to_dict(), "data": dataclasses.asdict(data)}


def recipe_and_data(described: Description, path: Path) -> tuple[Recipe, DataIdentity]:
    """What `describe` put into a file."""
    try:
        recipe = recipe_from_dict(described["recipe"], source=path)
        data = DataIdentity(**described["data"])  # pyright: ignore[reportArgumentType]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, its training data are not described") from error
    kinds = {"classes": list | tuple, "images": int, "digest": str, "proposals": bool}
    names = data.classes
    for name, kind in kinds.items():
        if not isinstance(getattr(data, name), kind) or not all(isinstance(n, str) for n in names):
            raise UserError(f"{path}: damaged, expected valid {name} of its training data")
    return recipe, dataclasses.replace(data, classes=tuple(names))


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide numbers and speed; None if not installed.

    "commit" is that of deformnet's own code, with "-dirty" if it has been changed since; None if
    the code is not in a git checkout.
    """
    packages = {name: _version(name) for name in ("deformnet", "torch", "torchvision", "lightning")}
    return {"python": platform.python_version(), **packages, "commit": _commit()}


def machine() -> str:
    """The machine in one line: processor, cores, threads in use, accelerator."""
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", known, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    parts = [name, f"{os.cpu_count()} cores", f"threads: {torch.get_num_threads()}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def _load_exported(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Description and state dict of an exported run, if its weights are those of its card."""
    card_file = card_path(path)
    if not card_file.is_file():
        raise FileNotFoundError(f"{path}: its card {card_file.name} is not beside it")
    card = read_json(card_file)
    kinds = {"sha256": str, "recipe": dict, "data": dict}
    if not isinstance(card, dict) or not all(isinstance(card.get(k), kinds[k]) for k in kinds):
        raise UserError(
            f"{card_file}: expected the card of an exported run, but got a damaged or another file"
        )
    state = _tensors.read_safetensors(path)[0]
    try:
        _tensors.weights(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return {"recipe": card["recipe"], "data": card["data"]}, state


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from, or None."""
    root = _PACKAGE.parents[1]
    # Not that of a project that has the package in its own tree, as in a virtual environment.
    if root / "src" / "deformnet" != _PACKAGE or not (root / ".git").exists():
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
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
