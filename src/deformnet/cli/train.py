"""The commands that train a network: one for each recipe, with its fields as options in groups."""

import dataclasses
import logging
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from deformnet import recipes
from deformnet._errors import UserError
from deformnet._files import read_json
from deformnet._hub import local
from deformnet.cli.options import GROUP, location, options
from deformnet.cli.scores import print_once, printing_unsaved
from deformnet.engine.settings import Hardware, LoopOptions
from deformnet.recipes import Recipe

if typing.TYPE_CHECKING:
    from deformnet.data.location import Location

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
_IMAGES = {
    *("short_side", "max_side", "crop", "resize", "test_short_side", "orientation"),
    *("flip", "scale_jitter", "color_jitter"),
}
_SCHEDULE = {
    *("batch", "iterations", "optimizer", "schedule", "lr", "offset_lr_scale", "momentum"),
    *("weight_decay", "warmup", "clip", "ema", "precision", "seed"),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    data: Path | None = None
    """Data set folder in any layout that `deformnet data check` recognizes: images with boxes for
    detectors, images with masks or polygons for DeepLab, or class folders for the classifier."""
    images: Path | None = None
    """Folder of training images whose annotations are stored elsewhere; use with --annotations
    instead of --data."""
    annotations: Path | None = None
    """Annotations for --images: a COCO JSON file, or a folder of XML, YOLO, labelme or mask
    files."""
    val_images: Path | None = None
    """Folder of validation images that are not in --data; use with --val-annotations."""
    val_annotations: Path | None = None
    """Annotations for --val-images."""
    split: str = "train"
    """Training split."""
    val_split: str | None = "val"
    """Validation split; None skips validation."""
    val_fraction: float | None = None
    """Fraction of the training split to hold out for validation (the same images in every run);
    None uses the validation split."""

    @property
    def locations(self) -> "tuple[Location, Location | None]":
        """Locations of the training data, and of the validation data if they are separate."""
        training = location(self.data, self.images, self.annotations, "--data")
        if self.val_images is None and self.val_annotations is None:
            return training, None
        return training, location(None, self.val_images, self.val_annotations, "", prefix="val-")

    @property
    def splits(self) -> tuple[str, str | None]:
        """Names of the training and the validation split."""
        if self.val_fraction is not None:
            fraction = f"{self.val_fraction}"
            return f"{self.split}[without={fraction}]", f"{self.split}[held-out={fraction}]"
        # Images with annotations stored elsewhere have a single split.
        return self.split, self.val_split if self.val_images is None else "train"

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
    """Run folder: recipe, checkpoints, logs and scores. If it contains an interrupted run, training
    resumes."""
    recipe: str | None = None
    """Base settings, which the options below override: finetune (your own data, from pretrained
    weights), scratch (random weights), paper (the paper's settings on VOC or ImageNet), or a JSON
    file such as recipe.json of another run. None uses the settings of the run in OUT if there is
    one, and finetune otherwise."""
    epochs: float | None = None
    """Number of passes over the training images, instead of --iterations; None uses
    --iterations."""
    continue_to: int | None = None
    """Total number of iterations to train the run in OUT for, whether finished or not; None uses
    the number in its recipe."""


def train_command(recipe: type[Recipe], what: str, arguments: Sequence[str]) -> Callable[..., None]:
    """The command that trains a network; defaults are those of the recipe file in `arguments`."""
    if recipe.network not in arguments:

        def unused() -> None: ...

        unused.__doc__ = what
        return unused
    base = _base_recipe(recipe, arguments)
    # With an explicit recipe, validation during training is off unless requested.
    loops = LoopOptions(validate_every=None if _given("recipe", arguments) else "auto")
    rest = {field.name for field in dataclasses.fields(recipe)} - _IMAGES - _SCHEDULE

    def command(
        data: Any,
        run: Annotated[Run, GROUP],
        network: Any,
        schedule: Any,
        loop: Annotated[LoopOptions, GROUP] = loops,
        hardware: Annotated[Hardware, GROUP] = Hardware(),  # noqa: B008 (frozen)
    ) -> None:
        from deformnet.engine import train

        images = {name: value for name, value in vars(data).items() if name in _IMAGES}
        settings = images | vars(network) | vars(schedule)
        if str(settings["init"]).lower() == "none":
            settings["init"] = None
        (place, val_place), (split, val_split) = data.locations, data.splits
        with printing_unsaved(), _printed_log():
            result = train(
                dataclasses.replace(base, **settings),
                place,
                run.out,
                split=split,
                val_split=val_split,
                val_data=val_place,
                proposals=data.proposals,
                epochs=run.epochs,
                continue_to=run.continue_to,
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
    """The recipe that provides the defaults of the options; see `Run.recipe`."""
    if _given("epochs", arguments) and _given("iterations", arguments):
        raise UserError("expected --epochs or --iterations, but got both")
    match _given("recipe", arguments), _given("out", arguments):
        case "scratch", _:
            return recipe()
        case "paper", _:
            return recipe.published()
        case None, str(out) if (path := Path(out) / "recipe.json").is_file():
            return recipe.load(path)
        case None | "finetune", _:
            return _finetune(recipe, arguments)
        case file, _:
            return recipe.load(file)


def _finetune(recipe: type[Recipe], arguments: Sequence[str]) -> Recipe:
    """Fine-tuning settings for the data, backbone and machine given by the arguments."""
    backbone, batch = _given("backbone", arguments), _given("batch", arguments)
    if backbone is None or not (backbone in recipes.BACKBONES or backbone.startswith("timm/")):
        backbone = "resnet50"  # unknown names raise an error later
    init = _given("init", arguments) or recipes.published_weights(backbone) or "none"
    settings: dict[str, Any] = {
        "backbone": backbone,
        "init": None if init.lower() == "none" else init,
        "batch": int(batch) if batch is not None and batch.isdecimal() and int(batch) else None,
    }
    data, images, annotations = (
        None if (given := _given(name, arguments)) is None else Path(given)
        for name in ("data", "images", "annotations")
    )
    if (data is None and images is None) or {"-h", "--help"} & set(arguments):
        found = recipes.finetune(recipe, images=200, **settings)
    else:
        from deformnet.engine import finetune_on

        place = location(data, images, annotations, "--data")
        hardware = Hardware(
            accelerator="cpu" if _given("accelerator", arguments) == "cpu" else "auto"
        )
        split = _given("split", arguments) or "train"
        found = finetune_on(recipe, place, split=split, hardware=hardware, **settings)
    start = _given("init", arguments)
    return found if start is None else _shaped_like(found, local(start))


def _shaped_like(recipe: Recipe, run: Path) -> Recipe:
    """The recipe, with the network settings of the run that its initial weights come from."""
    file = run / "recipe.json"
    if file.is_file():
        old = Recipe.load(file)
    elif run.suffix == ".safetensors" and run.is_file():
        card = run.with_suffix(".json")
        content = read_json(card) if card.is_file() else None
        described = content.get("recipe") if isinstance(content, dict) else None
        if not isinstance(described, dict):
            return recipe  # not a card; an error follows when the weights are read
        old = recipes.recipe_from_dict(described, source=card)
    else:
        return recipe
    names = {
        *("backbone", "stride_in_1x1", "neck", "neck_layers", "neck_channels"),
        *("deform_layers", "offset_groups", "modulated", "offset_conv"),
    }
    if old.network == recipe.network:
        names = {field.name for field in dataclasses.fields(old)} - _IMAGES - _SCHEDULE
    changes = {name: getattr(old, name) for name in names - {"init", "norm"}}
    return dataclasses.replace(recipe, **changes)


def _given(name: str, arguments: Sequence[str]) -> str | None:
    """The value of an option in the unparsed arguments; None if it is missing."""
    given = None
    for word, following in zip(arguments, (*arguments[1:], None), strict=True):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == f"--{name}":
            given = value if equals else following
    return given


@contextmanager
def _printed_log() -> Iterator[None]:
    """Prints the log of the run line by line, without breaking the progress bar."""
    from tqdm import tqdm

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record))

    logger, lines = logging.getLogger("deformnet"), Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
