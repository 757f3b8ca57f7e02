"""A trained network in two files, to keep or to hand on: its weights, and a card about them.

```
NAME.safetensors        the network's weights
NAME.json               the card: recipe, training data, scores, versions, sha256 of the weights
```

`deformnet.engine.load_run` and `load` take NAME.safetensors in place of a run folder.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import read_json, replacing, write_json
from deformnet.engine.runs import card_path, describe, load_run, versions
from deformnet.models.backbones.weights import EXPORTED


def export_run(run: str | Path, out: str | Path) -> Path:
    """Writes the network of a run as safetensors, and its card beside it.

    The card has `sha256` of the weights; `recipe`; `data`, with the classes, the number of images
    and a digest of their names; `metrics`, the content of every metrics*.json of the run; and
    `versions` of Python, the packages and deformnet's commit, at training ("trained", None for an
    unfinished run) and now ("exported").

    Args:
        run: run folder, finished or not.
        out: NAME.safetensors.
    Returns:
        The path of the card.
    Raises:
        FileNotFoundError: if there is no such run, or it has no checkpoint.
        UserError: if `out` is not called .safetensors, or the checkpoint or a file of scores is
            damaged.
        OSError: if a file cannot be written.
    """
    run, out = Path(run), Path(out)
    _require_safetensors(out)
    if run.is_file():
        raise UserError(f"{run}: expected a run folder, but got a file")
    recipe, model, data = load_run(run)
    # `glob` would take a folder that cannot be read for an empty one.
    files = sorted(path for path in run.iterdir() if path.match("metrics*.json"))
    metrics = {path.name: _scores(path) for path in files}
    content = _packed(model.state_dict(), {EXPORTED: recipe.network})
    card = {
        "weights": out.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        **describe(recipe, data),
        "metrics": metrics,
        "versions": {
            "trained": metrics.get("metrics.json", {}).get("versions"),
            "exported": versions(),
        },
    }
    with replacing(out) as file:
        file.write(content)
    # If this fails, an older card does not fit the weights, and reading them says so.
    write_json(card_path(out), card)
    return card_path(out)


def write_weights(state: Mapping[str, Tensor], out: str | Path) -> None:
    """Writes the state dict of a backbone, for `weights` of the backbones and `init` of recipes.

    Raises:
        UserError: if `out` is not called .safetensors.
        OSError: if it cannot be written.
    """
    _require_safetensors(out := Path(out))
    with replacing(out) as file:
        file.write(_packed(state, {}))


def _require_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"out: expected a file NAME.safetensors, but got {out}")


def _packed(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    return save(tensors, metadata={"format": "pt", **metadata})


def _scores(path: Path) -> dict[str, object]:
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected a JSON object, but got {type(scores).__name__}")
    return scores
