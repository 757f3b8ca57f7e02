"""Images with boxes: to train on, and to look at."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from deformnet._errors import UserError
from deformnet.data.boxes import BoxAnnotations, DetectionDataset
from deformnet.data.transforms import detection_transforms, without_image
from deformnet.metrics.detections import short_floats
from deformnet.models.detection.detector import Detector, Size, Target
from deformnet.recipes import DetectorRecipe
from deformnet.tasks.annotations import Annotation, Contents, Thing, about
from deformnet.tasks.base import TrainingSet, seeded
from deformnet.tasks.loading import alone, pad, stack
from deformnet.tasks.own import OwnBoxes
from deformnet.tasks.predictor import preparation
from deformnet.tasks.proposals import StoredProposals
from deformnet.tasks.summary import absent, by_class, sample_of
from deformnet.visualization.drawing import draw_boxes

BoxImages = DetectionDataset | OwnBoxes

_PROPOSAL = -1  # label of a proposal, which passes through the transforms with the objects


class Sample(NamedTuple):
    """An image float32 [3, h, w] ready for the network, or its features, and its objects."""

    image: Tensor
    size: Size
    """Height and width of the image."""
    target: Target
    proposals: Tensor | None
    """Stored boxes [P, 4] to train on, if there are any."""
    seed: int
    """For the network's own random numbers in this image."""


class Batch(NamedTuple):
    """Samples of different sizes."""

    images: Tensor
    """[N, 3, H, W] of the largest height and width; the padding has the mean color (0)."""
    sizes: list[Size]
    targets: list[Target]
    proposals: list[Tensor] | None
    seeds: list[int]

    def weight(self) -> int:
        """Number of images."""
        return len(self.sizes)

    def padded(self, height: int, width: int) -> "Batch":
        return self._replace(images=pad(self.images, height, width))

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        images = alone(model, self.images, self.sizes)
        images = images.contiguous(memory_format=torch.channels_last)
        generators = [torch.Generator(images.device).manual_seed(seed) for seed in self.seeds]
        network = cast(Detector, model)
        return network.losses(images, self.sizes, self.targets, self.proposals, generators)


def collate(samples: Sequence[Sample]) -> Batch:
    """Makes a batch of images of different sizes."""
    images, sizes, targets, proposals, seeds = zip(*samples, strict=True)
    return Batch(
        stack(images),
        list(sizes),
        list(targets),
        [boxes for boxes in proposals if boxes is not None] or None,
        list(seeds),
    )


class DetectionTrainingSet(TrainingSet):
    """Images with their objects, and their stored proposals, with random transforms."""

    def __init__(
        self, recipe: DetectorRecipe, images: BoxImages, proposals: StoredProposals | None
    ) -> None:
        if not images.has_ground_truth:
            raise UserError(f"{images.root}: expected objects to train on, but none are published")
        super().__init__(images, None if proposals is None else proposals.digest)
        if recipe.batch > 1 and isinstance(images, DetectionDataset):
            # Landscape and portrait images are grouped separately, to reduce padding.
            sizes = [images.size(index) for index in range(len(images))]
            self.groups = [int(width >= height) for height, width in sizes]
        self._objects = _ObjectCounts.of(images)
        self._objects.require(images)
        self._needs_classes = not recipe.class_agnostic
        self._images = images
        self._proposals = proposals
        self._round = recipe.convention == "msra2017"
        self._transforms = detection_transforms(
            short_side=recipe.short_side,
            max_side=recipe.max_side,
            flip=recipe.flip,
            crop=recipe.crop,
            scale_jitter=recipe.scale_jitter,
            color_jitter=recipe.color_jitter,
            interpolation=recipe.interpolation,
        )
        self._preparation = preparation(recipe.short_side, recipe.max_side, recipe.interpolation)

    def summary(self) -> list[str]:
        """Objects by class (for a torch data set, in at most 50 images), and absent classes."""
        lines = self._objects.lines(self.classes, len(self))
        return lines if self._needs_classes else lines[:1]

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        return collate(seeded(self.sample, indices, seeds))

    def input(self, index: int) -> Tensor:
        with about(self._images, index):
            return self._preparation(_stored(self._images).image(index))

    def sample(self, index: int) -> Sample:
        """An image with random transforms, or the features of it."""
        if self.features is None:
            image, objects = self._images[index]
            with about(self._images, index):
                pixels, (boxes, labels, ignored) = self._transforms(
                    image, self._with_proposals(index, objects)
                )
            size = (pixels.shape[1], pixels.shape[2])
        else:
            objects = self._with_proposals(index, _stored(self._images).annotations(index))
            boxes, flipped = without_image(self._transforms, objects.boxes)
            labels, ignored = objects.labels, objects.ignored
            pixels, size = self.features.read(index, flipped=flipped), self.features.size(index)
        learned = ~ignored & (labels != _PROPOSAL)
        target = Target(boxes[learned], labels[learned])
        if self._round:
            target = target._replace(boxes=to_whole_pixels(target.boxes))
        stored = None if self._proposals is None else boxes[labels == _PROPOSAL]
        return Sample(pixels, size, target, stored, int(torch.randint(2**63 - 1, ())))

    def _with_proposals(self, index: int, objects: BoxAnnotations) -> BoxAnnotations:
        if self._proposals is None:
            return objects
        return _with_proposals(objects, self._proposals[self._images.name(index)])


