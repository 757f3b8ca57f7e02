"""The detectors for Lightning: the training step, the scoring of images, and the data of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou

from deformnet.data.boxes import BoxAnnotations
from deformnet.data.coco import COCODetection
from deformnet.data.detection import detection_splits, open_detection
from deformnet.data.transforms import detection_transforms
from deformnet.data.voc import VOCDetection
from deformnet.engine.loading import ScoringData, TrainingData
from deformnet.engine.module import TrainingModule
from deformnet.engine.runs import DataIdentity
from deformnet.inference import DetectionPredictor, TestTimeAugmentation, detection_predictor
from deformnet.metrics.detections import (
    Record,
    score_records,
    write_detections,
    write_submission,
)
from deformnet.models.detection.detector import Detections, Detector, Proposals, Size, Target
from deformnet.models.detection.rois import RegionDetector
from deformnet.recipes import DetectorRecipe, FasterRCNNRecipe, RFCNRecipe, RPNRecipe
from deformnet.tasks.proposals import StoredProposals

DetectionImages = VOCDetection | COCODetection
_Found = TypeVar("_Found", Detections, Proposals)
_PROPOSAL = -1  # label of a proposal that goes through the transforms among the objects


class Sample(NamedTuple):
    """An image ready for the network.

    Attributes:
        image: float32 [3, h, w], normalised.
        target: its objects.
        proposals: boxes [P, 4] to train on, if they are stored.
        seed: of what the network draws in this image.
    """

    image: Tensor
    target: Target
    proposals: Tensor | None
    seed: int


class Batch(NamedTuple):
    """Samples of different sizes side by side.

    Attributes:
        images: [N, 3, H, W] of the largest height and width; what was added to the right and below
            is the mean colour (0).
        sizes: of the images in it.
        targets: their objects.
        proposals: their stored proposals, if there are any.
        seeds: of what the network draws in them.
    """

    images: Tensor
    sizes: list[Size]
    targets: list[Target]
    proposals: list[Tensor] | None
    seeds: list[int]

    def weight(self) -> int:
        """The images."""
        return len(self.sizes)

    def extended(self, height: int, width: int) -> "Batch":
        h, w = self.images.shape[2:]
        return self._replace(images=F.pad(self.images, (0, width - w, 0, height - h)))


class DetectionModule(TrainingModule):
    """Trains and scores a detector.

    Args:
        recipe, model, data: see `TrainingModule`.
        testing: how images are looked at when they are scored.
    Attributes:
        found: after `Trainer.validate`, the detections of every image by its index, of all
            processes.
        reported: the names of their labels.
    """

    model: Detector
    recipe: DetectorRecipe

    def __init__(
        self,
        recipe: DetectorRecipe,
        model: Detector,
        data: DataIdentity,
        *,
        testing: TestTimeAugmentation,
    ) -> None:
        super().__init__(recipe, model, data)
        self.testing = testing
        self.found: dict[int, Detections] = {}
        self._predictor: DetectionPredictor | None = None
        if data.proposals:  # it learns nothing from them, and other processes would wait for it
            assert isinstance(model, RegionDetector)
            model.rpn.requires_grad_(False)

    def terms(self, part: Batch) -> dict[str, Tensor]:
        images = part.images.contiguous(memory_format=torch.channels_last)
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in part.seeds]
        return self.model.losses(images, part.sizes, part.targets, part.proposals, generators)

    def on_validation_epoch_start(self) -> None:
        self.found = {}
        self._predictor = detection_predictor(
            self.recipe, self.model, self.data.classes, self.testing, self.device
        )

    def validation_step(self, batch: tuple[int, Tensor, Tensor | None], batch_idx: int) -> None:
        assert self._predictor is not None
        index, image, proposals = batch
        self.found[index] = self._predictor(image, proposals)

    @property
    def reported(self) -> tuple[str, ...]:
        assert self._predictor is not None
        return self._predictor.classes

    def on_validation_epoch_end(self) -> None:
        self.found = self._of_all_processes(self.found)

    def _of_all_processes(self, found: dict[int, _Found]) -> dict[int, _Found]:
        if self.trainer.world_size == 1:
            return found
        everyone: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, found)
        return {index: one for part in everyone for index, one in part.items()}


class ProposalModule(DetectionModule):
    """Has a detector propose boxes in images.

    Attributes:
        proposed: after `Trainer.validate`, those of every image by its index, of all processes.
    """

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.proposed: dict[int, Proposals] = {}

    def validation_step(self, batch: tuple[int, Tensor, Tensor | None], batch_idx: int) -> None:
        assert self._predictor is not None
        index, image, _ = batch
        self.proposed[index] = self._predictor.propose(image)

    def on_validation_epoch_end(self) -> None:
        self.proposed = self._of_all_processes(self.proposed)


@dataclass(frozen=True)
class DetectionJob:
    """What training and scoring do for a detector; see `deformnet.engine.train`."""

    recipe: DetectorRecipe
    testing: TestTimeAugmentation
    proposals: StoredProposals | None = None

    def __post_init__(self) -> None:
        if self.proposals is not None and not self._two_stages:
            raise ValueError(f"proposals: {self.recipe.network} takes none, it makes its own")

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Columns of the log."""
        own = () if self.proposals is not None else ("rpn_class", "rpn_box")
        return (*own, "class", "box") if self._two_stages else own

    @property
    def _two_stages(self) -> bool:
        return isinstance(self.recipe, (FasterRCNNRecipe, RFCNRecipe))

    def splits(self, data: Path) -> list[str]:
        return detection_splits(data)

    def open(self, data: Path, split: str) -> DetectionImages:
        images = open_detection(data, split)
        if self.proposals is not None:
            for index in range(len(images)):
                self.proposals[images.name(index)]
        return images

    def identity(self, images: DetectionImages) -> DataIdentity:
        names = (images.name(index) for index in range(len(images)))
        stored = None if self.proposals is None else self.proposals.digest
        return DataIdentity.of(images.classes, names, stored)

    def training_data(self, images: DetectionImages, workers: int, parts: int) -> TrainingData:
        groups = None
        if self.recipe.batch > 1:  # so that less of a batch is padding
            sizes = [images.size(index) for index in range(len(images))]
            groups = [int(width >= height) for height, width in sizes]
        if not images.has_ground_truth:
            raise ValueError(f"{images.root}: {images.split} has no objects to learn from")
        prepared = _TrainingImages(self.recipe, images, self.proposals)
        return TrainingData(self.recipe, prepared, collate, workers, parts, groups)

    def scoring_data(self, images: DetectionImages, workers: int) -> ScoringData:
        return ScoringData(_ScoredImages(images, self.proposals), workers)

    def module(self, model: Detector, identity: DataIdentity) -> DetectionModule:
        return DetectionModule(self.recipe, model, identity, testing=self.testing)

    def metrics(
        self, module: DetectionModule, images: DetectionImages, detections: Path
    ) -> dict[str, Any]:
        """Writes the detections to a file, and compares them with the truth.

        Returns:
            AP: "voc" of each class by method and IoU, or "coco" with the twelve numbers. Of
            proposals "recall": the share of objects that one of them overlaps, by IoU. Of images
            without objects "submission": a file for COCO's server, beside the other.
        """
        names = module.reported
        records = [
            Record(
                images.name(index),
                found.boxes.float(),
                found.scores.float(),
                [names[label] for label in found.labels.tolist()],
            )
            for index, found in sorted(module.found.items())
        ]
        write_detections(detections, records)
        if isinstance(self.recipe, RPNRecipe):
            return {"recall": _recall(module.found, images)}
        if isinstance(images, COCODetection) and not images.has_ground_truth:
            file = write_submission(detections.parent, records, images, self.recipe.network)
            return {"submission": str(file)}
        method = "11-point" if self.recipe.convention == "msra2017" else "area"
        return score_records(records, images, method=method)


