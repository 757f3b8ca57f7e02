"""Detectors on whole sets of images: average precision, recall of proposals, proposals in files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from deformnet._text import Table, percent
from deformnet.data.coco import COCODetection
from deformnet.metrics.detections import Record, write_detections
from deformnet.metrics.numbers import scaled
from deformnet.metrics.scoring import COCOGroundTruth
from deformnet.metrics.voc import Method
from deformnet.models.detection.detector import Detections, Proposals
from deformnet.tasks.annotations import about, names_of
from deformnet.tasks.base import EvaluationSet, Processes, ProposalSet, Scores
from deformnet.tasks.detection.data import BoxImages
from deformnet.tasks.detection.predictor import DetectionPredictor
from deformnet.tasks.figures import detection_pictures
from deformnet.tasks.loading import predictions
from deformnet.tasks.predictor import Device
from deformnet.tasks.proposals import StoredProposals, write_proposals
from deformnet.tasks.scoring import coco_ids, ground_truth_of, submission_path

MakePredictor = Callable[[nn.Module, Device], DetectionPredictor]
Scoring = Callable[[list[Record]], Scores]
"""Compares the detections of all images, in their order, with their ground truth."""


@dataclass(frozen=True)
class ScoredDetections(Scores):
    """Scores with the detections that they are of, which go into a file."""

    records: list[Record]
    submission: tuple[Path, COCOGroundTruth] | None = None
    """File name and ground truth of a submission to COCO's server, if it scores them."""

    def save(self, folder: Path, suffix: str = "") -> dict[str, str]:
        """Writes the pictures, `detections{suffix}.jsonl` and a submission; returns its path."""
        super().save(folder, suffix)
        write_detections(folder / f"detections{suffix}.jsonl", self.records)
        if self.submission is None:
            return {}
        name, ground_truth = self.submission
        ground_truth.write_submission(folder / name, self.records)
        return {"submission": str(folder / name)}


def precision(images: BoxImages, method: Method) -> Scoring:
    """Scores by VOC AP with this method, or by COCO AP."""
    ground_truth = ground_truth_of(images, methods=[method])

    def score(records: list[Record]) -> Scores:
        scores = ground_truth.score(records)
        main = next(iter(scores.summary.items()))
        table, *details = scores.tables
        return ScoredDetections(
            scores.json,
            table,
            scores.summary,
            records,
            main=main,
            details=tuple(details),
            pictures=detection_pictures(scores),
        )

    return score


def submission(images: COCODetection, network: str) -> Scoring:
    """Leaves it to COCO's server to score images whose ground truth is not published."""
    files = submission_path(Path(), images, network), coco_ids(images)
    table = Table("no scores: only COCO's server knows the objects", (), ())
    return lambda records: ScoredDetections({}, table, {}, records, files)


def recall(images: BoxImages) -> Scoring:
    """Scores proposals by the fraction of the objects that one overlaps; None without objects."""

    def score(records: list[Record]) -> Scores:
        best = []
        for index, proposals in enumerate(records):
            objects = images.annotations(index)
            boxes = objects.boxes.as_subclass(Tensor)[~objects.ignored]
            overlaps = box_iou(boxes, torch.as_tensor(proposals.boxes))
            best.append(torch.cat([boxes.new_zeros(len(boxes), 1), overlaps], dim=1).amax(dim=1))
        overlaps = torch.cat(best)
        by_iou = {
            str(iou): float((overlaps >= iou).float().mean()) if len(overlaps) else None
            for iou in (0.5, 0.7)
        }
        rows = [(f"IoU {iou}", percent(value, 1)) for iou, value in by_iou.items()]
        table = Table("Recall of proposals", (), rows)
        main = ("recall@0.7", scaled(by_iou["0.7"], 100))
        return ScoredDetections({"recall": by_iou}, table, {}, records, main=main)

    return score


class Sample(NamedTuple):
    """An image as stored, uint8 [3, H, W], and its stored proposals, if there are any."""

    image: Tensor
    proposals: Tensor | None


@dataclass(frozen=True)
class Samples:
    """Images of a data set, which workers load, and proposals that replace the detector's own."""

    images: BoxImages
    proposals: StoredProposals | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image, _ = self.images[index]
        stored = None if self.proposals is None else self.proposals[self.images.name(index)]
        return Sample(image.as_subclass(Tensor), stored)


class DetectionEvaluationSet(EvaluationSet):
    """Images to score a detector on."""

    def __init__(self, samples: Samples, predictor: MakePredictor, scoring: Scoring) -> None:
        super().__init__(samples.images)
        self._samples, self._predictor, self._scoring = samples, predictor, scoring

    def evaluate(self, model: nn.Module, processes: Processes) -> Scores:
        predictor = self._predictor(model, processes.device)

        def predict(index: int, sample: Sample) -> Detections:
            with about(self._samples.images, index):
                return predictor.predict(*sample)

        # All processes score: if only the first did, its errors would leave the others waiting.
        detections = predictions(self._samples, predict, processes)
        pairs = zip(self.names, detections, strict=True)
        return self._scoring([predictor.record(name, of_image) for name, of_image in pairs])


@dataclass(frozen=True)
class DetectionProposalSet(ProposalSet):
    """Images for which a detector makes proposals."""

    samples: Samples
    predictor: MakePredictor

    def __len__(self) -> int:
        return len(self.samples)

    def write(self, model: nn.Module, path: Path, processes: Processes) -> None:
        predictor = self.predictor(model, processes.device)

        def propose(index: int, sample: Sample) -> Proposals:
            with about(self.samples.images, index):
                return predictor.propose(sample.image)

        proposals = predictions(self.samples, propose, processes)
        if processes.rank == 0:
            write_proposals(path, names_of(self.samples.images), proposals)