def _stored(images: BoxImages) -> DetectionDataset:
    assert isinstance(images, DetectionDataset)  # torch data sets have no feature cache
    return images


@dataclass(frozen=True)
class _ObjectCounts:
    """Statistics of the objects in a data set, or in some of its images."""

    images: int
    """Number of images that were counted."""
    objects: list[int]
    """Number of objects by class."""
    ignored: int
    without: int
    """Number of images without an object to train on."""
    largest: float
    """Largest coordinate of a box."""

    @classmethod
    def of(cls, images: BoxImages) -> Self:
        """Counts all images of a stored data set, and some of a torch data set."""
        if isinstance(images, DetectionDataset):
            (boxes, labels, ignored), counts = images.all_annotations()
        else:
            (boxes, labels, ignored), counts = _some_of(images)
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        learned = torch.bincount(owners[~ignored], minlength=len(counts))
        return cls(
            len(counts),
            torch.bincount(labels[~ignored], minlength=len(images.classes)).tolist(),
            int(ignored.sum()),
            int((learned == 0).sum()),
            float(boxes.amax()) if len(boxes) else 0.0,
        )

    def require(self, images: BoxImages) -> None:
        """Raises UserError if there is nothing to learn from."""
        every = self.images == len(images)
        where = f"any of {'the' if every else f'{self.images} of the'} {len(images)} images"
        if not sum(self.objects):
            reason = ""
            if self.ignored:
                reason = f": all {self.ignored} are ignored (difficult, or crowds)"
            elif isinstance(images, DetectionDataset) and images.dropped:
                reason = f": all {images.dropped} boxes have no area inside their image"
            raise UserError(
                f"{images.root}: expected objects to train on, but found none in {where}{reason}"
            )
        if self.largest <= 1:
            raise UserError(
                f"{images.root}: expected boxes in pixels, but none in {where} reaches beyond 1: "
                "they seem to be fractions of the image size; multiply them by width and height"
            )

    def lines(self, classes: Sequence[str], length: int) -> list[str]:
        every = self.images == length
        where = "" if every else f" in {self.images} of {length} images"
        more = f", {self.ignored} ignored" if self.ignored else ""
        more += f"; images without objects: {self.without}" if self.without else ""
        missing = "" if every else f" in these {self.images} images"
        return [
            f"objects{where}: {sum(self.objects):,} ({by_class(classes, self.objects)}){more}",
            *absent("object", classes, self.objects, missing),
        ]


def _some_of(images: OwnBoxes) -> tuple[BoxAnnotations, Tensor]:
    """Objects of at most 50 images (of more if these have none), and their number in each."""
    sample = sample_of(len(images))
    others = sorted({*range(len(images))} - {*sample})
    parts: list[BoxAnnotations] = []
    with torch.random.fork_rng(devices=[]):
        for index in (*sample, *others):
            if len(parts) >= len(sample) and any(not part.ignored.all() for part in parts):
                break
            parts.append(images.annotations(index))
    boxes, labels, ignored = (torch.cat(values) for values in zip(*parts, strict=True))
    counts = torch.tensor([len(part.labels) for part in parts])
    return BoxAnnotations(boxes.as_subclass(Tensor), labels, ignored), counts


