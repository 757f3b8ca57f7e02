"""Detectors on whole sets of images: average precision, recall of proposals, proposals in files."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from deformnet._text import Table, percent
from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCODetection
from deformnet.metrics.detections import Record, write_detections
from deformnet.metrics.scoring import COCOGroundTruth, DetectionScores
from deformnet.metrics.voc import Method
from deformnet.models.detection.detector import Detections
from deformnet.tasks.base import EvaluationSet, Processes, ProposalSet, Scores
from deformnet.tasks.detection.predictor import DetectionPredictor
from deformnet.tasks.loading import Samples, shared
from deformnet.tasks.proposals import StoredProposals, write_proposals
from deformnet.tasks.scoring import coco_ids, ground_truth_of, submission_path

_S = TypeVar("_S")
_T = TypeVar("_T")
MakePredictor = Callable[[nn.Module, torch.device], DetectionPredictor]


class _Sample(NamedTuple):
    image: Tensor
    """As stored, uint8 [3, H, W]."""
    proposals: Tensor | None


class DetectionEvaluationSet(EvaluationSet):
    """Images as they are stored, with their stored proposals. Abstract: a subclass scores.

    Args:
        images: the data set.
        proposals: stored proposals that replace the detector's own.
        predictor: makes the predictor of a network.
    """

    def __init__(
        self,
        images: DetectionDataset,
        proposals: StoredProposals | None,
        predictor: MakePredictor,
    ) -> None:
        super().__init__(images)
        self._images = images
        self._proposals = proposals
        self._predictor = predictor

    def __getitem__(self, index: int) -> _Sample:
        image, _ = self._images[index]
        stored = None if self._proposals is None else self._proposals[self.names[index]]
        return _Sample(image.as_subclass(Tensor), stored)

    def evaluate(
        self, model: nn.Module, processes: Processes, *, workers: int = 0, progress: bool = False
    ) -> Scores:
        predictor = self._predictor(model, processes.device)
        detections = _of_all_images(
            self,
            lambda sample: predictor.predict(sample.image, sample.proposals),
            *(processes, workers, progress),
        )
        return self._score(
            [
                Record(
                    name,
                    found.boxes.float(),
                    found.scores.float(),
                    [predictor.classes[label] for label in found.labels.tolist()],
                )
                for name, found in zip(self.names, detections, strict=True)
            ],
            detections,
        )

    @abstractmethod
    def _score(self, records: list[Record], detections: Sequence[Detections]) -> Scores:
        """Compares the detections of all images with their ground truth."""


class PrecisionSet(DetectionEvaluationSet):
    """Images to compute average precision on.

    Args:
        method: of VOC AP.
    """

    def __init__(
        self,
        images: DetectionDataset,
        proposals: StoredProposals | None,
        predictor: MakePredictor,
        method: Method,
    ) -> None:
        super().__init__(images, proposals, predictor)
        self._ground_truth = ground_truth_of(images)
        self._method: Method = method

    def _score(self, records: list[Record], detections: Sequence[Detections]) -> Scores:
        return PrecisionResult(records, self._ground_truth.score(records, methods=[self._method]))


class SubmissionSet(DetectionEvaluationSet):
    """COCO images whose objects only COCO's server knows.

    Args:
        network: name of the method in the submission.
    """

    def __init__(
        self,
        images: COCODetection,
        proposals: StoredProposals | None,
        predictor: MakePredictor,
        network: str,
    ) -> None:
        super().__init__(images, proposals, predictor)
        self._ids = coco_ids(images)
        self._name = submission_path(Path(), images, network)

    def _score(self, records: list[Record], detections: Sequence[Detections]) -> Scores:
        return SubmissionResult(records, self._ids, self._name)


class RecallSet(DetectionEvaluationSet):
    """Images to compute the recall of region proposals on."""

    def _score(self, records: list[Record], detections: Sequence[Detections]) -> Scores:
        best = []
        for index, proposals in enumerate(detections):
            objects = self._images.annotations(index)
            boxes = objects.boxes.as_subclass(Tensor)[~objects.ignored]
            nothing = boxes.new_zeros(len(boxes), 1)
            best.append(torch.cat([nothing, box_iou(boxes, proposals.boxes)], dim=1).amax(dim=1))
        overlaps = torch.cat(best)
        recall = {
            str(iou): float((overlaps >= iou).float().mean()) if len(overlaps) else None
            for iou in (0.5, 0.7)
        }
        return RecallResult(records, recall)


@dataclass(frozen=True)
class DetectionResult(Scores):
    """Scores with the detections that they are of, which go into a file."""

    records: list[Record]

    def save(self, folder: Path, suffix: str = "") -> dict[str, str]:
        """Writes `detections{suffix}.jsonl`."""
        write_detections(folder / f"detections{suffix}.jsonl", self.records)
        return {}


@dataclass(frozen=True)
class PrecisionResult(DetectionResult):
    """VOC AP or COCO AP."""

    scores: DetectionScores

    def to_json(self) -> dict[str, object]:
        return self.scores.to_json()

    def table(self) -> Table:
        return self.scores.tables()[0]

    def summary(self) -> dict[str, float | None]:
        return self.scores.summary()


@dataclass(frozen=True)
class RecallResult(DetectionResult):
    """Recall of region proposals: the fraction of the objects that one overlaps, by IoU.

    None without objects.
    """

    recall: dict[str, float | None]

    def to_json(self) -> dict[str, object]:
        return {"recall": self.recall}

    def table(self) -> Table:
        rows = [(f"IoU {iou}", percent(value, 1)) for iou, value in self.recall.items()]
        return Table("Recall of proposals", (), rows)

    def summary(self) -> dict[str, float | None]:
        return {}


@dataclass(frozen=True)
class SubmissionResult(DetectionResult):
    """Detections in images whose ground truth is not published: a file for COCO's server."""

    ids: COCOGroundTruth
    name: Path

    def to_json(self) -> dict[str, object]:
        return {}

    def table(self) -> Table:
        return Table("no scores: only COCO's server knows the objects", (), ())

    def summary(self) -> dict[str, float | None]:
        return {}

    def save(self, folder: Path, suffix: str = "") -> dict[str, str]:
        """Writes `detections{suffix}.jsonl` and the submission; returns the path of the latter."""
        super().save(folder, suffix)
        self.ids.write_submission(folder / self.name, self.records)
        return {"submission": str(folder / self.name)}


class DetectionProposalSet(ProposalSet):
    """Images for which a detector makes proposals; their objects are not used."""

    def __init__(self, images: DetectionDataset, predictor: MakePredictor) -> None:
        self._images = images
        self._predictor = predictor

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index][0].as_subclass(Tensor)

    def write(
        self,
        model: nn.Module,
        path: Path,
        processes: Processes,
        *,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        predictor = self._predictor(model, processes.device)
        proposals = _of_all_images(self, predictor.propose, processes, workers, progress)
        if processes.rank == 0:
            names = map(self._images.name, range(len(self)))
            write_proposals(path, list(names), proposals)


def _of_all_images(
    samples: Samples[_S],
    predict: Callable[[_S], _T],
    processes: Processes,
    workers: int,
    progress: bool,
) -> list[_T]:
    """The predictions for all images in their order, made by all processes."""
    loaded = shared(samples, processes, workers=workers, progress=progress)
    own = [(index, predict(sample)) for index, sample in loaded]
    found = dict(pair for part in processes.gather(own) for pair in part)
    return [found[index] for index in range(len(samples))]
