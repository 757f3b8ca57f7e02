"""Semantic segmentation: a class for every pixel."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchvision import tv_tensors

from deformnet._errors import UserError
from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.location import Location
from deformnet.data.opening import open_segmentation, segmentation_splits
from deformnet.data.transforms import (
    Resize,
    flip_transforms,
    segmentation_evaluation_transforms,
    segmentation_training_transforms,
    without_image,
)
from deformnet.metrics.confusion import Confusion
from deformnet.metrics.numbers import scaled
from deformnet.metrics.segmentation import (
    ConfusionMatrix,
    connected_regions,
    region_boxes,
    segmentation_scores,
)
from deformnet.models.deeplab import STRIDE, DeepLab
from deformnet.recipes import ScoreAt, SegmentationRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation, Contents, Thing, about
from deformnet.tasks.base import DataIdentity, Scores, Task, TrainingSet, Whole, seeded
from deformnet.tasks.figures import confusion_picture
from deformnet.tasks.labeling import CountingSet, logits_of
from deformnet.tasks.loading import alone, pad, stack
from deformnet.tasks.masks import KeptMasks
from deformnet.tasks.own import OwnMasks
from deformnet.tasks.predictor import Device, Predictor, Prepared, Size, preparation
from deformnet.tasks.results import encoded
from deformnet.tasks.summary import absent, by_class, sample_of
from deformnet.visualization.drawing import label_image, overlay

_Images = SegmentationDataset | OwnMasks

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
    """Images [N, 3, H, W], padded with the mean color (0), and label maps, padded with void."""

    images: Tensor
    masks: Tensor
    """int64 or, with features in place of images, uint8 [N, H, W]."""
    sizes: list[Size]
    """Height and width of each image without its padding."""

    def weight(self) -> Tensor:
        """Number of valid pixels."""
        return (self.masks != IGNORE).sum()

    def padded(self, height: int, width: int) -> "Batch":
        # In place of images there may be maps, which are smaller than the masks.
        sides = max(height, self.masks.shape[1]), max(width, self.masks.shape[2])
        return Batch(pad(self.images, height, width), pad(self.masks, *sides, IGNORE), self.sizes)

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        images = alone(model, self.images, self.sizes)
        images = images.contiguous(memory_format=torch.channels_last)
        return cast(DeepLab, model).losses_of_images(images, self.masks)


class SegmentationTrainingSet(TrainingSet):
    """Images and label maps with random transforms."""

    def __init__(self, recipe: SegmentationRecipe, images: _Images) -> None:
        super().__init__(images)
        self._images = images
        self._pixels, self._sampled = _pixels_of(images)
        self._transforms = segmentation_training_transforms(
            short_side=recipe.short_side,
            max_side=recipe.max_side,
            crop=recipe.crop,
            flip=recipe.flip,
            scale_jitter=recipe.scale_jitter,
            color_jitter=recipe.color_jitter,
            interpolation=recipe.interpolation,
        )
        self._preparation = preparation(recipe.short_side, recipe.max_side, recipe.interpolation)
        self._resize = Resize(recipe.short_side, recipe.max_side)
        self._flips = flip_transforms(flip=recipe.flip)
        self._resized = KeptMasks(self._read_mask)

    def summary(self) -> list[str]:
        """Pixels by class of at most 50 masks, and classes without any."""
        pixels = 100 * self._pixels.double() / self._pixels.sum()
        counts = pixels[: len(self.classes)].tolist()
        fractions = by_class(self.classes, counts, "{:.3g} %")
        if pixels[IGNORE]:
            fractions += f", void {pixels[IGNORE]:.3g} %"
        every = self._sampled == len(self)
        masks = f"all {len(self)} masks" if every else f"{self._sampled} of {len(self)} masks"
        where = "" if every else " in these masks"
        return [f"pixels in {masks}: {fractions}", *absent("pixel", self.classes, counts, where)]

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        return collate(seeded(self._sample, indices, seeds))

    def input(self, index: int) -> Tensor:
        with about(self._images, index):
            return self._preparation(_stored(self._images).image(index))

    def _read_mask(self, index: int) -> Tensor:
        return self._resize(_stored(self._images).mask(index))

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        if self.features is not None:
            mask, flipped = without_image(self._flips, tv_tensors.Mask(self._resized[index]))
            return self.features.read(index, flipped=flipped), mask
        image, mask = self._images[index]
        with about(self._images, index):
            return self._transforms(image, mask)


def _stored(images: _Images) -> SegmentationDataset:
    assert isinstance(images, SegmentationDataset)  # torch data sets have no feature cache
    return images


def _pixels_of(images: _Images) -> tuple[Tensor, int]:
    """Pixels by label, [256], in some masks, and the number of masks.

    Raises:
        UserError: if all pixels of all masks are void.
    """
    pixels = torch.zeros(256, dtype=torch.int64)
    sample = sample_of(len(images))
    others = sorted({*range(len(images))} - {*sample})
    count = 0
    with torch.random.fork_rng(devices=[]):
        for index in (*sample, *others):
            if count >= len(sample) and pixels[:IGNORE].any():
                break
            count += 1
            with suppress(OSError, UserError):  # raised again when the image is trained on
                pixels += torch.bincount(images[index][1].flatten(), minlength=256)
    if pixels[IGNORE] and not pixels[:IGNORE].any():
        images.require_labels()
    return pixels, count


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stacks normalized images [3, h, w], or features, and masks [h, w] of different sizes."""
    images, masks = zip(*samples, strict=True)
    sizes = [(mask.shape[0], mask.shape[1]) for mask in masks]
    return Batch(stack(images), stack(masks, IGNORE), sizes)


