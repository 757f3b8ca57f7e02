"""Scores of detections against named ground truth: VOC AP or COCO AP."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet._text import Table
from deformnet.metrics.coco import coco_ap, coco_table
from deformnet.metrics.detections import Record, short_floats
from deformnet.metrics.voc import GroundTruth, Method, Predictions, VOCScores, voc_ap

_IMAGE_FILES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class DetectionScores(ABC):
    """Scores of a set of images.

    Attributes:
        images: number of images in the set.
        images_with_detections: fewer than expected hint at incomplete detections.
        detections: their number.
    """

    images: int
    images_with_detections: int
    detections: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for a JSON file, with None for NaN."""
        return {
            "images": self.images,
            "images_with_detections": self.images_with_detections,
            "detections": self.detections,
            **self._numbers(),
        }

    @abstractmethod
    def _numbers(self) -> dict[str, Any]: ...

    @abstractmethod
    def tables(self) -> list[Table]:
        """Average precision in percent, as one or more tables."""

    @abstractmethod
    def summary(self) -> dict[str, float | None]:
        """The numbers of the paper's tables, in percent."""

    def __str__(self) -> str:
        counts = (
            f"{self.detections} detections in {self.images_with_detections} of {self.images} images"
        )
        return "\n\n".join([counts, *map(str, self.tables())])


@dataclass(frozen=True)
class VOCDetectionScores(DetectionScores):
    """VOC AP, by one or both methods."""

    by_method: Mapping[Method, VOCScores]

    def _numbers(self) -> dict[str, Any]:
        return {"voc": {method: scores.to_json() for method, scores in self.by_method.items()}}

    def tables(self) -> list[Table]:
        return [scores.table() for scores in self.by_method.values()]

    def summary(self) -> dict[str, float | None]:
        scores = next(iter(self.by_method.values()))
        pairs = zip(scores.ious, scores.mean_ap, strict=True)
        return {f"mAP@{iou:g}": None if math.isnan(ap) else 100 * ap for iou, ap in pairs}


@dataclass(frozen=True)
class COCODetectionScores(DetectionScores):
    """COCO's twelve numbers; NaN where the set has no such objects."""

    numbers: Mapping[str, float]

    def _numbers(self) -> dict[str, Any]:
        return {"coco": {name: None if math.isnan(v) else v for name, v in self.numbers.items()}}

    def tables(self) -> list[Table]:
        return [coco_table(self.numbers)]

    def summary(self) -> dict[str, float | None]:
        return {name: None if math.isnan(v) else 100 * v for name, v in self.numbers.items()}


class GroundTruthSet(ABC):
    """Ground truth of a set of images by their names.

    Attributes:
        images: names of the images.
        classes: names of the classes.
    """

    images: Collection[str]
    classes: Collection[str]

    @abstractmethod
    def score(
        self,
        records: Sequence[Record],
        *,
        source: str = "detections",
        ious: Sequence[float] = (0.5, 0.7),
        methods: Sequence[Method] = get_args(Method),
    ) -> DetectionScores:
        """Scores detections.

        Args:
            records: at most one for each image.
            source: beginning of error messages, such as a file name.
            ious: thresholds of VOC AP. COCO's are fixed.
            methods: of VOC AP.
        Raises:
            UserError: for detections of images or classes that are not in the ground truth.
        """

    def known(self, records: Sequence[Record], source: str) -> dict[str, Record]:
        """Records by the image names of the ground truth, which contains all of them.

        Raises:
            UserError: for an image or a class that is not in the ground truth, or an image twice.
        """
        known: dict[str, Record] = {}
        unknown = []
        for record in records:
            name = record.image
            if name not in self.images and Path(name).suffix.lower() in _IMAGE_FILES:
                name = Path(name).stem
            if name in known:
                raise UserError(f"{source}: expected each image once, but got {name!r} again")
            if name in self.images:
                known[name] = record
            else:
                unknown.append(record.image)
        if unknown:
            raise UserError(
                f"{source}: {len(unknown)} of {len(records)} images are not in the ground truth, "
                f"such as {unknown[0]!r}"
            )
        names = [name for record in records for name in record.classes]
        foreign = [name for name in names if name not in self.classes]
        if foreign:
            raise UserError(
                f"{source}: {len(foreign)} of {len(names)} detections are of classes that are not "
                f"in the ground truth, such as {foreign[0]!r}; its classes: "
                f"{', '.join(self.classes)}"
            )
        return known


class NamedGroundTruth(GroundTruthSet):
    """Ground truth in memory, for VOC AP.

    Args:
        images: the objects of each image, by its name.
        classes: names of the labels.
    """

    def __init__(self, images: Mapping[str, GroundTruth], classes: Sequence[str]) -> None:
        self.images = self._objects = images
        self.classes = self._names = tuple(classes)

    def score(
        self,
        records: Sequence[Record],
        *,
        source: str = "detections",
        ious: Sequence[float] = (0.5, 0.7),
        methods: Sequence[Method] = get_args(Method),
    ) -> VOCDetectionScores:
        known = self.known(records, source)
        labels = {name: label for label, name in enumerate(self.classes)}
        predictions = {
            name: Predictions(
                record.boxes, record.scores, np.array([labels[c] for c in record.classes], np.int64)
            )
            for name, record in known.items()
        }
        counts = [len(record.classes) for record in known.values() if record.classes]
        by_method: dict[Method, VOCScores] = {
            method: voc_ap(self._objects, predictions, self._names, ious, method)
            for method in methods
        }
        return VOCDetectionScores(len(self.images), len(counts), sum(counts), by_method)


class COCOGroundTruth(GroundTruthSet):
    """Ground truth in COCO annotation files, for COCO AP.

    Args:
        files: one or more JSON files with the same categories.
        images: the id of each image, by its name.
        classes: the id of each category, by its name.
    """

    def __init__(
        self, files: Sequence[Path], images: Mapping[str, int], classes: Mapping[str, int]
    ) -> None:
        self.files = tuple(files)
        self.images = self._image_ids = images
        self.classes = self._category_ids = classes

    def score(
        self,
        records: Sequence[Record],
        *,
        source: str = "detections",
        ious: Sequence[float] = (0.5, 0.7),
        methods: Sequence[Method] = get_args(Method),
    ) -> COCODetectionScores:
        return self.score_results(list(self._results(records, source)), source)

    def score_results(
        self, results: Sequence[Mapping[str, Any]], source: str
    ) -> COCODetectionScores:
        """Scores detections in COCO's result format; errors as of `score`."""
        try:
            numbers = coco_ap(self.files, results)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        with_detections = len({result["image_id"] for result in results})
        return COCODetectionScores(len(self.images), with_detections, len(results), numbers)

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
        for name, record in self.known(records, source).items():
            rows = zip(record.boxes.tolist(), record.scores.tolist(), record.classes, strict=True)
            for (x1, y1, x2, y2), value, class_name in rows:
                yield {
                    "image_id": self._image_ids[name],
                    "category_id": self._category_ids[class_name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": value,
                }
