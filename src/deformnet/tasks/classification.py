"""Image classification: a class for every image."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from deformnet._files import replacing
from deformnet._text import Table, percent
from deformnet.data.image_folder import ImageFolderClassification
from deformnet.data.location import Location
from deformnet.data.opening import classification_splits, open_classification
from deformnet.data.transforms import (
    Resize,
    classification_evaluation_transforms,
    classification_training_transforms,
)
from deformnet.metrics.classification import ClassificationCounts, classification_scores
from deformnet.metrics.confusion import Confusion
from deformnet.metrics.numbers import scaled
from deformnet.models.classifier import Classifier
from deformnet.recipes import ClassifierRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation, about
from deformnet.tasks.base import DataIdentity, Scores, Task, TrainingSet, seeded
from deformnet.tasks.figures import confusion_picture
from deformnet.tasks.images import require_image
from deformnet.tasks.labeling import CountingSet, logits_of
from deformnet.tasks.own import OwnClasses
from deformnet.tasks.predictor import Add, Device, Predictor, Prepared, Size
from deformnet.tasks.results import BoxFormat
from deformnet.tasks.summary import absent, by_class, sample_of
from deformnet.visualization.drawing import captioned

_Images = ImageFolderClassification | OwnClasses

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
        return cast(Classifier, model).losses(logits_of(model, self.images), self.labels)


class ClassificationTrainingSet(TrainingSet):
    """Images and classes with random transforms."""

    def __init__(self, recipe: ClassifierRecipe, images: _Images) -> None:
        super().__init__(images)
        self._images = images
        self._transforms = classification_training_transforms(
            resize=recipe.resize,
            crop=recipe.crop,
            flip=recipe.flip,
            color_jitter=recipe.color_jitter,
            interpolation=recipe.interpolation,
        )

    def summary(self) -> list[str]:
        """Images by class (for a torch data set, of at most 50 images), and classes without any."""
        labels = _labels_of(self._images)
        counts = torch.bincount(torch.tensor(labels), minlength=len(self.classes)).tolist()
        every = len(labels) == len(self)
        images = "images" if every else f"{len(labels)} of {len(self)} images"
        where = "" if every else f" among these {len(labels)}"
        return [
            f"{images} by class: {by_class(self.classes, counts)}",
            *absent("image", self.classes, counts, where),
        ]

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        images, labels = zip(*seeded(self._sample, indices, seeds), strict=True)
        return Batch(torch.stack(images), torch.tensor(labels))

    def _sample(self, index: int) -> tuple[Tensor, int]:
        image, label = self._images[index]
        with about(self._images, index):
            return self._transforms(tv_tensors.Image(image)), label


def _labels_of(images: _Images) -> list[int]:
    """The labels of all images, or of some if labels require reading the images."""
    if isinstance(images, ImageFolderClassification):
        return [label for _, label in images.samples]
    with torch.random.fork_rng(devices=[]):
        return [images[index][1] for index in sample_of(len(images))]


class ClassificationEvaluationSet(CountingSet):
    """Images, the square that the network sees, each with its class [1]."""

    def __init__(self, recipe: ClassifierRecipe, images: _Images) -> None:
        super().__init__(images)
        self._images = images
        self._transforms = classification_evaluation_transforms(
            short_side=recipe.test_short_side,
            crop=recipe.crop,
            interpolation=recipe.interpolation,
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._images[index]
        with about(self._images, index):
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
        confusion = Confusion.of(self.classes, counts[:, :-1])
        return Scores(
            {**scores.to_json(self.classes), "confusion_matrix": confusion.to_json()},
            Table("Error", (), [(name, percent(error, 1)) for name, error in rows]),
            {f"{name} error": scaled(error, 100) for name, error in totals.items()},
            main=("top-1 accuracy", scaled(1 - scores.top1_error, 100)),
            pictures=confusion_picture(confusion, "images"),
        )


@dataclass(frozen=True)
class ImageClass(Annotation):
    """The class of an image."""

    label: str | None = field()  # no default, which the base class has
    classes: tuple[str, ...] = ()
    probabilities: Tensor | None = None
    """float32 [C], probability of each class; None for ground truth."""
    image: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The class and, for predictions, the probabilities of all classes in descending order."""
        values: dict[str, Any] = {"class": self.label}
        ranking = dict(self.ranking(len(self.classes)))
        return values if self.probabilities is None else {**values, "probabilities": ranking}

    def _plot(self, image: Tensor) -> Image.Image:
        lines = [f"{name} {probability:.2f}" for name, probability in self.ranking(_BEST)]
        return captioned(image, lines)

    def draw(self, image: Tensor) -> None:
        """Nothing: the class of an image has no place in it."""

    def ranking(self, count: int) -> list[tuple[str, float]]:
        if self.probabilities is None:
            return []
        best, labels = self.probabilities.sort(descending=True, stable=True)
        names = [self.classes[label] for label in labels[:count].tolist()]
        return list(zip(names, best[:count].tolist(), strict=True))

    def contents(self, objects: Collection[str]) -> NoReturn:
        raise TypeError("expected ground truth that locates objects, but got the class of an image")