class SegmentationEvaluationSet(CountingSet):
    """Images with their label maps, both at the size of the network's input and as stored."""

    def __init__(self, recipe: SegmentationRecipe, images: _Images, score_at: ScoreAt) -> None:
        super().__init__(images)
        self._images = images
        self._score_at = score_at
        self._transforms = segmentation_evaluation_transforms(
            short_side=recipe.short_side,
            max_side=recipe.max_side,
            interpolation=recipe.interpolation,
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self._images[index]
        with about(self._images, index):
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
            logits = F.interpolate(logits, size=list(target.shape), mode="bilinear")
        return logits.argmax(dim=1), target[None]

    def _scores(self, counts: Tensor) -> Scores:
        scores = segmentation_scores(counts)
        confusion = Confusion.of(self.classes, counts)
        matrix = {"confusion_matrix": confusion.to_json()}
        return Scores(
            {"score_at": self._score_at, **scores.to_json(self.classes), **matrix},
            scores.table(self.classes),
            {"mean IoU": scaled(scores.mean_iou, 100)},
            main=("mean IoU", scaled(scores.mean_iou, 100)),
            pictures=confusion_picture(confusion, "pixels"),
        )


@dataclass(frozen=True)
class LabelMap(Annotation):
    """The class of every pixel; labels without a name are void."""

    labels: Tensor
    """uint8 [H, W]."""
    classes: tuple[str, ...]
    image: Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Height and width of the image, and the number of pixels of each class in it."""
        height, width = self.labels.shape
        counts = torch.bincount(self.labels.flatten(), minlength=256).tolist()
        pixels = {name: counts[k] for k, name in enumerate(self.classes) if counts[k]}
        return {"height": height, "width": width, "pixels": pixels}

    def _plot(self, image: Tensor) -> Image.Image:
        return self.draw(image)

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


class SegmentationPredictor(Predictor[Tensor, LabelMap]):
    """Predicts the label map of an image, uint8 [H, W].

    For `photo.jpg` `write` makes `labels/photo.png`, a palette PNG of class indices of the size of
    the image, and `overlays/photo.jpg`, the image tinted by class with a legend.
    """

    folders: ClassVar[dict[str, str]] = {"overlays": ".jpg", "labels": ".png"}

    def _predict(self, prepared: Prepared, size: Size) -> Tensor:
        logits = logits_of(self.model, prepared.input)
        # Class by class: all of them at the size of a large photograph would fill the memory.
        best = torch.full((1, 1, *size), -torch.inf, device=self.device)
        labels = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for label in range(logits.shape[1]):
            plane = F.interpolate(logits[:, label : label + 1], size=size, mode="bilinear")
            labels[(plane > best)[0, 0]] = label
            best = torch.maximum(best, plane)
        return labels.cpu()

    def _annotation(self, prediction: Tensor, size: Size, image: Tensor | None = None) -> LabelMap:
        return LabelMap(prediction, self.classes, image)

    def _pictures(self, annotation: LabelMap, threshold: float) -> dict[str, bytes]:
        labels = label_image(annotation.labels, self.classes)
        return {
            "overlays": encoded(annotation.plot(), ".jpg"),  # first: see `require_apart`
            "labels": encoded(labels, ".png"),
        }


class UnitScores(nn.Module):
    """DeepLab without its upsampling: logits [N, C, h, w] at the stride of the backbone."""

    def __init__(self, model: DeepLab) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.scores(images)


class Upsampled(nn.Module):
    """An exported DeepLab with upsampling, unless the export already includes it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        logits = self.module(images)
        if logits.shape[2:] != images.shape[2:]:
            logits = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")
        return logits[..., :height, :width]


class SegmentationTask(Task[SegmentationRecipe, _Images]):
    """Semantic segmentation."""

    accepts = ("score_at",)
    pipeline_tag = "image-segmentation"

    def predictor(
        self, model: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> SegmentationPredictor:
        recipe = self.recipe
        return SegmentationPredictor(
            model,
            trained_on.classes,
            recipe.short_side,
            recipe.max_side,
            device,
            upright=recipe.orientation != "stored",
            interpolation=recipe.interpolation,
        )

    def whole(self, model: nn.Module, trained_on: DataIdentity, *, resize: bool = True) -> Whole:
        return Whole(model if resize else UnitScores(cast(DeepLab, model)), ("logits",))

    def whole_predictor(
        self, module: nn.Module, trained_on: DataIdentity, device: Device = None
    ) -> SegmentationPredictor:
        return self.predictor(Upsampled(module), trained_on, device)

    def _splits(self, data: Location) -> list[str]:
        return segmentation_splits(data)

    def _open(self, data: Location, split: str) -> SegmentationDataset:
        return open_segmentation(data, split, orientation=self.recipe.orientation)

    def _own(self, data: Dataset[Any]) -> OwnMasks:
        return OwnMasks(data)

    def _training_set(self, images: _Images) -> SegmentationTrainingSet:
        return SegmentationTrainingSet(self.recipe, images)

    def _evaluation_set(self, images: _Images) -> SegmentationEvaluationSet:
        return SegmentationEvaluationSet(self.recipe, images, self.options.score_at)

    def _annotated(self, images: _Images) -> AnnotatedImages:
        def load(index: int) -> tuple[Tensor, LabelMap]:
            image, mask = images[index]
            return image.as_subclass(Tensor), LabelMap(mask.as_subclass(Tensor), images.classes)

        countable = tuple(name for name in images.classes if not _is_stuff(name))
        rule = "Objects are connected regions of {classes}"
        return AnnotatedImages(images, load, countable, rule)
