"""The protocol of a task: everything that differs between segmentation, detection, classification.

A task opens data sets, and what it returns carries its own behavior: a `TrainingSet` makes batches,
a `Batch` computes its losses, an `EvaluationSet` scores a network, a `Predictor` takes images. The
layers above work with these alone and never see a task's samples.

A new task is one module: a subclass of `Task` with its sets and its predictor, and a line in
`deformnet.tasks.task_of`. Networks that give logits need less; see `deformnet.tasks.labeling`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from deformnet._errors import UserError
from deformnet._text import Table
from deformnet.data.files import listing
from deformnet.data.location import DataFiles, Location
from deformnet.data.splits import resolve
from deformnet.data.workers import TIMEOUT
from deformnet.recipes import Recipe, ScoreAt, TestTimeAugmentation
from deformnet.tasks.annotations import AnnotatedImages, Images, names_of
from deformnet.tasks.own import Data, place
from deformnet.tasks.predictor import Device, Predictor
from deformnet.visualization import save_figure

_MOST_CLASSES = 30_000
"""Memory grows with the number of classes: linearly for weights, quadratically for scores."""
_T = TypeVar("_T")
_RecipeT = TypeVar("_RecipeT", bound=Recipe)
_ImagesT = TypeVar("_ImagesT", bound=Images)


@dataclass(frozen=True)
class DataIdentity:
    """The training data of a run: a run continues only on the same data."""

    classes: tuple[str, ...]
    images: int
    digest: str
    proposals: bool = False
    """Whether a detector was trained on stored proposals, and needs them to be evaluated."""

    @classmethod
    def of(
        cls, classes: tuple[str, ...], names: Iterable[str], proposals: str | None = None
    ) -> "DataIdentity":
        """The identity of a data set with these classes and image names, in this order.

        The image names of a torch data set are indices, so only its classes and length identify it.
        `proposals` is the digest of a detector's stored proposals.
        """
        listed = list(names)
        parts = (*classes, "", *listed, *([] if proposals is None else ["", proposals]))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cls(classes, len(listed), digest, proposals is not None)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of evaluation and prediction; a task refuses those that do not apply to it."""

    score_at: ScoreAt = "original"
    augmentation: TestTimeAugmentation = TestTimeAugmentation()  # noqa: RUF009 (frozen)
    proposals: tuple[Path, ...] = ()
    """Files of stored proposals that replace a detector's own; see `deformnet.tasks.proposals`."""


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation; by default there is only this one."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    workers: int = 0
    """Processes that load images for this one; 0 loads them in this one."""
    progress: bool = False
    """Show a progress bar, in the first process."""
    rank: int = 0
    count: int = 1
    timeout: float = TIMEOUT
    """Seconds to wait for a process that loads images."""

    def gather(self, value: _T, /) -> list[_T]:
        """Picklable values (tensors on the CPU) of all processes by rank, in every process."""
        return [value]

    def stopping(self) -> bool:
        """Whether this process has been asked to stop; `gather` then ends the evaluation."""
        return False


class Batch(Protocol):
    """Samples that pass through the network together: a `NamedTuple` of tensors."""

    @property
    def images(self) -> Tensor:
        """[N, 3, H, W], normalized; smaller images are padded on the right and at the bottom.
        Or `maps` of a frozen backbone in their place."""
        ...

    def weight(self) -> Tensor | int:
        """Number of items that the losses are means over: images, or valid pixels."""
        ...

    def padded(self, height: int, width: int) -> Self:
        """The same batch with images of at least its own size."""
        ...

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """The terms of the loss by name, scalars; `model` is the network of the task's recipe."""
        ...


class Features(Protocol):
    """The features of a frozen backbone for all images of a training set."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image that the backbone has seen."""
        ...

    def read(self, index: int, *, flipped: bool) -> Tensor:
        """The backbone's `maps` of the image, or of its horizontal flip: float16 [C, H, W]."""
        ...


