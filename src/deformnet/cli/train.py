"""The commands that train a network: one for each recipe, with its fields as options in groups."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from deformnet import recipes
from deformnet.cli.options import GROUP, options
from deformnet.cli.scores import print_once
from deformnet.engine.settings import Hardware, LoopOptions
from deformnet.recipes import Recipe

NETWORKS: tuple[tuple[type[Recipe], str], ...] = (
    (recipes.DeepLabRecipe, "Train DeepLab for semantic segmentation."),
    (recipes.RFCNRecipe, "Train R-FCN for object detection."),
    (recipes.FasterRCNNRecipe, "Train Faster R-CNN for object detection."),
    (recipes.ClassAwareRPNRecipe, "Train a class-aware RPN, a one-stage object detector."),
    (recipes.RPNRecipe, "Train a region proposal network on its own, for `deformnet propose`."),
    (
        recipes.ClassifierRecipe,
        "Train an image classifier, to pretrain a backbone for other networks.",
    ),
)

# The groups of `--help`; all other fields of a recipe belong to the network.
_IMAGES = {"short_side", "max_side", "crop", "resize", "test_short_side", "flip", "color_jitter"}
_SCHEDULE = {
    *("batch", "iterations", "lr", "offset_lr_scale", "momentum", "weight_decay", "warmup"),
    *("clip", "precision", "seed"),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    data: Path
    """Data set folder: images with label maps or boxes in VOC, Cityscapes or COCO layout, or
    DATA/SPLIT/CLASS/IMAGE for classification."""
    split: str = "train"
    """Training split."""
    val_split: str | None = "val"
    """Validation split, evaluated after training; None skips it."""

    @property
    def proposals(self) -> tuple[Path, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class DataWithProposals(Data):
    stored_proposals: tuple[Path, ...] = ()
    """Proposal files written by `deformnet propose`, for both splits, to use instead of the
    network's own proposals."""

    @property
    def proposals(self) -> tuple[Path, ...]:
        return self.stored_proposals


@dataclass(frozen=True, kw_only=True)
class Run:
    out: Path
    """Run folder: recipe, checkpoint, logs and scores. If it contains an interrupted run, training
    resumes."""
    recipe: Path | None = None
    """JSON file of a recipe, such as recipe.json of another run; its values replace the defaults
    below."""


def train_command(recipe: type[Recipe], what: str, arguments: Sequence[str]) -> Callable[..., None]:
    """The command that trains a network; defaults are those of the recipe file in `arguments`."""
    if recipe.network not in arguments:

        def unused() -> None: ...

        unused.__doc__ = what
        return unused
    base = _base_recipe(recipe, arguments)
    rest = {field.name for field in dataclasses.fields(recipe)} - _IMAGES - _SCHEDULE

    def command(
        data: Any,
        run: Annotated[Run, GROUP],
        network: Any,
        schedule: Any,
        loop: Annotated[LoopOptions, GROUP] = LoopOptions(),  # noqa: B008 (both are frozen)
        hardware: Annotated[Hardware, GROUP] = Hardware(),  # noqa: B008
    ) -> None:
        from deformnet.engine import train

        images = {name: value for name, value in vars(data).items() if name in _IMAGES}
        settings = images | vars(network) | vars(schedule)
        result = train(
            dataclasses.replace(base, **settings),
            data.data,
            run.out,
            split=data.split,
            val_split=data.val_split,
            proposals=data.proposals,
            loop=loop,
            hardware=hardware,
        )
        print_once(result)

    command.__doc__ = f"{what} Repeat the command to resume an interrupted run."
    files = DataWithProposals if recipe.takes_proposals else Data
    command.__annotations__ |= {
        "data": Annotated[options("Data", base, _IMAGES, files), GROUP],
        "network": Annotated[options("Network", base, rest), GROUP],
        "schedule": Annotated[options("Schedule", base, _SCHEDULE), GROUP],
    }
    return command


def _base_recipe(recipe: type[Recipe], arguments: Sequence[str]) -> Recipe:
    """The recipe that `train NETWORK --recipe FILE` names, or the default one of the network."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path)
    known, _ = parser.parse_known_args(arguments)
    return recipe() if known.recipe is None else recipe.load(known.recipe)