def _recall(found: Mapping[int, Detections], images: DetectionImages) -> dict[str, float | None]:
    """The share of objects that a proposal overlaps by at least an IoU of 0.5 and of 0.7.

    None if there are no objects.
    """
    best = []
    for index, proposals in found.items():
        objects = images.annotations(index)
        boxes = objects.boxes.as_subclass(Tensor)[~objects.ignored]
        nothing = boxes.new_zeros(len(boxes), 1)
        best.append(torch.cat([nothing, box_iou(boxes, proposals.boxes)], dim=1).amax(dim=1))
    overlaps = torch.cat(best)
    if not len(overlaps):
        return {"0.5": None, "0.7": None}
    return {str(iou): float((overlaps >= iou).float().mean()) for iou in (0.5, 0.7)}


class _TrainingImages:
    """Images with their objects, and their stored proposals, after the random transforms."""

    def __init__(
        self, recipe: DetectorRecipe, images: DetectionImages, proposals: StoredProposals | None
    ) -> None:
        self.images = images
        self.proposals = proposals
        self.round = recipe.convention == "msra2017"
        self.transforms = detection_transforms(
            short_side=recipe.short_side, max_side=recipe.max_side, flip=recipe.flip
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image, objects = self.images[index]
        if self.proposals is not None:
            objects = _with_proposals(objects, self.proposals[self.images.name(index)])
        pixels, (boxes, labels, ignored) = self.transforms(image, objects)
        learned = ~ignored & (labels != _PROPOSAL)
        target = Target(boxes[learned], labels[learned])
        if self.round:
            target = target._replace(boxes=_to_whole_pixels(target.boxes))
        stored = None if self.proposals is None else boxes[labels == _PROPOSAL]
        return Sample(pixels, target, stored, int(torch.randint(2**63 - 1, ())))


class _ScoredImages:
    """Images as they are stored, with their index and their stored proposals."""

    def __init__(self, images: DetectionImages, proposals: StoredProposals | None) -> None:
        self.images = images
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor | None]:
        image, _ = self.images[index]
        stored = None if self.proposals is None else self.proposals[self.images.name(index)]
        return index, image.as_subclass(Tensor), stored


def _with_proposals(objects: BoxAnnotations, proposals: Tensor) -> BoxAnnotations:
    """The proposals behind the objects, so that the same transforms move them."""
    count, boxes = len(proposals), torch.cat([objects.boxes, proposals])
    return BoxAnnotations(
        tv_tensors.wrap(boxes, like=objects.boxes),  # pyright: ignore[reportCallIssue]
        torch.cat([objects.labels, objects.labels.new_full((count,), _PROPOSAL)]),
        torch.cat([objects.ignored, objects.ignored.new_zeros(count)]),
    )


def _to_whole_pixels(boxes: Tensor) -> Tensor:
    """Boxes whose first and last pixels are rounded, as the authors' code does after resizing."""
    first, last = boxes[:, :2].round(), (boxes[:, 2:] - 1).round()
    return torch.cat([first, torch.maximum(last, first) + 1], dim=1)


def collate(samples: Sequence[Sample]) -> Batch:
    """Makes a batch of images of different sizes."""
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = samples[0].image.new_zeros(len(samples), 3, height, width)
    for n, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        images[n, :, :h, :w] = sample.image
    proposals = [sample.proposals for sample in samples if sample.proposals is not None]
    return Batch(
        images,
        sizes,
        [sample.target for sample in samples],
        proposals or None,
        [sample.seed for sample in samples],
    )