class TrainingSet(ABC):
    """Images with ground truth to train on, randomly transformed.

    Args:
        images: the data set.
        proposals: digest of the stored proposals of a detector.
    Attributes:
        identity: what a run remembers of the data.
        groups: a number for each image, if a batch should hold images of one number only.
        features: what stands for the images in batches; None for the images themselves.
    """

    groups: Sequence[int] | None = None
    features: Features | None = None

    def __init__(self, images: Images, proposals: str | None = None) -> None:
        self.identity = DataIdentity.of(images.classes, names_of(images), proposals)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.identity.classes

    def __len__(self) -> int:
        return self.identity.images

    def summary(self) -> list[str]:
        """Lines that summarize the ground truth before training, such as boxes by class."""
        return []

    def input(self, index: int) -> Tensor:
        """The image of an index as the network sees it without random transforms, [3, h, w].

        For feature caches, which classification, always trained on random crops, cannot use.
        """
        raise NotImplementedError

    @abstractmethod
    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        """The images of these indices as a batch; the seeds decide all randomness; see `seeded`."""


Pictures = Mapping[str, Callable[[], Figure]]


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation, the same in every process.

    Attributes:
        json: entries of `metrics.json`: fractions from 0 to 1, None instead of NaN.
        table: scores in percent, by class if there are any; the title names the metric.
        summary: scores in percent, by the names in the paper's tables ("mean IoU", "mAP@0.5").
        main: name and value in percent of the score that selects the best network of a run; higher
            is better, None if there is nothing to score.
        details: further scores in percent.
        pictures: functions that draw the scores, by file name without suffix.
    """

    json: dict[str, object]
    table: Table
    summary: dict[str, float | None]
    main: tuple[str, float | None] = field(default=("score", None), kw_only=True)
    details: tuple[Table, ...] = field(default=(), kw_only=True)
    pictures: Pictures = field(default_factory=dict, kw_only=True, compare=False, repr=False)

    def save(self, folder: Path, suffix: str = "") -> dict[str, str]:
        """Writes the pictures, and the predictions that were scored, if the task keeps them.

        Args:
            suffix: ending of the file names, such as "-val".
        Returns:
            Further entries of `metrics.json`.
        """
        for name, draw in self.pictures.items():
            save_figure(draw(), folder / f"{name}{suffix}.png")
        return {}


class EvaluationSet(ABC):
    """Images to score a network on; those without published ground truth give predictions only."""

    def __init__(self, images: Images) -> None:
        self.classes = images.classes
        self.names = names_of(images)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def evaluate(self, model: nn.Module, processes: Processes) -> Scores:
        """Scores a network in processes that share the images; all of them call this method.

        Any number of processes gives the same scores to the last bit.
        """


class ProposalSet(ABC):
    """Images for which a detector makes proposals."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def write(self, model: nn.Module, path: Path, processes: Processes) -> None:
        """Writes the proposals into a file, in the first process."""


