"""The classifier for Lightning: the training step, the scoring of images, and the data of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from deformnet.data.image_folder import ImageFolderClassification, image_folder_splits
from deformnet.data.transforms import (
    classification_evaluation_transforms,
    classification_training_transforms,
)
from deformnet.engine.loading import ScoringData, TrainingData
from deformnet.engine.module import TrainingModule
from deformnet.engine.runs import DataIdentity
from deformnet.metrics.classification import (
    ClassificationCounts,
    ClassificationScores,
    classification_scores,
)
from deformnet.models.classifier import Classifier
from deformnet.recipes import ClassifierRecipe


class Batch(NamedTuple):
    """Images with their classes.

    Attributes:
        images: [N, 3, crop, crop]
        labels: int64 [N]
    """

    images: Tensor
    labels: Tensor

    def weight(self) -> int:
        """The images."""
        return len(self.labels)

    def extended(self, height: int, width: int) -> "Batch":
        raise AssertionError(f"all crops have one size, got another of {height} x {width}")


class ClassificationModule(TrainingModule):
    """Trains and scores a classifier.

    Args:
        recipe, model, data: see `TrainingModule`.
    Attributes:
        scores: after `Trainer.validate`, over all images and processes.
    """

    model: Classifier

    def __init__(self, recipe: ClassifierRecipe, model: Classifier, data: DataIdentity) -> None:
        super().__init__(recipe, model, data)
        self.counts = ClassificationCounts(len(data.classes))
        self.scores: ClassificationScores | None = None

    def terms(self, part: Batch) -> dict[str, Tensor]:
        logits = self.model(part.images.contiguous(memory_format=torch.channels_last))
        return self.model.losses(logits, part.labels)

    def on_validation_epoch_start(self) -> None:
        self.counts.reset()

    def validation_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
        image, label = batch
        logits = self.model(image[None].contiguous(memory_format=torch.channels_last))
        self.counts.update(logits, torch.tensor([label], device=logits.device))

    def on_validation_epoch_end(self) -> None:
        self.scores = classification_scores(self.counts.compute())


@dataclass(frozen=True)
class ClassificationJob:
    """What training and scoring do for a classifier; see `deformnet.engine.train`."""

    recipe: ClassifierRecipe

    loss_terms: ClassVar[tuple[str, ...]] = ()

    def splits(self, data: Path) -> list[str]:
        return image_folder_splits(data)

    def open(self, data: Path, split: str) -> ImageFolderClassification:
        return ImageFolderClassification(data, split)

    def identity(self, images: ImageFolderClassification) -> DataIdentity:
        return DataIdentity.of(images.classes, (images.name(i) for i in range(len(images))))

    def training_data(
        self, images: ImageFolderClassification, workers: int, parts: int
    ) -> TrainingData:
        images.transform = classification_training_transforms(
            resize=self.recipe.resize,
            crop=self.recipe.crop,
            flip=self.recipe.flip,
            color_jitter=self.recipe.color_jitter,
        )
        return TrainingData(self.recipe, images, stack, workers, parts)

    def scoring_data(self, images: ImageFolderClassification, workers: int) -> ScoringData:
        images.transform = classification_evaluation_transforms(
            short_side=self.recipe.test_short_side, crop=self.recipe.crop
        )
        return ScoringData(images, workers)

    def module(self, model: Classifier, identity: DataIdentity) -> ClassificationModule:
        return ClassificationModule(self.recipe, model, identity)

    def metrics(
        self, module: ClassificationModule, images: ImageFolderClassification, detections: Path
    ) -> dict[str, Any]:
        assert module.scores is not None
        return module.scores.to_json(images.classes)


def stack(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    """Puts images [3, crop, crop] and their labels together."""
    images, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels))
