"""Images with boxes: to train on, and to look at."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from deformnet._errors import UserError
from deformnet.data.boxes import BoxAnnotations, DetectionDataset
from deformnet.data.transforms import detection_transforms
from deformnet.models.detection.detector import Detector, Size, Target
from deformnet.recipes import DetectorRecipe
from deformnet.tasks.annotations import Annotation, Contents, Thing
from deformnet.tasks.base import TrainingSet, seeded
from deformnet.tasks.loading import pad, stack
from deformnet.tasks.proposals import StoredProposals
from deformnet.visualization.drawing import draw_boxes

_PROPOSAL = -1  # label of a proposal, which passes through the transforms with the objects


class Sample(NamedTuple):
    """An image float32 [3, h, w] ready for the network, and its objects."""

    image: Tensor
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
        images = self.images.contiguous(memory_format=torch.channels_last)
        generators = [torch.Generator(images.device).manual_seed(seed) for seed in self.seeds]
        network = cast(Detector, model)
        return network.losses(images, self.sizes, self.targets, self.proposals, generators)


def collate(samples: Sequence[Sample]) -> Batch:
    """Makes a batch of images of different sizes."""
    images, targets, proposals, seeds = zip(*samples, strict=True)
    return Batch(
        stack(images),
        [(image.shape[1], image.shape[2]) for image in images],
        list(targets),
        [boxes for boxes in proposals if boxes is not None] or None,
        list(seeds),
    )


class DetectionTrainingSet(TrainingSet):
    """Images with their objects, and their stored proposals, with random transforms."""

    def __init__(
        self, recipe: DetectorRecipe, images: DetectionDataset, proposals: StoredProposals | None
    ) -> None:
        if not images.has_ground_truth:
            raise UserError(f"{images.root}: expected objects to train on, but none are published")
        super().__init__(images, None if proposals is None else proposals.digest)
        if recipe.batch > 1:  # landscape and portrait apart, so that less of a batch is padding
            sizes = [images.size(index) for index in range(len(images))]
            self.groups = [int(width >= height) for height, width in sizes]
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
        )

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Batch:
        return collate(seeded(self.sample, indices, seeds))

    def sample(self, index: int) -> Sample:
        """An image with random transforms."""
        image, objects = self._images[index]
        if self._proposals is not None:
            objects = _with_proposals(objects, self._proposals[self._images.name(index)])
        pixels, (boxes, labels, ignored) = self._transforms(image, objects)
        learned = ~ignored & (labels != _PROPOSAL)
        target = Target(boxes[learned], labels[learned])
        if self._round:
            target = target._replace(boxes=to_whole_pixels(target.boxes))
        stored = None if self._proposals is None else boxes[labels == _PROPOSAL]
        return Sample(pixels, target, stored, int(torch.randint(2**63 - 1, ())))


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

    @property
    def names(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [self.classes[label] for label in self.labels.tolist()]

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
