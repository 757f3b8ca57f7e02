"""One run: training with cached features, and scores by the size of objects."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.photographs.plan import PLAIN, Job, Run, recipe_of, result_path
from deformnet._files import write_json
from deformnet.analysis import AnnotatedImage, dilation_statistics
from deformnet.analysis.dilation import LARGE_AREA, SMALL_AREA
from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.opening import open_detection, open_segmentation
from deformnet.engine import Hardware, LoopOptions, load_run, train
from deformnet.engine.initial import initial
from deformnet.engine.runs import previous_path
from deformnet.metrics import (
    ConfusionMatrix,
    GroundTruth,
    ObjectCounts,
    Predictions,
    segmentation_scores,
    size_scores,
    voc_ap,
)
from deformnet.metrics.boxes import Array, areas, as_array, ious
from deformnet.metrics.numbers import scaled
from deformnet.models.network import Network as Model
from deformnet.tasks import task_of
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.base import Processes
from deformnet.tasks.features import FeatureCache
from deformnet.tasks.predictor import Predictor

SIZES = ("small", "medium", "large")
IOUS = (0.5, 0.7)


def features(out: Path) -> Path:
    """The folder of the feature cache."""
    return out / "features"


def prepare(jobs: list[Job], data: Path, out: Path) -> None:
    """Computes the features of all images that the jobs train on or are scored on."""
    needed = dict.fromkeys((job.run.network, job.train, job.test) for job in jobs)
    done = set()
    for network, *splits in needed:
        recipe = recipe_of(Run(network, PLAIN, 0))
        task = task_of(recipe)
        for split, flip in zip(splits, (recipe.flip, False), strict=True):
            key = (task.__class__, split)
            if key in done:
                continue
            done.add(key)
            images = task.training_set(data, split)
            model, _ = initial(recipe, images.classes)
            cache = FeatureCache(features(out), cast(Model, model).backbone, torch.device("cpu"))
            cache.filled(images, flip, Processes(progress=True))


def compute(job: Job, data: Path, out: Path) -> dict[str, Any]:
    """Trains the network of a job, or resumes it, scores it and stores the result."""
    begin = time.process_time()
    folder = job.folder(out)
    result = train(
        job.recipe,
        data,
        folder,
        split=job.train,
        val_split=None,
        hardware=Hardware(accelerator="cpu", devices=1, workers=0),
        loop=LoopOptions(feature_cache=features(out), progress=False),
    )
    trained = time.process_time()
    previous_path(folder).unlink(missing_ok=True)  # for space
    found = {
        "name": job.name,
        "run": job.run.to_json(),
        "job": job.described(),
        **scored(folder, data, job.test, features(out)),
        "parameters": result.parameters,
        "seconds per step": result.seconds_per_iteration,
        "core seconds of training": trained - begin,
        "core seconds of scoring": time.process_time() - trained,
    }
    write_json(result_path(job, out), found)
    return found


def scored(run: Path, data: Path, split: str, cache: Path) -> dict[str, Any]:
    """Scores of a run in percent, also of small, medium and large objects; effective dilation."""
    recipe, model, identity = load_run(run)
    task = task_of(recipe)
    backbone = cast(Model, model).backbone
    backbone.recall = FeatureCache(cache, backbone, torch.device("cpu")).recall
    predictor = task.predictor(model, identity, "cpu")
    if recipe.network == "deeplab":
        scores = segmentation(predictor, open_segmentation(data, split))
    else:
        scores = detection(predictor, open_detection(data, split))
    found: dict[str, Any] = {"scores": scores}
    if recipe.deform_layers:
        images = annotated(predictor, task.annotated(data, split, identity))
        rows = dilation_statistics(model, images, stride=backbone.stride, call=backbone)
        found["dilation"] = [asdict(row) for row in rows]
    return found


def annotated(predictor: Predictor, images: AnnotatedImages) -> Iterator[AnnotatedImage]:
    """Images with the boxes of their objects, as the network sees them."""
    for index in range(len(images)):
        image, truth = images[index]
        prepared = predictor.prepare(image)
        vertical, horizontal = prepared.scale
        boxes = truth.contents(images.countable or images.classes).boxes()
        yield AnnotatedImage(prepared.input[0], boxes, (vertical * horizontal) ** 0.5)


def segmentation(predictor: Predictor, images: SegmentationDataset) -> dict[str, float | None]:
    """Mean IoU of all pixels, and of objects by their size; None without objects."""
    confusion = ConfusionMatrix(len(images.classes))
    objects = ObjectCounts(len(images.classes), small=SMALL_AREA, large=LARGE_AREA)
    for index in range(len(images)):
        image, mask = images[index]
        labels = mask.as_subclass(Tensor)[None].long()
        predicted = predictor.predict(image.as_subclass(Tensor))[None].long()
        confusion.update(predicted, labels)
        objects.update(predicted, labels)
    by_size = size_scores(objects.compute())
    return {
        "mean IoU": scaled(segmentation_scores(confusion.compute()).mean_iou, 100),
        **{f"mean IoU, {size}": scaled(by_size[size].mean_iou, 100) for size in SIZES},
    }


def detection(predictor: Predictor, images: DetectionDataset) -> dict[str, float | None]:
    """VOC AP (area) of all objects, and by their size; None without objects."""
    truths: dict[str, GroundTruth] = {}
    predictions: dict[str, Predictions] = {}
    for index in range(len(images)):
        name, (image, truth) = images.name(index), images[index]
        truths[name] = GroundTruth(*map(as_array, truth))
        found = predictor.predict(image.as_subclass(Tensor))
        predictions[name] = Predictions(*map(as_array, found))
    result: dict[str, float | None] = {}
    for iou in IOUS:
        pairs = {"": (truths, predictions)} | {
            f", {size}": of_size(truths, predictions, size, iou) for size in SIZES
        }
        for name, pair in pairs.items():
            (mean,) = voc_ap(*pair, images.classes, (iou,)).mean_ap
            result[f"mAP@{iou:g}{name}"] = scaled(mean, 100)
    return result


def of_size(
    truths: dict[str, GroundTruth], predictions: dict[str, Predictions], size: str, iou: float
) -> tuple[dict[str, GroundTruth], dict[str, Predictions]]:
    """What counts for objects of one size, as in COCO.

    Objects of other sizes are ignored, and so are detections of other sizes that match no object.
    """
    own, kept = {}, {}
    for name, (boxes, labels, ignored) in truths.items():
        found = predictions[name]
        own[name] = GroundTruth(boxes, labels, as_array(ignored) | ~_has_size(boxes, size))
        same = as_array(found.labels)[:, None] == as_array(labels)
        overlaps = np.where(same, ious(as_array(found.boxes), as_array(boxes)), 0)
        counts = _has_size(found.boxes, size) | (overlaps.max(1, initial=0) > iou)
        kept[name] = Predictions(*(as_array(values)[counts] for values in found))
    return own, kept


def _has_size(boxes: Array, size: str) -> np.ndarray:
    area = areas(as_array(boxes))
    small, large = area < SMALL_AREA, area > LARGE_AREA
    return {"small": small, "medium": ~small & ~large, "large": large}[size]
