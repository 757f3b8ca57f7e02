"""Semantic segmentation: a class for every pixel."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from deformnet._files import replacing
from deformnet._text import Table, percent
from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.opening import open_segmentation, segmentation_splits
from deformnet.data.transforms import (
    segmentation_evaluation_transforms,
    segmentation_training_transforms,
)
from deformnet.metrics.numbers import scaled
from deformnet.metrics.segmentation import (
    ConfusionMatrix,
    connected_regions,
    region_boxes,
    segmentation_scores,
)
from deformnet.recipes import ScoreAt, SegmentationRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation, Contents, Thing
from deformnet.tasks.base import DataIdentity, Scores, Task, TrainingSet, seeded
from deformnet.tasks.images import write_picture
from deformnet.tasks.labeling import CountingSet, logits_of, losses_of
from deformnet.tasks.loading import pad, stack
from deformnet.tasks.predictor import Device, Predictor, Prepared, Size
from deformnet.visualization.drawing import label_image, overlay

# Classes of regions rather than objects: of Cityscapes its groups flat, construction, nature, sky
# and void; and their names in CamVid and VOC.
_STUFF = frozenset(
    (
        *("background", "void", "unlabeled", "ground", "static", "dynamic"),
        *("road", "sidewalk", "pavement", "parking", "rail track", "terrain"),
        *("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
        *("vegetation", "tree", "grass", "sky"),
    )
)


def _is_stuff(name: str) -> bool:
    return name.lower().replace("lled", "led") in _STUFF  # British spelling, too


class Batch(NamedTuple):
    """Images and label maps.

    Attributes:
        images: [N, 3, H, W] of the largest height and width; the padding has the mean color (0).
        masks: int64 [N, H, W]; the padding is void.
    """

    images: Tensor
    masks: Tensor

    def weight(self) -> Tensor:
        """Number of valid pixels."""
        return (self.masks != IGNORE).sum()

    def padded(self, height: int, width: int) -> "Batch":
        return Batch(pad(self.images, height, width), pad(self.masks, height, width, IGNORE))

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        return losses_of(model, self.images, self.masks)


class SegmentationTrainingSet(TrainingSet):
    """Images and label maps with random transforms."""

    def __init__(self, recipe: SegmentationRecipe, images: SegmentationDataset) -> None:
        super().__init__(images)
        self._images = images
        self._transforms = segmentation_training_transforms(
            short_side=recipe.short_side,
            max_side=recipe.max_side,
            crop=recipe.crop,
            flip=recipe.flip,
        )

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        return collate(seeded(lambda n: self._transforms(*self._images[n]), indices, seeds))


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stacks normalized images [3, h, w] and masks [h, w] of different sizes."""
    images, masks = zip(*samples, strict=True)
    return Batch(stack(images), stack(masks, IGNORE))


class SegmentationEvaluationSet(CountingSet):
    """Images with their label maps, both at the size of the network's input and as stored."""

    def __init__(
        self, recipe: SegmentationRecipe, images: SegmentationDataset, score_at: ScoreAt
    ) -> None:
        super().__init__(images)
        self._images = images
        self._score_at = score_at
        self._transforms = segmentation_evaluation_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self._images[index]
        prepared, resized = self._transforms(image, mask)
        if self._score_at == "network":
            return prepared, resized
        return prepared, mask.as_subclass(Tensor).long()

    def _metric(self) -> Metric:
        return ConfusionMatrix(len(self.classes), sync=False)

    def _predict(self, model: nn.Module, *sample: Tensor) -> tuple[Tensor, Tensor]:
        image, target = sample
        logits = logits_of(model, image[None])
        if self._score_at == "original":
            size = list(target.shape)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1), target[None]

    def _scores(self, counts: Tensor) -> Scores:
        scores = segmentation_scores(counts)
        rows = [*zip(self.classes, scores.iou, strict=True), ("mean", scores.mean_iou)]
        return Scores(
            {"score_at": self._score_at, **scores.to_json(self.classes)},
            Table("IoU", (), [(name, percent(iou, 1)) for name, iou in rows]),
            {"mean IoU": scaled(scores.mean_iou, 100)},
        )


