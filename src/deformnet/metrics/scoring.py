"""Scores of detections against named ground truth: VOC AP or COCO AP."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet._text import Table
from deformnet.metrics.coco import coco_scores
from deformnet.metrics.confusion import IOU, SCORE, Confusion, detection_confusion
from deformnet.metrics.curves import PrecisionRecall
from deformnet.metrics.detections import Record, short_floats
from deformnet.metrics.numbers import by_name, scored_classes
from deformnet.metrics.voc import GroundTruth, Method, Predictions, voc_ap, voc_curves

_IMAGE_FILES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class DetectionScores:
    """Scores of a set of images.

    Attributes:
        json: plain numbers for a JSON file, with None for NaN: VOC AP by one or both methods, or
            COCO's twelve metrics; the number of images and detections (fewer images with detections
            than expected suggest that detections are incomplete); curves and confusion matrix.
        tables: average precision in percent.
        summary: the numbers of the paper's tables, in percent.
        curves: precision-recall curve of each class.
        confusion: confusion matrix of objects and detections.
    """

    json: dict[str, Any]
    tables: list[Table]
    summary: dict[str, float | None]
    curves: PrecisionRecall
    confusion: Confusion

    def __str__(self) -> str:
        images = f"{self.json['images_with_detections']} of {self.json['images']} images"
        counts = f"{self.json['detections']} detections in {images}"
        titled = (table._replace(title=f"{table.title}, percent") for table in self.tables)
        return "\n\n".join([counts, *map(str, titled)])


class GroundTruthSet(ABC):
    """Ground truth of a set of images by their names."""

    classes: Collection[str]

    @abstractmethod
    def score(self, records: Sequence[Record], source: str = "detections") -> DetectionScores:
        """Scores detections.

        Args:
            records: at most one for each image.
            source: beginning of error messages, such as a file name.
        Raises:
            UserError: for detections of images or classes that are not in the ground truth.
        """


class NamedGroundTruth(GroundTruthSet):
    """Ground truth in memory, for VOC AP.

    Args:
        images: the objects of each image, by its name.
        classes: names of the labels.
        ious: IoU thresholds.
        methods: the first one gives the summary.
    """

    def __init__(
        self,
        images: Mapping[str, GroundTruth],
        classes: Sequence[str],
        ious: Sequence[float] = (0.5, 0.7),
        methods: Sequence[Method] = get_args(Method),
    ) -> None:
        self.classes = self._names = tuple(classes)
        self._images, self._ious, self._methods = images, ious, methods

    def score(self, records: Sequence[Record], source: str = "detections") -> DetectionScores:
        known = _known(records, self._images, self.classes, source)
        labels = {name: label for label, name in enumerate(self.classes)}
        predictions = {
            name: Predictions(
                record.boxes, record.scores, np.array([labels[c] for c in record.classes], np.int64)
            )
            for name, record in known.items()
        }
        counts = [len(record.classes) for record in known.values() if record.classes]
        scores = [
            voc_ap(self._images, predictions, self._names, self._ious, method)
            for method in self._methods
        ]
        names = (f"mAP@{iou:g}" for iou in self._ious)
        curves = voc_curves(self._images, predictions, self._names, self._methods[0])
        confusion = detection_confusion(self._images, predictions, self._names)
        return DetectionScores(
            {
                **_counts(self._images, len(counts), sum(counts)),
                "voc": {of_method.method: of_method.to_json() for of_method in scores},
                **scored_classes(curves.ap),
                **_details(curves, confusion),
            },
            [of_method.table() for of_method in scores],
            by_name(names, scores[0].mean_ap, 100),
            curves,
            confusion,
        )


class COCOGroundTruth(GroundTruthSet):
    """Ground truth in COCO annotation files, for COCO AP.

    Args:
        files: one or more JSON files with the same categories.
        images: the id of each image by name; other images in the files are not evaluated.
        classes: the id of each category, by its name.
    """

    def __init__(
        self, files: Sequence[Path], images: Mapping[str, int], classes: Mapping[str, int]
    ) -> None:
        self.files, self.images = tuple(files), images
        self.classes = self._ids = classes

    def score(self, records: Sequence[Record], source: str = "detections") -> DetectionScores:
        return self.score_results(list(self._results(records, source)), source)

    def score_results(self, results: Sequence[Mapping[str, Any]], source: str) -> DetectionScores:
        """Scores detections in COCO's result format; errors as of `score`."""
        try:
            scores = coco_scores(self.files, results, self.images.values(), self._ids.values())
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        with_detections = len({result["image_id"] for result in results})
        counts = _counts(self.images, with_detections, len(results))
        return DetectionScores(
            {**counts, **scores.to_json(), **_details(scores.curves, scores.confusion)},
            scores.tables(),
            by_name(scores.numbers, scores.numbers.values(), 100),
            scores.curves,
            scores.confusion,
        )

    def write_submission(self, path: Path, records: Sequence[Record]) -> None:
        """Writes COCO's result format, the file that its server scores.

        Args:
            path: the file; the server expects `detections_<split>_<name>_results.json`, in a zip
                file of the same name.
            records: at most one for each image. Numbers are written as float32.
        Raises:
            UserError: for detections of images or classes that are not in the ground truth.
        """
        results = self._results(records, "detections")
        with replacing(path) as output:
            output.write(b"[")
            for number, result in enumerate(results):
                result["bbox"] = short_floats(np.asarray(result["bbox"], np.float32))
                (result["score"],) = short_floats(np.asarray([result["score"]], np.float32))
                output.write(b",\n" if number else b"\n")
                output.write(json.dumps(result).encode())
            output.write(b"\n]\n")

    def _results(self, records: Sequence[Record], source: str) -> Iterator[dict[str, Any]]:
        """Records in COCO's result format."""
        for name, record in _known(records, self.images, self.classes, source).items():
            rows = zip(record.boxes.tolist(), record.scores.tolist(), record.classes, strict=True)
            for (x1, y1, x2, y2), value, class_name in rows:
                yield {
                    "image_id": self.images[name],
                    "category_id": self._ids[class_name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": value,
                }


def _known(
    records: Sequence[Record], images: Collection[str], classes: Collection[str], source: str
) -> dict[str, Record]:
    """Records by the image names of the ground truth, which contains all of them.

    Raises:
        UserError: for an image or a class that is not in the ground truth, or an image twice.
    """
    known: dict[str, Record] = {}
    unknown = []
    for record in records:
        name = record.image
        if name not in images and Path(name).suffix.lower() in _IMAGE_FILES:
            name = Path(name).stem
        if name in known:
            raise UserError(f"{source}: expected each image once, but got {name!r} again")
        if name in images:
            known[name] = record
        else:
            unknown.append(record.image)
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of {len(records)} images are not in the ground truth, "
            f"such as {unknown[0]!r}"
        )
    names = [name for record in records for name in record.classes]
    foreign = [name for name in names if name not in classes]
    if foreign:
        raise UserError(
            f"{source}: {len(foreign)} of {len(names)} detections are of classes that are not "
            f"in the ground truth, such as {foreign[0]!r}; its classes: "
            f"{', '.join(classes)}"
        )
    return known


def _counts(images: Collection[str], with_detections: int, detections: int) -> dict[str, int]:
    return {
        "images": len(images),
        "images_with_detections": with_detections,
        "detections": detections,
    }


def _details(curves: PrecisionRecall, confusion: Confusion) -> dict[str, object]:
    matrix = {"iou": IOU, "score": SCORE, **confusion.to_json()}
    return {"precision_recall": curves.to_json(), "confusion_matrix": matrix}