@dataclass(frozen=True)
class Whole:
    """A network with its post-processing, to be exported as one module.

    Attributes:
        module: takes normalized images [N, 3, H, W].
        outputs: names of the tensors that it returns.
        one_image: whether N has to be 1.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    one_image: bool = False


class Task(ABC, Generic[_RecipeT, _ImagesT]):
    """What a kind of network is trained and evaluated for.

    Args:
        recipe: of a network for this task.
        options: of evaluation and prediction.
    Attributes:
        accepts: names of the options that this task has.
        loss_terms: names of the terms of the loss, if there are several.
        localizes: whether its networks locate objects, so that their sampling can be analyzed
            object by object.
        pipeline_tag: name of the task on the Hugging Face Hub.
    """

    accepts: ClassVar[tuple[str, ...]] = ()
    loss_terms: tuple[str, ...] = ()
    localizes: ClassVar[bool] = True
    pipeline_tag: ClassVar[str]

    def __init__(self, recipe: _RecipeT, options: TaskOptions) -> None:
        defaults = TaskOptions()
        for option in fields(options):
            changed = getattr(options, option.name) != getattr(defaults, option.name)
            if changed and option.name not in self.accepts:
                raise UserError(f"{option.name} does not apply to {recipe.network}")
        self.recipe = recipe
        self.network = recipe.network
        self.options = options

    def splits(self, data: Data) -> list[str]:
        """The splits of a data set; empty for a torch data set, which accepts any name."""
        return self._splits(data) if isinstance(data, Location) else []

    def training_set(self, data: Data, split: str = "train") -> TrainingSet:
        """Opens images to train on.

        Args:
            data: folder of a data set, or a torch data set (see `deformnet.tasks.own`).
            split: split of the folder; a torch data set has none.
        Raises:
            UserError: also if there is nothing to learn from, such as objects or labeled pixels.
        """
        return self._training_set(self._opened(data, split))

    def validation(
        self, data: Data, val_data: Data | None, split: str | None
    ) -> tuple[Data, str] | None:
        """The data set and the split to validate on; None if there are none.

        Args:
            data: the training data.
            val_data: the validation data, if they are elsewhere.
            split: the split; None for no validation. The default, `val`, may be missing.
        """
        if split is None:
            return None
        if val_data is not None:
            # Images and annotations that lie apart are one split.
            apart = isinstance(val_data, DataFiles) and split == "val"
            return val_data, "train" if apart else split
        if not isinstance(data, Location):
            return None
        splits = self.splits(data)
        return None if split == "val" and resolve(splits, split) not in splits else (data, split)

    def evaluation_set(
        self, data: Data, split: str = "val", trained_on: DataIdentity | None = None
    ) -> EvaluationSet:
        """Opens images to score a network on, with the classes that it was `trained_on`."""
        return self._evaluation_set(self._checked(data, split, trained_on))

    def proposal_set(self, data: Data, split: str, trained_on: DataIdentity) -> ProposalSet:
        """Opens images to make proposals for; for detectors only."""
        raise UserError(f"expected a detector, which makes proposals, but got {self.network}")

    def annotated(
        self, data: Data, split: str = "val", trained_on: DataIdentity | None = None
    ) -> AnnotatedImages:
        """Opens images with ground truth to look at; arguments as of `evaluation_set`."""
        return self._annotated(self._checked(data, split, trained_on))

    @abstractmethod
    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> Predictor:
        """The predictor of a trained network; see `Predictor` for `device`."""

    def whole(self, model: nn.Module, trained_on: DataIdentity, *, resize: bool = True) -> Whole:
        """A trained network with its post-processing as one module, to be exported.

        Args:
            model: the network.
            trained_on: its training data.
            resize: for DeepLab: whether the logits are upsampled to the size of the images.
        Raises:
            UserError: if the network does not support an option.
        """
        if not resize:
            raise UserError(f"expected resize to be True for {self.network}, but got False")
        return Whole(model, ("logits",))

    def whole_predictor(
        self, module: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> Predictor:
        """The predictor for a module from `whole`, after it was exported and loaded again."""
        return self.predictor(module, trained_on, device)

    def freeze(self, model: nn.Module) -> None:
        """Excludes from training the parts of the network that learn nothing in this task."""

    @abstractmethod
    def _splits(self, data: Location) -> list[str]: ...

    @abstractmethod
    def _open(self, data: Location, split: str) -> _ImagesT:
        """Opens a stored data set."""

    @abstractmethod
    def _own(self, data: Dataset[Any]) -> _ImagesT:
        """Opens a torch data set."""

    @abstractmethod
    def _training_set(self, images: _ImagesT) -> TrainingSet: ...

    @abstractmethod
    def _evaluation_set(self, images: _ImagesT) -> EvaluationSet: ...

    @abstractmethod
    def _annotated(self, images: _ImagesT) -> AnnotatedImages: ...

    def _opened(self, data: Data, split: str) -> _ImagesT:
        images = self._open(data, split) if isinstance(data, Location) else self._own(data)
        if len(images.classes) > _MOST_CLASSES:
            raise UserError(
                f"{place(data)}: expected at most {_MOST_CLASSES} classes, but got "
                f"{len(images.classes)}"
            )
        return images

    def _checked(self, data: Data, split: str, trained_on: DataIdentity | None) -> _ImagesT:
        """The data set, if it has the classes that a network was trained on."""
        images = self._opened(data, split)
        if trained_on is not None and tuple(images.classes) != tuple(trained_on.classes):
            raise UserError(
                f"{place(data)}: expected the classes that the network was trained on "
                f"({listing(trained_on.classes)}), but got {listing(images.classes)}"
            )
        return images


def seeded(make: Callable[[int], _T], indices: Sequence[int], seeds: Sequence[int]) -> list[_T]:
    """Calls `make` for each index with torch's generator seeded; its state is restored."""
    samples = []
    with torch.random.fork_rng(devices=[]):
        for index, seed in zip(indices, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            samples.append(make(index))
    return samples
