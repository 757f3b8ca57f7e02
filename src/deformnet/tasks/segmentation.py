"""Semantic segmentation: a class for every pixel."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from deformnet._files import replacing
from deformnet._text import Table, percent
from deformnet.data.base import IGNORE, SegmentationDataset
from deformnet.data.segmentation import open_segmentation, segmentation_splits
from deformnet.data.transforms import (
    segmentation_evaluation_transforms,
    segmentation_training_transforms,
)
from deformnet.metrics.segmentation import (
    SegmentationScores,
    confusion_matrix,
    connected_regions,
    region_boxes,
    segmentation_scores,
)
from deformnet.recipes import ScoreAt, SegmentationRecipe
from deformnet.tasks.annotations import AnnotatedImages, Annotation, Contents, Thing
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
from deformnet.tasks.predictor import Inference, Predictor, Prepared, Size, preparation, ready
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


class _Network(Protocol):
    """What a recipe of this task builds."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Logits [N, C, H, W]."""
        ...

    def losses(self, logits: Tensor, target: Tensor, /) -> dict[str, Tensor]: ...


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
        h, w = self.masks.shape[1:]
        more = (0, width - w, 0, height - h)
        return Batch(F.pad(self.images, more), F.pad(self.masks, more, value=IGNORE))

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        network = cast(_Network, model)
        logits = network(self.images.contiguous(memory_format=torch.channels_last))
        return network.losses(logits, self.masks)


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stacks normalized images [3, h, w] and masks [h, w] of different sizes."""
    height = max(mask.shape[0] for _, mask in samples)
    width = max(mask.shape[1] for _, mask in samples)
    images = samples[0][0].new_zeros(len(samples), 3, height, width)
    masks = samples[0][1].new_full((len(samples), height, width), IGNORE)
    for n, (image, mask) in enumerate(samples):
        h, w = mask.shape
        images[n, :, :h, :w] = image
        masks[n, :h, :w] = mask
    return Batch(images, masks)


class SegmentationTrainingSet(TrainingSet):
    """Images and label maps with random transforms."""

    def __init__(self, recipe: SegmentationRecipe, images: SegmentationDataset) -> None:
        self.identity = DataIdentity.of(images.classes, map(images.name, range(len(images))))
        self._images = images
        self._transforms = segmentation_training_transforms(
            short_side=recipe.short_side,
            max_side=recipe.max_side,
            crop=recipe.crop,
            flip=recipe.flip,
        )

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        return collate(seeded(self._sample, indices, seeds))

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transforms(*self._images[index])


class _Sample(NamedTuple):
    image: Tensor
    """At the size of the network's input."""
    mask: Tensor
    """As stored."""
    resized: Tensor
    """At the size of the network's input."""


class SegmentationEvaluationSet(EvaluationSet):
    """Images, each with its label map as stored and at the size of the network's input."""

    def __init__(
        self, recipe: SegmentationRecipe, images: SegmentationDataset, score_at: ScoreAt
    ) -> None:
        super().__init__(images)
        self._images = images
        self._score_at: ScoreAt = score_at
        self._transforms = segmentation_evaluation_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side
        )

    def __getitem__(self, index: int) -> _Sample:
        image, mask = self._images[index]
        prepared, resized = self._transforms(image, mask)
        return _Sample(prepared, mask.as_subclass(Tensor).long(), resized)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, processes: Processes, *, workers: int = 0, progress: bool = False
    ) -> "SegmentationResult":
        network = cast(_Network, ready(model, processes.device))
        confusion = confusion_matrix(len(self.classes), sync=False).to(processes.device)
        for _, sample in shared(self, processes, workers=workers, progress=progress):
            image, mask, resized = (part.to(processes.device) for part in sample)
            logits = network(image[None].contiguous(memory_format=torch.channels_last))
            if self._score_at == "original":
                size = list(mask.shape)
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            target = mask if self._score_at == "original" else resized
            confusion.update(logits.argmax(dim=1), target[None])
        counts = torch.stack(processes.gather(confusion.compute().cpu())).sum(dim=0)
        return SegmentationResult(segmentation_scores(counts), self.classes, self._score_at)


