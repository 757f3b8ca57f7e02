"""Image classification: a class for every image."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from deformnet._files import replacing
from deformnet._text import Table, percent
from deformnet.data.image_folder import ImageFolderClassification, image_folder_splits
from deformnet.data.transforms import (
    Resize,
    classification_evaluation_transforms,
    classification_training_transforms,
)
from deformnet.metrics.classification import (
    ClassificationCounts,
    ClassificationScores,
    classification_scores,
)
from deformnet.recipes import ClassifierRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation
from deformnet.tasks.base import (
    DataIdentity,
    EvaluationSet,
    Processes,
    Scores,
    Task,
    TaskOptions,
    TrainingSet,
    require_classes,
    seeded,
)
from deformnet.tasks.images import read_images, require_image
from deformnet.tasks.loading import shared
from deformnet.tasks.predictor import Inference, Predictor, Prepared, Size, ready

_BEST = 5  # classes of an image that are written


class _Network(Protocol):
    """What a recipe of this task builds."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Logits [N, C]."""
        ...

    def losses(self, logits: Tensor, labels: Tensor, /) -> dict[str, Tensor]: ...


class Batch(NamedTuple):
    """Images and classes.

    Attributes:
        images: [N, 3, crop, crop]
        labels: int64 [N]
    """

    images: Tensor
    labels: Tensor

    def weight(self) -> int:
        """Number of images."""
        return len(self.labels)

    def padded(self, height: int, width: int) -> NoReturn:
        raise AssertionError(f"all crops have one size, but got another of {height} x {width}")

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        network = cast(_Network, model)
        logits = network(self.images.contiguous(memory_format=torch.channels_last))
        return network.losses(logits, self.labels)


