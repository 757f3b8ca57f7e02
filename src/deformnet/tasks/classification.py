"""Image classification: a class for every image."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from deformnet._text import Table, percent
from deformnet.data.image_folder import ImageFolderClassification, image_folder_splits
from deformnet.data.transforms import (
    Resize,
    classification_evaluation_transforms,
    classification_training_transforms,
)
from deformnet.metrics.classification import ClassificationCounts, classification_scores
from deformnet.metrics.numbers import scaled
from deformnet.recipes import ClassifierRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation
from deformnet.tasks.base import DataIdentity, Scores, Task, TrainingSet, seeded
from deformnet.tasks.images import require_image
from deformnet.tasks.labeling import CountingSet, logits_of, losses_of
from deformnet.tasks.predictor import Device, Predictor, Prepared, Size

_BEST = 5  # classes of an image that are written


class Batch(NamedTuple):
    """Images [N, 3, crop, crop] and classes, int64 [N]."""

    images: Tensor
    labels: Tensor

    def weight(self) -> int:
        """Number of images."""
        return len(self.labels)

    def padded(self, height: int, width: int) -> NoReturn:
        raise AssertionError(f"all crops have one size, but got another of {height} x {width}")

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        return losses_of(model, self.images, self.labels)


class ClassificationTrainingSet(TrainingSet):
    """Images and classes with random transforms."""

    def __init__(self, recipe: ClassifierRecipe, images: ImageFolderClassification) -> None:
        super().__init__(images)
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


class ClassificationEvaluationSet(CountingSet):
    """Images, the square that the network sees, each with its class [1]."""

    def __init__(self, recipe: ClassifierRecipe, images: ImageFolderClassification) -> None:
        super().__init__(images)
        self._images = images
        self._transforms = classification_evaluation_transforms(
            short_side=recipe.test_short_side, crop=recipe.crop
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._images[index]
        return self._transforms(tv_tensors.Image(image)), torch.tensor([label])

    def _metric(self) -> ClassificationCounts:
        return ClassificationCounts(len(self.classes), sync=False)

    def _predict(self, model: nn.Module, *sample: Tensor) -> tuple[Tensor, Tensor]:
        image, label = sample
        return logits_of(model, image[None]), label

    def _scores(self, counts: Tensor) -> Scores:
        scores = classification_scores(counts)
        totals = {"top-1": scores.top1_error, "top-5": scores.top5_error}
        rows = [*zip(self.classes, scores.class_errors, strict=True), *totals.items()]
        return Scores(
            scores.to_json(self.classes),
            Table("Error", (), [(name, percent(error, 1)) for name, error in rows]),
            {f"{name} error": scaled(error, 100) for name, error in totals.items()},
            main=("top-1 accuracy", scaled(1 - scores.top1_error, 100)),
        )


@dataclass(frozen=True)
class ImageClass(Annotation):
    """The class of an image."""

    label: str | None = field()  # no default, which the base class has
    probabilities: Sequence[tuple[str, float]] = ()
    """Names and probabilities of all classes, best first; empty for ground truth."""

    def draw(self, image: Tensor) -> None:
        """Nothing: the class of an image has no place in it."""

    def ranking(self, count: int) -> list[tuple[str, float]]:
        return list(self.probabilities[:count])

    def contents(self, objects: Collection[str]) -> NoReturn:
        raise TypeError("expected ground truth that locates objects, but got the class of an image")


class ClassificationPredictor(Predictor[Tensor]):
    """Predicts the probability of each class, [C], from the square in the middle of the image.

    `write` makes `predictions.jsonl`, the five most probable classes of each image, best first:

        {"image": "photo.jpg", "classes": [{"class": "star", "probability": 0.93}, ...]}
    """

    has_picture: ClassVar[bool] = False
    lines: ClassVar[str | None] = "predictions.jsonl"

    def __init__(
        self,
        recipe: ClassifierRecipe,
        model: nn.Module,
        classes: Sequence[str],
        device: Device = None,
    ) -> None:
        short_side, crop = recipe.test_short_side, recipe.crop
        super().__init__(model, classes, short_side, None, device)
        self._transforms = classification_evaluation_transforms(short_side=short_side, crop=crop)
        self._resize = Resize(short_side, None)

    def prepare(self, image: Tensor) -> Prepared:
        seen = self._transforms(tv_tensors.Image(require_image(image)))
        batch = seen[None].to(self.device, memory_format=torch.channels_last)
        size, resized = image.shape[1:], self._resize.size(*image.shape[1:])
        scale = (resized[0] / size[0], resized[1] / size[1])
        # As torchvision's CenterCrop rounds.
        corner = (round((resized[0] - seen.shape[1]) / 2), round((resized[1] - seen.shape[2]) / 2))
        return Prepared(batch, scale, corner)

    def _predict(self, prepared: Prepared, size: Size) -> Tensor:
        return logits_of(self.model, prepared.input).softmax(dim=1)[0].cpu()

    def _annotation(self, prediction: Tensor, size: Size) -> ImageClass:
        best, labels = prediction.sort(descending=True, stable=True)
        names = (self.classes[label] for label in labels.tolist())
        ranking = list(zip(names, best.tolist(), strict=True))
        return ImageClass(ranking[0][0], ranking)

    def _write(self, path: Path, image: Tensor, out: Path, threshold: float) -> str:
        classes = [
            {"class": name, "probability": round(probability, 6)}
            for name, probability in self.annotate(image).ranking(_BEST)
        ]
        return json.dumps({"image": path.name, "classes": classes}, ensure_ascii=False)


class ClassificationTask(Task[ClassifierRecipe, ImageFolderClassification]):
    """Image classification; data in the layout SPLIT/CLASS/IMAGE."""

    localizes: ClassVar[bool] = False

    def splits(self, root: Path) -> list[str]:
        return image_folder_splits(root)

    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> ClassificationPredictor:
        return ClassificationPredictor(self.recipe, model, trained_on.classes, device)

    def _open(self, root: Path, split: str) -> ImageFolderClassification:
        return ImageFolderClassification(root, split)

    def _training_set(self, images: ImageFolderClassification) -> ClassificationTrainingSet:
        return ClassificationTrainingSet(self.recipe, images)

    def _evaluation_set(self, images: ImageFolderClassification) -> ClassificationEvaluationSet:
        return ClassificationEvaluationSet(self.recipe, images)

    def _annotated(self, images: ImageFolderClassification) -> AnnotatedImages:
        def load(index: int) -> tuple[Tensor, ImageClass]:
            image, label = images[index]
            return image.as_subclass(Tensor), ImageClass(images.classes[label])

        return AnnotatedImages(images, load)
