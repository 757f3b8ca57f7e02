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

from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import matching, read_json, replacing, to_json, write_file
from deformnet.engine.runs import card_path, describe, load_run, versions
from deformnet.models._tensors import pack
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
        UserError: if `out` does not end in .safetensors, NAME.json exists and is not a card, or the
            checkpoint or a file of scores is damaged.
        OSError: if a file cannot be written.
    """
    run, out = Path(run), Path(out)
    _require_safetensors(out)
    _require_card(card_path(out))
    if run.is_file():
        raise UserError(f"{run}: expected a run folder, but got a file")
    recipe, model, data = load_run(run)
    metrics = {path.name: _scores(path) for path in sorted(matching(run, "metrics*.json"))}
    content = pack(model.state_dict(), {"format": "pt", EXPORTED: recipe.network})
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
    # A full disk leaves both files unchanged. If the process is killed between the two renames, the
    # old card does not fit the weights, which is an error when they are read.
    with replacing(card_path(out)) as described, replacing(out) as file:
        described.write(to_json(card))
        described.flush()
        file.write(content)
    return card_path(out)


def write_weights(state: Mapping[str, Tensor], out: str | Path) -> None:
    """Writes the state dict of a backbone, for `weights` of the backbones and `init` of recipes.

    Raises:
        UserError: if `out` is not called .safetensors.
        OSError: if it cannot be written.
    """
    _require_safetensors(out := Path(out))
    write_file(out, pack(state, {"format": "pt"}))


def _require_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"out: expected a file NAME.safetensors, but got {out}")


def _require_card(path: Path) -> None:
    """Refuses to replace another JSON file, such as the recipe.json of a run."""
    if not path.exists():
        return
    content = read_json(path)
    if not isinstance(content, dict) or not {"weights", "sha256", "recipe"} <= set(content):
        raise UserError(
            f"{path}: expected a new file or the card of an exported run, but got another file, "
            "which was not changed; choose another name"
        )


def _scores(path: Path) -> dict[str, object]:
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected a JSON object, but got {type(scores).__name__}")
    return scores