class ClassificationTrainingSet(TrainingSet):
    """Images and classes with random transforms."""

    def __init__(self, recipe: ClassifierRecipe, images: ImageFolderClassification) -> None:
        self.identity = DataIdentity.of(images.classes, map(images.name, range(len(images))))
        self._images = images
        self._transforms = classification_training_transforms(
            resize=recipe.resize,
            crop=recipe.crop,
            flip=recipe.flip,
            color_jitter=recipe.color_jitter,
        )

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        images, labels = zip(*seeded(self._sample, indices, seeds), strict=True)
        return Batch(torch.stack(images), torch.tensor(labels))

    def _sample(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        return self._transforms(tv_tensors.Image(image)), label


class ClassificationEvaluationSet(EvaluationSet):
    """Images, the square that the network sees, each with its class."""

    def __init__(self, recipe: ClassifierRecipe, images: ImageFolderClassification) -> None:
        super().__init__(images)
        self._images = images
        self._transforms = classification_evaluation_transforms(
            short_side=recipe.test_short_side, crop=recipe.crop
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._images[index]
        return self._transforms(tv_tensors.Image(image)), torch.tensor([label])

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, processes: Processes, *, workers: int = 0, progress: bool = False
    ) -> "ClassificationResult":
        network = cast(_Network, ready(model, processes.device))
        counts = ClassificationCounts(len(self.classes), sync=False).to(processes.device)
        for _, sample in shared(self, processes, workers=workers, progress=progress):
            image, label = (part.to(processes.device) for part in sample)
            counts.update(network(image[None].contiguous(memory_format=torch.channels_last)), label)
        total = torch.stack(processes.gather(counts.compute().cpu())).sum(dim=0)
        return ClassificationResult(classification_scores(total), self.classes)


@dataclass(frozen=True)
class ClassificationResult(Scores):
    """Top-1 and top-5 error, and top-1 error of each class."""

    scores: ClassificationScores
    classes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return self.scores.to_json(self.classes)

    def table(self) -> Table:
        scores = self.scores
        rows = [
            *zip(self.classes, scores.class_errors, strict=True),
            ("top-1", scores.top1_error),
            ("top-5", scores.top5_error),
        ]
        return Table("Error", (), [(name, percent(error, 1)) for name, error in rows])

    def summary(self) -> dict[str, float | None]:
        errors = self.scores.to_json(self.classes)
        named = {"top-1 error": errors["top1_error"], "top-5 error": errors["top5_error"]}
        return {name: 100 * e if isinstance(e, float) else None for name, e in named.items()}


@dataclass(frozen=True)
class ImageClass(Annotation):
    """The class of an image.

    Attributes:
        label: name of the class; of a prediction, the most probable one.
        probabilities: names and probabilities of all classes, best first; empty for ground truth.
    """

    label: str | None = field()  # no default, which the base class has
    probabilities: Sequence[tuple[str, float]] = ()

    def draw(self, image: Tensor) -> None:
        """Nothing: the class of an image has no place in it."""

    def ranking(self, count: int) -> list[tuple[str, float]]:
        return list(self.probabilities[:count])

    def contents(self, objects: Collection[str]) -> NoReturn:
        raise TypeError("expected ground truth that locates objects, but got the class of an image")


class ClassificationPredictor(Predictor[Tensor]):
    """Predicts the probability of each class, [C].

    Args:
        model: the network.
        classes: names of the labels.
        short_side: shorter side of the resized image, in pixels.
        crop: side of the square in its middle that the network sees.
        device: where to compute; None takes a GPU if there is one.
    """

    has_picture: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        *,
        short_side: int,
        crop: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(model, classes, device)
        self._network = cast(_Network, self.model)
        self._transforms = classification_evaluation_transforms(short_side=short_side, crop=crop)
        self._resize = Resize(short_side, None)

    @torch.inference_mode()
    def predict(self, image: Tensor) -> Tensor:
        return self._probabilities(self.prepare(image))

    def annotate(self, image: Tensor) -> ImageClass:
        return self._annotation(self.predict(image))

    def prepare(self, image: Tensor) -> Prepared:
        seen = self._transforms(tv_tensors.Image(require_image(image)))
        batch = seen[None].to(self.device, memory_format=torch.channels_last)
        size, resized = image.shape[1:], self._resize.size(*image.shape[1:])
        scale = (resized[0] / size[0], resized[1] / size[1])
        # As torchvision's CenterCrop rounds.
        corner = (round((resized[0] - seen.shape[1]) / 2), round((resized[1] - seen.shape[2]) / 2))
        return Prepared(batch, scale, corner)

    @torch.no_grad()
    def infer(self, prepared: Prepared, size: Size) -> Inference:
        return Inference(self._annotation(self._probabilities(prepared)))

    def _probabilities(self, prepared: Prepared) -> Tensor:
        return self._network(prepared.input).softmax(dim=1)[0].cpu()

    def _annotation(self, probabilities: Tensor) -> ImageClass:
        best, labels = probabilities.sort(descending=True, stable=True)
        names = (self.classes[label] for label in labels.tolist())
        ranking = list(zip(names, best.tolist(), strict=True))
        return ImageClass(ranking[0][0], ranking)

    def write(
        self, files: Sequence[Path], out: Path, *, threshold: float = 0.5
    ) -> Iterator[tuple[Path, str | None]]:
        """Writes `predictions.jsonl`: the five most probable classes of each image, best first.

            {"image": "photo.jpg", "classes": [{"class": "star", "probability": 0.93}, ...]}

        The file is replaced when all images are done; an interruption leaves an older one.
        """
        with replacing(out / "predictions.jsonl") as lines:
            for path, image in read_images(files):
                if isinstance(image, str):
                    yield path, image
                    continue
                classes = [
                    {"class": name, "probability": round(probability, 6)}
                    for name, probability in self.annotate(image).ranking(_BEST)
                ]
                line = json.dumps({"image": path.name, "classes": classes}, ensure_ascii=False)
                lines.write(f"{line}\n".encode())
                yield path, None


class ClassificationTask(Task):
    """Image classification; data in the layout SPLIT/CLASS/IMAGE."""

    localizes: ClassVar[bool] = False

    def __init__(self, recipe: ClassifierRecipe, options: TaskOptions) -> None:
        super().__init__(recipe, options)
        self._recipe = recipe

    def splits(self, root: Path) -> list[str]:
        return image_folder_splits(root)

    def training_set(self, root: Path, split: str) -> ClassificationTrainingSet:
        return ClassificationTrainingSet(self._recipe, ImageFolderClassification(root, split))

    def evaluation_set(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> ClassificationEvaluationSet:
        images = ImageFolderClassification(root, split)
        require_classes(root, images.classes, trained_on)
        return ClassificationEvaluationSet(self._recipe, images)

    def annotated(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> AnnotatedImages:
        images = ImageFolderClassification(root, split)
        require_classes(root, images.classes, trained_on)

        def load(index: int) -> tuple[Tensor, ImageClass]:
            image, label = images[index]
            return image.as_subclass(Tensor), ImageClass(images.classes[label])

        return AnnotatedImages(images, load)

    def predictor(
        self,
        model: nn.Module,
        trained_on: DataIdentity,
        device: torch.device | str | None = None,
    ) -> ClassificationPredictor:
        return ClassificationPredictor(
            model,
            trained_on.classes,
            short_side=self._recipe.test_short_side,
            crop=self._recipe.crop,
            device=device,
        )
