"""Exports a trained network as three files, to keep or to share: the weights and two cards.

```
NAME.safetensors        the network's weights
NAME.json               the card: recipe, training data, scores, versions, sha256 of the weights
NAME.md                 the model card, for readers; README.md for model.safetensors
```

`deformnet.engine.load_run` and `load` accept NAME.safetensors instead of a run folder; NAME.json
has to be in the same folder. A folder with model.safetensors, model.json and README.md can be
uploaded to the Hugging Face Hub as is; see `deformnet.engine.HubModel`.
"""

import hashlib
import io
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import (
    matching,
    read_file,
    read_json,
    refuse_overwrite,
    replacing,
    to_json,
    write_file,
)
from deformnet._hub import WEIGHTS, local
from deformnet.engine.model_card import model_card
from deformnet.engine.runs import (
    TrainedRun,
    card_path,
    describe,
    load_run,
    require_folder,
    versions,
)
from deformnet.models._tensors import pack
from deformnet.models.backbones.weights import EXPORTED


class Facts(NamedTuple):
    """The content of a card besides the recipe and the data."""

    metrics: Mapping[str, Mapping[str, object]]
    """Content of every metrics*.json, by file name."""
    versions: Mapping[str, object]


def export_run(run: str | Path, out: str | Path) -> Path:
    """Writes the network of a run as safetensors, with its card and model card in the same folder.

    The card contains `sha256`, that of the weights; `recipe`; `data`, with the classes, the number
    of images and a digest of their names; `metrics`, the content of every metrics*.json of the run;
    `versions` of Python, the packages and deformnet's commit, at training ("trained", None for an
    unfinished run) and now ("exported"); and `model_card`, the sha256 of the model card. A model
    card that has been edited since it was written is kept, with a warning.

    Args:
        run: run folder, finished or not.
        out: NAME.safetensors.
    Returns:
        The path of the card.
    Raises:
        FileNotFoundError: if there is no such run, or it has no checkpoint.
        UserError: if `run` is not a run folder, `out` does not end in .safetensors or is the
            network in `run`, NAME.json exists and is not a card, or the checkpoint or a file of
            scores is damaged.
        OSError: if a file cannot be written.
    """
    run = Path(run)
    _require_safetensors(Path(out))
    _existing_card(Path(out))
    require_folder(run)
    refuse_overwrite(Path(out), [local(run)])
    return write_export(load_run(run), facts_of(run), Path(out))


def facts_of(run: Path) -> Facts:
    """The scores and versions of a run folder."""
    metrics = {path.name: _scores(path) for path in sorted(matching(run, "metrics*.json"))}
    trained = metrics.get("metrics.json", {}).get("versions")
    return Facts(metrics, {"trained": trained, "exported": versions()})


def write_export(trained: TrainedRun, facts: Facts, out: Path) -> Path:
    """Writes the files of an exported run; see `export_run`.

    Args:
        trained: the network, its recipe and its data.
        facts: the rest of the card.
        out: NAME.safetensors.
    Returns:
        The path of the card.
    """
    old = _existing_card(out)
    recipe, model, data = trained
    content = pack(model.state_dict(), {"format": "pt", EXPORTED: recipe.network})
    text = model_card(out.name, trained, facts.metrics).encode()
    card = {
        "weights": out.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        **describe(recipe, data),
        **facts._asdict(),
        "model_card": hashlib.sha256(text).hexdigest(),
    }
    words = model_card_path(out)
    kept = words.exists() and hashlib.sha256(read_file(words)).hexdigest() != old.get("model_card")
    # A full disk leaves all files unchanged. If the process is killed between the renames, the
    # old card does not match the new weights, and reading them raises an error.
    with (
        replacing(card_path(out)) as described,
        nullcontext(io.BytesIO()) if kept else replacing(words) as worded,
        replacing(out) as file,
    ):
        described.write(to_json(card))
        described.flush()
        worded.write(text)
        worded.flush()
        file.write(content)
    if kept:
        warnings.warn(
            f"{words}: kept, because it has been edited; delete it and export again to replace it",
            stacklevel=2,
        )
    return card_path(out)


def model_card_path(weights: Path) -> Path:
    """Path of the model card of exported weights: README.md for model.safetensors, else NAME.md."""
    return weights.with_name("README.md") if weights.name == WEIGHTS else weights.with_suffix(".md")


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


def _existing_card(out: Path) -> dict[str, object]:
    """The card that will be replaced; empty if there is none.

    Raises:
        UserError: if it is another JSON file, such as the recipe.json of a run.
    """
    path = card_path(out)
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not {"weights", "sha256", "recipe"} <= set(content):
        raise UserError(
            f"{path}: expected a new file or the card of an exported run, but got another file, "
            "which was not changed; choose another name"
        )
    return content


def _scores(path: Path) -> dict[str, object]:
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected a JSON object, but got {type(scores).__name__}")
    return scores
