"""One run: training with cached features, and scores by the size of objects."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.photographs.numbers import SIZES
from benchmarks.photographs.plan import POOLING, PROPOSALS, Job, Recipe, result_path
from deformnet._files import read_json, write_json
from deformnet.analysis import AnnotatedImage, dilation_statistics
from deformnet.analysis.dilation import LARGE_AREA, SMALL_AREA
from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.opening import open_detection, open_segmentation
from deformnet.engine import Hardware, LoopOptions, Result, load_run, train
from deformnet.engine.initial import initial
from deformnet.engine.runs import machine, previous_path
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
from deformnet.metrics.detections import Record
from deformnet.metrics.numbers import scaled
from deformnet.models.network import Network as Model
from deformnet.recipes import RPNRecipe
from deformnet.tasks import task_of
from deformnet.tasks.annotations import AnnotatedImages
from deformnet.tasks.base import Processes, TaskOptions
from deformnet.tasks.detection.evaluation import ScoredDetections
from deformnet.tasks.features import FeatureCache
from deformnet.tasks.predictor import Predictor, preparation
from deformnet.tasks.proposals import StoredProposals

IOUS = (0.5, 0.7)
_CPU = torch.device("cpu")


def features(out: Path) -> Path:
    """The folder of the feature cache."""
    return out / "features"


def prepare(jobs: Sequence[Job], data: Path, out: Path) -> None:
    """Computes the features and proposals of all images that jobs train on or are scored on.

    Raises:
        UserError: if there are proposals of a network with other settings than `PROPOSALS`.
    """
    prepared = set()
    for job in jobs:
        segments, pools = job.run.network == "deeplab", job.run.network in POOLING
        key = (segments, pools, job.train, job.recipe.short_side, job.recipe.max_side)
        if key in prepared:
            continue
        prepared.add(key)
        task = task_of(job.recipe)
        for split, flip in ((job.train, job.recipe.flip), (job.test, False)):
            images = task.training_set(data, split)
            model, _ = initial(job.recipe, images.classes)
            cache = FeatureCache(features(out), cast(Model, model).backbone, _CPU)
            begin = time.perf_counter()
            cache.filled(images, flip, Processes(progress=True))
            if cache.computed:
                counts = {
                    "images": len(images),
                    "flipped images": len(images) if flip else 0,
                    "computed": cache.computed,
                }
                _note_caching(out, counts, time.perf_counter() - begin)
        if pools:
            propose(job, data, out)


def _note_caching(out: Path, counts: Mapping[str, int], seconds: float) -> None:
    """Prints how long caching took, and adds it to features.json in the output folder."""
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"features: {words}, {seconds:.0f} s", flush=True)
    path = out / "features.json"
    earlier = read_json(path)["caching"] if path.is_file() else []
    row = {**counts, "seconds": seconds, "machine": machine()}
    write_json(path, {"caching": [*earlier, row]})


def propose(job: Job, data: Path, out: Path) -> None:
    """Trains the region proposal network for a job's splits and stores its proposals for both."""
    folder = job.proposals(out)
    # Returns at once if it is trained, and refuses one with other settings.
    _train(PROPOSALS, data, folder, out, job.train)
    recipe, model, identity = load_run(folder)
    recall(model, out)
    for split, path in zip((job.train, job.test), proposal_files(job, out), strict=True):
        if not path.is_file():
            images = task_of(recipe).proposal_set(data, split, identity)
            images.write(model, path, Processes(progress=True))


def proposal_files(job: Job, out: Path) -> tuple[Path, ...]:
    """Stored proposals for both splits of a job; none if its network has no RoI pooling."""
    if job.run.network not in POOLING:
        return ()
    return tuple(job.proposals(out) / f"{name}.safetensors" for name in ("train", "test"))


def proposals_digest(job: Job, out: Path) -> str | None:
    """SHA-256 of the stored proposals of a job; None if its network has no RoI pooling."""
    files = proposal_files(job, out)
    return StoredProposals(files).digest if files else None


def compute(job: Job, data: Path, out: Path) -> dict[str, Any]:
    """Trains the network of a job, or resumes it, scores it and stores the result."""
    begin = time.process_time()
    folder = job.folder(out)
    result = _train(job.recipe, data, folder, out, job.train, proposal_files(job, out))
    trained = time.process_time()
    previous_path(folder).unlink(missing_ok=True)  # for space
    found = {
        "name": job.name,
        "run": job.run.to_json(),
        "job": job.described(),
        "proposals": proposals_digest(job, out),
        **scored(job, data, out),
        "parameters": result.parameters,
        "seconds per step": result.seconds_per_iteration,
        "core seconds of training": trained - begin,
        "core seconds of scoring": time.process_time() - trained,
    }
    write_json(result_path(job, out), found)
    return found


def _train(
    recipe: Recipe | RPNRecipe,
    data: Path,
    folder: Path,
    out: Path,
    split: str,
    proposals: Sequence[Path] = (),
) -> Result:
    return train(
        recipe,
        data,
        folder,
        split=split,
        val_split=None,
        proposals=proposals,
        hardware=Hardware(accelerator="cpu", devices=1, workers=0),
        loop=LoopOptions(feature_cache=features(out), progress=False),
    )


def recall(model: nn.Module, out: Path) -> None:
    """Lets the frozen backbone of a network read its features from the cache."""
    backbone = cast(Model, model).backbone
    backbone.recall = FeatureCache(features(out), backbone, _CPU).recall


def scored(job: Job, data: Path, out: Path) -> dict[str, Any]:
    """Scores of a run in percent, also of small, medium and large objects; effective dilation."""
    recipe, model, identity = load_run(job.folder(out))
    task = task_of(recipe, TaskOptions(proposals=proposal_files(job, out)))
    recall(model, out)
    if job.run.network == "deeplab":
        predictor = task.predictor(model, identity, _CPU)
        scores = segmentation(predictor, open_segmentation(data, job.test))
    else:
        evaluated = task.evaluation_set(data, job.test, identity).evaluate(model, Processes())
        records = cast(ScoredDetections, evaluated).records
        scores = detection(records, open_detection(data, job.test))
    found: dict[str, Any] = {"scores": scores}
    if job.run.variant.layers:
        images = annotated(job.recipe, task.annotated(data, job.test, identity))
        backbone = cast(Model, model).backbone
        rows = dilation_statistics(model, images, stride=backbone.stride, call=backbone)
        found["dilation"] = [asdict(row) for row in rows]
    return found


def annotated(recipe: Recipe, images: AnnotatedImages) -> Iterator[AnnotatedImage]:
    """Images with the boxes of their objects, as the network sees them."""
    prepare = preparation(recipe.short_side, recipe.max_side, recipe.interpolation)
    for index in range(len(images)):
        image, truth = images[index]
        prepared = prepare(image)
        scale = math.sqrt(prepared[0].numel() / image[0].numel())
        boxes = truth.contents(images.countable or images.classes).boxes()
        yield AnnotatedImage(prepared, boxes, scale)


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


def detection(records: Sequence[Record], images: DetectionDataset) -> dict[str, float | None]:
    """VOC AP (area) of all objects, and by their size; None without objects."""
    truths = {
        images.name(index): GroundTruth(*map(as_array, images.annotations(index)))
        for index in range(len(images))
    }
    labels = {name: label for label, name in enumerate(images.classes)}
    predictions = {
        record.image: Predictions(
            record.boxes, record.scores, np.array([labels[c] for c in record.classes], np.int64)
        )
        for record in records
    }
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