def _with_proposals(objects: BoxAnnotations, proposals: Tensor) -> BoxAnnotations:
    """The proposals after the objects, for the same transforms to move them."""
    count, boxes = len(proposals), torch.cat([objects.boxes, proposals])
    return BoxAnnotations(
        tv_tensors.wrap(boxes, like=objects.boxes),  # pyright: ignore[reportCallIssue]
        torch.cat([objects.labels, objects.labels.new_full((count,), _PROPOSAL)]),
        torch.cat([objects.ignored, objects.ignored.new_zeros(count)]),
    )


def to_whole_pixels(boxes: Tensor) -> Tensor:
    """Rounds the first and last pixels of boxes, as the authors' code does after resizing."""
    first, last = boxes[:, :2].round(), (boxes[:, 2:] - 1).round()
    return torch.cat([first, torch.maximum(last, first) + 1], dim=1)


@dataclass(frozen=True)
class Boxes(Annotation):
    """Boxes with classes, and with scores if they are predicted; see `Annotation`."""

    boxes: Tensor = field()  # no default, which the base class has
    labels: Tensor
    """int64 [D]."""
    classes: tuple[str, ...]
    size: Size
    """(height, width) of the image."""
    scores: Tensor | None = None
    image: Tensor | None = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [self.classes[label] for label in self.labels.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Boxes (x1, y1, x2, y2), their classes and, for predictions, their scores."""
        values = {"boxes": _rows(self.boxes), "classes": self.names}
        return values if self.scores is None else {**values, "scores": _numbers(self.scores)}

    def to_coco(
        self, image_id: int, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """The boxes in COCO's result format, x, y, width, height.

        Args:
            image_id: id of the image in the data set.
            category_ids: category ids by class name; None numbers the classes from 1.
        """
        ids = category_ids or {name: k for k, name in enumerate(self.classes, start=1)}
        boxes = torch.cat([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], dim=1)
        scores = [1.0] * len(boxes) if self.scores is None else _numbers(self.scores)
        return [
            {"image_id": image_id, "category_id": ids[name], "bbox": box, "score": score}
            for box, name, score in zip(_rows(boxes), self.names, scores, strict=True)
        ]

    def _plot(self, image: Tensor) -> Image.Image:
        return self.draw(image)

    def draw(self, image: Tensor) -> Image.Image:
        """The image with boxes, tags and a legend."""
        height, width = (now / then for now, then in zip(image.shape[1:], self.size, strict=True))
        boxes = self.boxes * torch.tensor([width, height, width, height])
        return draw_boxes(image, boxes, self.labels, self.classes, self.scores)

    def best(self, count: int | None = None, least_score: float = 0.0) -> Self:
        if self.scores is None:
            return self
        kept = (self.scores >= least_score).nonzero()[:count, 0]
        boxes, labels, scores = self.boxes[kept], self.labels[kept], self.scores[kept]
        return replace(self, boxes=boxes, labels=labels, scores=scores)

    def contents(self, objects: Collection[str]) -> Contents:
        """An object fills its box; all boxes count, whatever `objects` says."""
        things = []
        background = np.ones(self.size, dtype=bool)
        for box, name in zip(self.boxes.tolist(), self.names, strict=True):
            x1, y1 = (int(edge) for edge in box[:2])
            x2, y2 = (int(np.ceil(edge)) for edge in box[2:])
            background[y1:y2, x1:x2] = False
            mask = np.ones((y2 - y1, x2 - x1), dtype=bool)
            things.append(Thing(name, tuple(box), mask, (y1, x1)))
        return Contents(things, background)


def _rows(boxes: Tensor) -> list[list[float]]:
    return [short_floats(box) for box in boxes.float().numpy()]


def _numbers(values: Tensor) -> list[float]:
    return short_floats(values.float().numpy())