@dataclass(frozen=True)
class SegmentationResult(Scores):
    """Mean IoU and IoU of each class."""

    scores: SegmentationScores
    classes: tuple[str, ...]
    score_at: ScoreAt

    def to_json(self) -> dict[str, object]:
        return {"score_at": self.score_at, **self.scores.to_json(self.classes)}

    def table(self) -> Table:
        rows = [*zip(self.classes, self.scores.iou, strict=True), ("mean", self.scores.mean_iou)]
        return Table("IoU", (), [(name, percent(iou, 1)) for name, iou in rows])

    def summary(self) -> dict[str, float | None]:
        mean_iou = self.scores.mean_iou
        return {"mean IoU": None if np.isnan(mean_iou) else 100 * mean_iou}


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

    Args:
        model: the network.
        classes: names of the labels.
        short_side: shorter side of the network's input, in pixels.
        max_side: bound on the longer side; None for none.
        device: where to compute; None takes a GPU if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        *,
        short_side: int,
        max_side: int | None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(model, classes, device)
        self._network = cast(_Network, self.model)
        self._preparation = preparation(short_side, max_side)

    @torch.inference_mode()
    def predict(self, image: Tensor) -> Tensor:
        logits = self._network(self.prepare(image).input)
        return self._labels(logits, (image.shape[1], image.shape[2]))

    def annotate(self, image: Tensor) -> LabelMap:
        return LabelMap(self.predict(image), self.classes)

    def prepare(self, image: Tensor) -> Prepared:
        batch = self._preparation(require_image(image))[None]
        batch = batch.to(self.device, memory_format=torch.channels_last)
        return Prepared.whole(batch, image)

    @torch.no_grad()
    def infer(self, prepared: Prepared, size: Size) -> Inference:
        labels = self._labels(self._network(prepared.input), size)
        return Inference(LabelMap(labels, self.classes))

    def _labels(self, logits: Tensor, size: Size) -> Tensor:
        """The label map of an image of (height, width) `size` from logits [1, C, h, w]."""
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

    def write(
        self, files: Sequence[Path], out: Path, *, threshold: float = 0.5
    ) -> Iterator[tuple[Path, str | None]]:
        """Writes label maps and overlays.

        For `photo.jpg` these are `labels/photo.png`, a palette PNG of class indices of the size of
        the image, and `overlays/photo.jpg`, the image tinted by class with a legend.
        """
        for path, image in read_images(files):
            if isinstance(image, str):
                yield path, image
                continue
            labels = self.predict(image)
            with replacing(out / "labels" / f"{path.stem}.png") as file:
                label_image(labels, self.classes).save(file, format="PNG")
            with replacing(out / "overlays" / f"{path.stem}.jpg") as file:
                drawn = overlay(image, labels, self.classes)
                drawn.save(file, format="JPEG", quality=92, subsampling=0)
            yield path, None


class SegmentationTask(Task):
    """Semantic segmentation; data in VOC or Cityscapes layout."""

    accepts = ("score_at",)

    def __init__(self, recipe: SegmentationRecipe, options: TaskOptions) -> None:
        super().__init__(recipe, options)
        self._recipe = recipe

    def splits(self, root: Path) -> list[str]:
        return segmentation_splits(root)

    def training_set(self, root: Path, split: str) -> SegmentationTrainingSet:
        return SegmentationTrainingSet(self._recipe, open_segmentation(root, split))

    def evaluation_set(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> SegmentationEvaluationSet:
        images = open_segmentation(root, split)
        require_classes(root, images.classes, trained_on)
        return SegmentationEvaluationSet(self._recipe, images, self.options.score_at)

    def annotated(
        self, root: Path, split: str, trained_on: DataIdentity | None = None
    ) -> AnnotatedImages:
        images = open_segmentation(root, split)
        require_classes(root, images.classes, trained_on)

        def load(index: int) -> tuple[Tensor, LabelMap]:
            image, mask = images[index]
            return image.as_subclass(Tensor), LabelMap(mask.as_subclass(Tensor), images.classes)

        return AnnotatedImages(
            images,
            load,
            tuple(name for name in images.classes if not _is_stuff(name)),
            "Objects are connected regions of {classes}",
        )

    def predictor(
        self,
        model: nn.Module,
        trained_on: DataIdentity,
        device: torch.device | str | None = None,
    ) -> SegmentationPredictor:
        return SegmentationPredictor(
            model,
            trained_on.classes,
            short_side=self._recipe.short_side,
            max_side=self._recipe.max_side,
            device=device,
        )