class ClassificationPredictor(Predictor[Tensor, ImageClass]):
    """Predicts the probability of each class, [C], from the square in the middle of the image.

    `write` makes `predictions.jsonl`, the five most probable classes of each image, best first:

        {"image": "photo.jpg", "classes": [{"class": "star", "probability": 0.93}, ...]}
    """

    has_picture: ClassVar[bool] = False

    def __init__(
        self,
        recipe: ClassifierRecipe,
        model: nn.Module,
        classes: Sequence[str],
        device: Device = None,
    ) -> None:
        short_side, crop = recipe.test_short_side, recipe.crop
        upright = recipe.orientation != "stored"
        super().__init__(model, classes, short_side, None, device, upright=upright)
        self._transforms = classification_evaluation_transforms(
            short_side=short_side, crop=crop, interpolation=recipe.interpolation
        )
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

    def _annotation(
        self, prediction: Tensor, size: Size, image: Tensor | None = None
    ) -> ImageClass:
        label = self.classes[int(prediction.argmax())]
        return ImageClass(label, self.classes, prediction, image)

    @contextmanager
    def _listed(self, out: Path, box_format: BoxFormat) -> Iterator[Add[ImageClass]]:
        with replacing(out / "predictions.jsonl") as file:
            yield lambda name, _, annotation: file.write(_line(name, annotation))


def _line(name: str, annotation: ImageClass) -> bytes:
    classes = [
        {"class": class_name, "probability": round(probability, 6)}
        for class_name, probability in annotation.ranking(_BEST)
    ]
    line = json.dumps({"image": name, "classes": classes}, ensure_ascii=False)
    return f"{line}\n".encode(
        errors="backslashreplace"
    )  # names that are not UTF-8, as JSON escapes


class ClassificationTask(Task[ClassifierRecipe, _Images]):
    """Image classification; data in the layout SPLIT/CLASS/IMAGE."""

    localizes: ClassVar[bool] = False
    pipeline_tag = "image-classification"

    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> ClassificationPredictor:
        return ClassificationPredictor(self.recipe, model, trained_on.classes, device)

    def _splits(self, data: Location) -> list[str]:
        return classification_splits(data)

    def _open(self, data: Location, split: str) -> ImageFolderClassification:
        return open_classification(data, split, orientation=self.recipe.orientation)

    def _own(self, data: Dataset[Any]) -> OwnClasses:
        return OwnClasses(data)

    def _training_set(self, images: _Images) -> ClassificationTrainingSet:
        return ClassificationTrainingSet(self.recipe, images)

    def _evaluation_set(self, images: _Images) -> ClassificationEvaluationSet:
        return ClassificationEvaluationSet(self.recipe, images)

    def _annotated(self, images: _Images) -> AnnotatedImages:
        def load(index: int) -> tuple[Tensor, ImageClass]:
            image, label = images[index]
            return image.as_subclass(Tensor), ImageClass(images.classes[label])

        return AnnotatedImages(images, load)
