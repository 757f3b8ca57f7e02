"""DeepLab for Lightning: the training step, the scoring of images, and the data of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.segmentation import open_segmentation, segmentation_splits
from deformnet.data.transforms import (
    segmentation_evaluation_transforms,
    segmentation_training_transforms,
)
from deformnet.engine.loading import ScoringData, TrainingData
from deformnet.engine.module import TrainingModule
from deformnet.engine.runs import DataIdentity
from deformnet.metrics.segmentation import (
    SegmentationScores,
    confusion_matrix,
    segmentation_scores,
)
from deformnet.models.deeplab import DeepLab
from deformnet.recipes import DeepLabRecipe

ScoreAt = Literal["original", "network"]
"""The size at which predictions meet the truth: that of the label map on disk, to which the logits
are upsampled; or that at which the network sees the image, to which the label map is resized (the
authors' rule on VOC: mean IoU at 360 pixels)."""


class Batch(NamedTuple):
    """Images with the classes of their pixels.

    Attributes:
        images: [N, 3, H, W] of the largest height and width; what was added to the right and below
            is the mean colour (0).
        masks: int64 [N, H, W]; what was added is void.
    """

    images: Tensor
    masks: Tensor

    def weight(self) -> Tensor:
        """The valid pixels."""
        return (self.masks != IGNORE).sum()

    def extended(self, height: int, width: int) -> "Batch":
        h, w = self.masks.shape[1:]
        more = (0, width - w, 0, height - h)
        return Batch(F.pad(self.images, more), F.pad(self.masks, more, value=IGNORE))


class SegmentationModule(TrainingModule):
    """Trains and scores a DeepLab.

    Args:
        recipe, model, data: see `TrainingModule`.
        score_at: see `ScoreAt`.
    Attributes:
        scores: after `Trainer.validate`, over all images and processes.
    """

    model: DeepLab

    def __init__(
        self,
        recipe: DeepLabRecipe,
        model: DeepLab,
        data: DataIdentity,
        *,
        score_at: ScoreAt = "original",
    ) -> None:
        super().__init__(recipe, model, data)
        self.score_at = score_at
        self.confusion = confusion_matrix(len(data.classes))
        self.scores: SegmentationScores | None = None

    def terms(self, part: Batch) -> dict[str, Tensor]:
        logits = self.model(part.images.contiguous(memory_format=torch.channels_last))
        return self.model.losses(logits, part.masks)

    def on_validation_epoch_start(self) -> None:
        self.confusion.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        image, truth, resized = batch
        logits = self.model(image[None].contiguous(memory_format=torch.channels_last))
        if self.score_at == "original":
            size = list(truth.shape)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        else:
            truth = resized
        self.confusion.update(logits.argmax(dim=1), truth[None])

    def on_validation_epoch_end(self) -> None:
        self.scores = segmentation_scores(self.confusion.compute())


@dataclass(frozen=True)
class SegmentationJob:
    """What training and scoring do for a DeepLab; see `deformnet.engine.train`."""

    recipe: DeepLabRecipe
    score_at: ScoreAt = "original"

    loss_terms: ClassVar[tuple[str, ...]] = ()

    def splits(self, data: Path) -> list[str]:
        return segmentation_splits(data)

    def open(self, data: Path, split: str) -> SegmentationDataset:
        return open_segmentation(data, split)

    def identity(self, images: SegmentationDataset) -> DataIdentity:
        return DataIdentity.of(images.classes, (images.name(i) for i in range(len(images))))

    def training_data(self, images: SegmentationDataset, workers: int, parts: int) -> TrainingData:
        images.transforms = segmentation_training_transforms(
            short_side=self.recipe.short_side,
            max_side=self.recipe.max_side,
            crop=self.recipe.crop,
            flip=self.recipe.flip,
        )
        return TrainingData(self.recipe, images, pad_to_batch, workers, parts)

    def scoring_data(self, images: SegmentationDataset, workers: int) -> ScoringData:
        return ScoringData(_ScoredImages(self.recipe, images), workers)

    def module(self, model: DeepLab, identity: DataIdentity) -> SegmentationModule:
        return SegmentationModule(self.recipe, model, identity, score_at=self.score_at)

    def metrics(
        self, module: SegmentationModule, images: SegmentationDataset, detections: Path
    ) -> dict[str, Any]:
        assert module.scores is not None
        return {"score_at": self.score_at, **module.scores.to_json(images.classes)}


class _ScoredImages:
    """Each image at the size of the network, with its label map at both sizes."""

    def __init__(self, recipe: DeepLabRecipe, images: SegmentationDataset) -> None:
        self.images = images
        self.transforms = segmentation_evaluation_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, truth = self.images[index]
        prepared, resized = self.transforms(image, truth)
        return prepared, truth.as_subclass(Tensor).long(), resized


def pad_to_batch(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stacks images of different sizes: smaller ones are extended to the right and below.

    Args:
        samples: normalised images [3, h, w] and masks [h, w].
    """
    height = max(mask.shape[0] for _, mask in samples)
    width = max(mask.shape[1] for _, mask in samples)
    images = samples[0][0].new_zeros(len(samples), 3, height, width)
    masks = samples[0][1].new_full((len(samples), height, width), IGNORE)
    for n, (image, mask) in enumerate(samples):
        h, w = mask.shape
        images[n, :, :h, :w] = image
        masks[n, :h, :w] = mask
    return Batch(images, masks)
