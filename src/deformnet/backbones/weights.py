"""Starting weights of a backbone: files, run folders, and what they must hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deformnet.backbones.features import Backbone

_RUN_CHECKPOINT = Path("checkpoints/last.ckpt")
_OF_BACKBONE = "model.backbone."  # where the checkpoint of a run has the backbone


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a backbone from a file, or from the run folder of any network.

    Of a run it is the backbone alone, without the 1x1 convolution that reduces its channels for one
    network and not for another.

    Raises:
        FileNotFoundError: if there is no such file, or no checkpoint in the run folder.
        ValueError: if it is damaged, or holds no state dict.
    """
    if path.is_dir():
        if not (path / _RUN_CHECKPOINT).is_file():
            raise FileNotFoundError(f"{path}: not a trained run, there is no {_RUN_CHECKPOINT}")
        path = path / _RUN_CHECKPOINT
    content = _read(path)
    if isinstance(content, Mapping) and "deformnet" in content:
        return {
            key.removeprefix(_OF_BACKBONE): value
            for key, value in content["state_dict"].items()
            if key.startswith(_OF_BACKBONE) and not key.startswith(f"{_OF_BACKBONE}reduce.")
        }
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = type(content).__name__
        if isinstance(content, Mapping):
            found = f"keys {', '.join(map(repr, list(content)[:3]))}"
        raise ValueError(f"weights: {path} holds no state dict but {found}")
    return dict(content)


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


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything on a damaged file
        raise ValueError(
            f"weights: {path} is damaged, or no PyTorch checkpoint that holds tensors alone"
        ) from error