@dataclass(frozen=True)
class LabelMap(Annotation):
    """The class of every pixel.

    Attributes:
        labels: uint8 [H, W].
        classes: names of the labels; others are void.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def draw(self, image: Tensor) -> Image.Image:
        """The image tinted by class, with a legend."""
        height, width = image.shape[1:]
        stored = Image.fromarray(self.labels.numpy())
        resized = np.array(stored.resize((width, height), Image.Resampling.NEAREST))
        return overlay(image, torch.from_numpy(resized), self.classes)

    def contents(self, objects: Collection[str]) -> Contents:
        """An object is a connected region of one class."""
        labels = self.labels.numpy()
        regions = connected_regions(labels)
        things = []
        background = labels != IGNORE
        for region, (rows, columns) in enumerate(region_boxes(regions)):
            mask = regions[rows, columns] == region
            label = int(labels[rows, columns][mask][0])
            if label == IGNORE or self.classes[label] not in objects:
                continue
            background[rows, columns] &= ~mask
            box = (columns.start, rows.start, columns.stop, rows.stop)
            things.append(Thing(self.classes[label], box, mask, (rows.start, columns.start)))
        return Contents(things, background)


class SegmentationPredictor(Predictor[Tensor]):
    """Predicts the label map of an image, uint8 [H, W].

    For `photo.jpg` `write` makes `labels/photo.png`, a palette PNG of class indices of the size of
    the image, and `overlays/photo.jpg`, the image tinted by class with a legend.
    """

    def _predict(self, prepared: Prepared, size: Size) -> Tensor:
        logits = logits_of(self.model, prepared.input)
        # Class by class: all of them at the size of a large photograph would fill the memory.
        best = torch.full((1, 1, *size), -torch.inf, device=self.device)
        labels = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for label in range(logits.shape[1]):
            plane = F.interpolate(
                logits[:, label : label + 1], size=size, mode="bilinear", align_corners=False
            )
            labels[(plane > best)[0, 0]] = label
            best = torch.maximum(best, plane)
        return labels.cpu()

    def _annotation(self, prediction: Tensor, size: Size) -> LabelMap:
        return LabelMap(prediction, self.classes)

    def _write(self, path: Path, image: Tensor, out: Path, threshold: float) -> None:
        annotation = LabelMap(self.predict(image), self.classes)
        with replacing(out / "labels" / f"{path.stem}.png") as file:
            label_image(annotation.labels, self.classes).save(file, format="PNG")
        write_picture(out / "overlays" / f"{path.stem}.jpg", annotation.draw(image))


class SegmentationTask(Task[SegmentationRecipe, SegmentationDataset]):
    """Semantic segmentation; data in VOC or Cityscapes layout."""

    accepts = ("score_at",)

    def splits(self, root: Path) -> list[str]:
        return segmentation_splits(root)

    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> SegmentationPredictor:
        recipe = self.recipe
        return SegmentationPredictor(
            model, trained_on.classes, recipe.short_side, recipe.max_side, device
        )

    def _open(self, root: Path, split: str) -> SegmentationDataset:
        return open_segmentation(root, split)

    def _training_set(self, images: SegmentationDataset) -> SegmentationTrainingSet:
        images.require_labels()
        return SegmentationTrainingSet(self.recipe, images)

    def _evaluation_set(self, images: SegmentationDataset) -> SegmentationEvaluationSet:
        return SegmentationEvaluationSet(self.recipe, images, self.options.score_at)

    def _annotated(self, images: SegmentationDataset) -> AnnotatedImages:
        def load(index: int) -> tuple[Tensor, LabelMap]:
            image, mask = images[index]
            return image.as_subclass(Tensor), LabelMap(mask.as_subclass(Tensor), images.classes)

        countable = tuple(name for name in images.classes if not _is_stuff(name))
        return AnnotatedImages(
            images, load, countable, "Objects are connected regions of {classes}"
        )
