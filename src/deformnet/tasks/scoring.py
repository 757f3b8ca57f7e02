"""Scores of detections in files, whichever program wrote them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from deformnet._errors import UserError
from deformnet._files import matching, read_json
from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCODetection
from deformnet.data.opening import detection_splits, open_detection
from deformnet.metrics.detections import read_detections, read_objects
from deformnet.metrics.scoring import (
    COCOGroundTruth,
    DetectionScores,
    GroundTruthSet,
    NamedGroundTruth,
)
from deformnet.metrics.voc import GroundTruth, Method
from deformnet.tasks.annotations import names_of
from deformnet.tasks.own import OwnBoxes


def score(
    boxes: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    ious: Sequence[float] = (0.5, 0.7),
) -> DetectionScores:
    """Scores detections from files with the metric of the data's benchmark.

    Args:
        boxes: a file or folder as `deformnet.metrics.detections.read_detections` takes them, or for
            COCO data also a `.json` file in COCO's result format.
        data: ground truth: a folder in VOC or COCO layout, a COCO JSON file of annotations, or a
            folder of text files `<image>.txt` with a line `class x y width height` for each object.
        split: split of a folder in VOC or COCO layout; others have none.
        ious: IoU thresholds of VOC AP. COCO's are fixed.
    Returns:
        COCO AP for COCO data, VOC AP by both methods for other data.
    Raises:
        FileNotFoundError: if a file or folder is missing.
        UserError: one line that names the malformed file; for detections of images or classes that
            are not in the ground truth.
    """
    boxes, data = Path(boxes).expanduser(), Path(data).expanduser()
    if not ious or not all(0 <= iou < 1 for iou in ious):
        raise UserError(f"expected ious to be thresholds in [0, 1), but got {list(ious)}")
    ground_truth = _open(data, split, ious)
    if boxes.suffix != ".json":
        records = read_detections(boxes, ground_truth.classes)
        return ground_truth.score(records, str(boxes))
    if not isinstance(ground_truth, COCOGroundTruth):
        raise UserError(
            f"{boxes}: COCO results number their images, but {data} is not COCO data; "
            "expected a .jsonl file or a folder of .txt files"
        )
    results = read_json(boxes)
    if not isinstance(results, list):
        raise UserError(f"{boxes}: expected COCO results, a list of detections")
    return ground_truth.score_results(results, str(boxes))


def ground_truth_of(
    dataset: DetectionDataset | OwnBoxes,
    ious: Sequence[float] = (0.5, 0.7),
    methods: Sequence[Method] = get_args(Method),
) -> GroundTruthSet:
    """The ground truth of a data set: COCO's, or named boxes with the settings of VOC AP.

    Raises:
        UserError: if the ground truth is not published.
    """
    if isinstance(dataset, COCODetection):
        if not dataset.has_ground_truth:
            raise UserError(
                f"{dataset.annotation_files[0]}: expected ground truth to score with, but that of "
                f"{dataset.split} is not published; `deformnet evaluate` writes a submission for "
                "its server"
            )
        return coco_ids(dataset)
    names = enumerate(names_of(dataset))
    images = {name: GroundTruth(*dataset.annotations(index)) for index, name in names}
    return NamedGroundTruth(images, dataset.classes, ious, methods)


def coco_ids(dataset: COCODetection) -> COCOGroundTruth:
    """The annotation files of a COCO data set, and the ids of its images and classes."""
    images = dict(zip(names_of(dataset), dataset.image_ids.tolist(), strict=True))
    classes = dict(zip(dataset.classes, dataset.category_ids, strict=True))
    return COCOGroundTruth(dataset.annotation_files, images, classes)


def submission_path(folder: Path, dataset: COCODetection, name: str) -> Path:
    """The name that COCO's server expects of the submission of a method.

    Raises:
        UserError: for a sum of splits, and for another name than letters, digits, dots, dashes and
            underscores.
    """
    if not name or not all(sign.isalnum() or sign in "._-" for sign in name):
        raise UserError(
            f"expected name to be letters, digits, dots, dashes and underscores, but got {name!r}"
        )
    if len(dataset.annotation_files) > 1:
        raise UserError(f"expected one split in a submission, but got {dataset.split}")
    return folder / f"detections_{dataset.split}_{name}_results.json"


def _open(data: Path, split: str | None, ious: Sequence[float]) -> GroundTruthSet:
    if data.is_dir():
        try:
            splits = detection_splits(data)
        except FileNotFoundError:
            if not any(matching(data, "*.txt")):
                raise
        else:
            if split is None:
                known = ", ".join(splits) or "none"
                raise UserError(f"{data}: expected a split (--split), one of: {known}")
            return ground_truth_of(open_detection(data, split), ious)
    if split is not None:
        raise UserError(f"{data}: expected no split, as it has none, but got {split!r}")
    if data.is_dir():
        return _open_texts(data, ious)
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such file or folder")
    return _open_coco(data)


def _open_texts(data: Path, ious: Sequence[float]) -> NamedGroundTruth:
    objects = read_objects(data)
    classes = tuple(sorted({name for record in objects for name in record.classes}))
    if not classes:
        raise UserError(f"{data}: no object in any of the {len(objects)} text files")
    images = {}
    for image, boxes, _, names in objects:
        labels = np.array([classes.index(name) for name in names], dtype=np.int64)
        images[image] = GroundTruth(boxes, labels, np.zeros(len(labels), dtype=bool))
    return NamedGroundTruth(images, classes, ious)


def _open_coco(file: Path) -> COCOGroundTruth:
    """A JSON file alone, without the images themselves."""
    content = read_json(file)
    try:
        ids = [int(image["id"]) for image in content["images"]]
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        categories = {category["name"]: category["id"] for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: expected COCO annotations ({error!r})") from error
    # The names that COCODetection gives.
    names = stems if len(set(stems)) == len(stems) else map(str, ids)
    return COCOGroundTruth((file,), dict(zip(names, ids, strict=True)), categories)
