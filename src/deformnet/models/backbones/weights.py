"""Starting weights of a backbone: files, run folders, and what they must hold."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deformnet.models.backbones.features import Backbone

_RUN_CHECKPOINT = Path("checkpoints/last.ckpt")
_IN_CHECKPOINT = "model.backbone."  # where the checkpoint of a run has the backbone
_IN_EXPORT = "backbone."  # and where the network has it
EXPORTED = "deformnet"
"""Key of the metadata of a safetensors file that marks it as the weights of a whole network."""

# Blocks of layer1 to layer4, and whether they have three convolutions.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "ResNet-18",
    ((3, 4, 6, 3), False): "ResNet-34",
    ((3, 4, 6, 3), True): "ResNet-50",
    ((3, 4, 23, 3), True): "ResNet-101",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a backbone from a file, or from a run of any network.

    Of a run it is the backbone alone, without the 1x1 convolution that reduces its channels for one
    network and not for another.

    Args:
        path: a PyTorch checkpoint, a safetensors file (of a backbone, or an exported run), or a run
            folder.
    Raises:
        FileNotFoundError: if there is no such file, or no checkpoint in the run folder.
        ValueError: if it is damaged, or holds no state dict.
    """
    if path.is_dir():
        if not (path / _RUN_CHECKPOINT).is_file():
            raise FileNotFoundError(f"{path}: not a trained run, there is no {_RUN_CHECKPOINT}")
        path = path / _RUN_CHECKPOINT
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        return _backbone_of(state, _IN_EXPORT) if EXPORTED in metadata else state
    content = _read(path)
    if isinstance(content, Mapping) and "deformnet" in content:
        return _backbone_of(content["state_dict"], _IN_CHECKPOINT)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = f"keys {', '.join(map(repr, list(content)[:3]))}"
        raise ValueError(f"weights: {path} holds no state dict but {found}")
    return dict(content)


def recorded_recipe(path: Path) -> Mapping[str, Any] | None:
    """The recipe of a run, in plain values; None for whatever is no run folder.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`.
    """
    if not path.is_dir() or not (path / _RUN_CHECKPOINT).is_file():
        return None
    content = _read(path / _RUN_CHECKPOINT)
    described = content.get("deformnet") if isinstance(content, Mapping) else None
    return None if described is None else described["recipe"]


def load_weights(model: Backbone, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads a state dict that may lack the new layers, and may have torchvision's classifier.

    Args:
        model: the backbone.
        state: by the names of its own state dict.
        source: where it comes from, for the messages.
    Raises:
        ValueError: if it is of another model.
    """
    problem = f"weights: {source} is not a {model.name} of this kind"
    found = architecture(state)
    if found not in (None, model.name):
        problem = f"weights: {source} is of {found}, wanted {model.name}"
    own = model.state_dict()
    # torchvision's older files have no counts of batches.
    missing = [
        key
        for key in own
        if key not in state
        and not key.endswith(".num_batches_tracked")
        and ".conv_offset." not in key
        and not key.startswith("reduce.")
    ]
    unexpected = [
        key
        for key in state
        if key not in own and not key.endswith(".num_batches_tracked") and not key.startswith("fc.")
    ]
    for what, keys in (("misses", missing), ("has besides", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{problem}: it {what} {keys[0]}{more}")
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(
                f"{problem}: {key} has shape {list(value.shape)}, wanted {list(own[key].shape)}"
            )
    model.load_state_dict(dict(state), strict=False)


def architecture(names: Iterable[str]) -> str | None:
    """The backbone whose state dict has these names, as `Backbone.name`, or None."""
    names = list(names)
    if any(name.startswith("stage5.") for name in names):
        return "Aligned-Inception-ResNet"
    blocks = tuple(
        len({name.split(".")[1] for name in names if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    return _RESNETS.get((blocks, any(".conv3." in name for name in names)))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is damaged, or no safetensors file") from error


def _backbone_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.startswith(f"{prefix}reduce.")
    }


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(
            f"weights: {path} is damaged, or no PyTorch checkpoint that holds tensors alone"
        ) from error
