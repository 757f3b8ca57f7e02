"""Sharing of trained networks on the Hugging Face Hub."""

from pathlib import Path
from typing import Self

from deformnet._errors import UserError, require_extra

require_extra("deformnet.engine.HubModel", "models", "huggingface_hub")

from huggingface_hub import ModelHubMixin

from deformnet._files import read_json
from deformnet._hub import WEIGHTS, download, local
from deformnet.engine.export import Facts, facts_of, write_export
from deformnet.engine.runs import card_path, load_run
from deformnet.tasks import task_of
from deformnet.tasks.predictor import Device, Predictor


class HubModel(ModelHubMixin):
    """A trained network with the methods of `huggingface_hub.ModelHubMixin`.

        >>> HubModel("runs/cells").push_to_hub("me/cells", private=True)
        >>> predictor = HubModel.from_pretrained("me/cells").predictor()
        >>> predictor = deformnet.load("hf://me/cells")  # the same

    `push_to_hub(repo)` uploads the files that `save_pretrained(folder)` writes: model.safetensors,
    model.json and README.md, the same as `deformnet export RUN FOLDER/model.safetensors`.

    Args:
        run: run folder, or an exported run; see `deformnet.load`.
    Attributes:
        trained: recipe, network (`trained.model`) and identity of the training data.
    Raises:
        FileNotFoundError, UserError, OSError: see `deformnet.engine.load_run`.
    """

    def __init__(self, run: str | Path) -> None:
        path = local(run)
        self.trained = load_run(path)
        is_exported = path.suffix == ".safetensors"
        self._facts = _exported_facts(card_path(path)) if is_exported else facts_of(path)
        self._hub_mixin_config = None  # the card contains the configuration

    def predictor(self, device: Device = None) -> Predictor:
        """Returns a predictor, as `deformnet.load` does."""
        recipe, model, data = self.trained
        return task_of(recipe).predictor(model, data, device)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_export(self.trained, self._facts, save_directory / WEIGHTS)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (no model_kwargs)
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Loads a network from a folder, or from the Hub, from which it is downloaded once.

        Args:
            pretrained_model_name_or_path: OWNER/REPO, or a folder written by `save_pretrained`.
            force_download: download files even if they are in the cache.
            token: access token; None uses the one saved by `hf auth login`.
            cache_dir: cache folder; None uses that of huggingface_hub.
            local_files_only: use only the cache, without downloading.
            revision: branch, tag or commit; None uses the main branch.
        Raises:
            FileNotFoundError: if there is no such repository, revision or file.
            UserError: if a file is damaged, or does not belong to an exported run.
            OSError: if the download fails.
        """
        name = pretrained_model_name_or_path
        if Path(name).is_dir():
            return cls(name)
        weights = download(
            str(name),
            revision,
            cache_dir=cache_dir,
            force=force_download,
            local_only=local_files_only,
            token=token,
        )
        return cls(weights)


def _exported_facts(card: Path) -> Facts:
    """The facts in a card that `load_run` has already checked."""
    content = read_json(card)
    facts = Facts(content.get("metrics", {}), content.get("versions", {}))
    if not all(isinstance(part, dict) for part in (*facts, *facts.metrics.values())):
        raise UserError(f"{card}: expected scores and versions by name, but it is damaged")
    return facts
