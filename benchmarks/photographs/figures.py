"""Figures 5, 6 and 7 of the paper, from trained runs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from benchmarks.photographs.plan import CONV, CONV_POOL, POOLING, Job, Run, jobs, result_path
from deformnet.engine import load_run
from deformnet.engine.runs import checkpoint_path
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.scenes import Scene, choose_scenes
from deformnet.inspection.runs import OpenedRun
from deformnet.models.detection.detector import Detector
from deformnet.recipes import DetectorRecipe
from deformnet.tasks import task_of
from deformnet.tasks.annotations import AnnotatedImages, Annotation
from deformnet.tasks.detection import DetectionPredictor
from deformnet.visualization import (
    SampledUnit,
    bins_figure,
    sampling_figure,
    save_figure,
    two_layer_figure,
)

_SCENES, _DETECTIONS = 2, 6
_GRAY = 96


def draw(out: Path, data: Path, *, photographs: bool) -> tuple[list[Path], list[str]]:
    """Draws Figures 5 and 6 from DeepLab, and 7 from R-FCN, of the first seed if it is finished.

    Args:
        photographs: draw over the photographs; otherwise over the boxes of their objects, for
            pages on which the photographs may not be shown.
    Returns:
        The files, in `out`, and what is missing for the other figures.
    """
    by_run = {job.run: job for job in jobs()}
    files, missing = list[Path](), list[str]()
    for names, run, drawn in (
        ("Figures 5 and 6", Run("deeplab", CONV, 0), _sampling),
        ("Figure 7", Run("rfcn", CONV_POOL, 0), _bins),
    ):
        job = by_run[run]
        if lacking := [path for path in _needed(job, out) if not path.is_file()]:
            missing.append(f"{names}: expected {lacking[0]}, but it is missing; train {run.name}")
            continue
        for name, figure in drawn(job, out, data, photographs).items():
            files.append(out / f"{name}.png")
            save_figure(figure, files[-1])
    return files, missing


def _needed(job: Job, out: Path) -> list[Path]:
    """A finished run has a result; its checkpoint may be gone, since only results are stored."""
    folders = [job.folder(out), *([job.proposals(out)] if job.run.network in POOLING else ())]
    return [result_path(job, out), *map(checkpoint_path, folders)]


def _sampling(job: Job, out: Path, data: Path, photographs: bool) -> dict[str, Figure]:
    run = OpenedRun(job.folder(out), "cpu")
    images = run.task.annotated(data, "val", run.data)
    recorder = UnitRecorder(run.network, run)
    contents = (
        (truth.contents(images.countable), recorder.grid(image)) for image, truth in _all(images)
    )
    sampled = _sampled(images, recorder, choose_scenes(contents, _SCENES), photographs)
    return {
        "figure5": two_layer_figure(_farthest(sampled)),
        "figure6": sampling_figure(sampled),
    }


def _bins(job: Job, out: Path, data: Path, photographs: bool) -> dict[str, Figure]:
    recipe, model, identity = load_run(job.folder(out))
    # It was trained on the proposals of this network.
    proposing = load_run(job.proposals(out)).model
    model.get_submodule("rpn").load_state_dict(proposing.get_submodule("rpn").state_dict())
    predictor = DetectionPredictor(
        cast(DetectorRecipe, recipe), cast(Detector, model), identity.classes, device="cpu"
    )
    images = task_of(job.recipe).annotated(data, "val")
    bins = find_bins(predictor, _all(images), _DETECTIONS)
    if not photographs:
        bins = [replace(one, image=_boxes_alone(one.image, one.box[None])) for one in bins]
    return {"figure7": bins_figure(bins)}


def _all(images: AnnotatedImages) -> Iterator[tuple[Tensor, Annotation]]:
    return (images[index] for index in range(len(images)))


def _sampled(
    images: AnnotatedImages, recorder: UnitRecorder, scenes: Sequence[Scene], photographs: bool
) -> dict[str, list[SampledUnit]]:
    """The units of scenes, with the offsets of their layers and without."""
    found: dict[str, list[SampledUnit]] = {"regular": [], "deformable": []}
    for scene in scenes:
        image, truth = images[scene.index]
        boxes = truth.contents(images.countable).boxes()
        shown = image if photographs else _boxes_alone(image, boxes)
        for name, units in found.items():
            own = recorder.samples(image, scene.units, zero_offsets=name == "regular")
            units += [replace(unit, image=shown) for unit in own]
    return found


def _farthest(sampled: Mapping[str, Sequence[SampledUnit]]) -> dict[str, Sequence[SampledUnit]]:
    """The two units on objects of the scene in which they are farthest apart.

    Each scene has a unit on the background, on a small and on a large object.
    """
    units = sampled["deformable"]
    first = max(
        range(1, len(units), 3),
        key=lambda place: math.dist(units[place].center, units[place + 1].center),
    )
    return {name: own[first : first + 2] for name, own in sampled.items()}


def _boxes_alone(image: Tensor, boxes: Tensor) -> Tensor:
    blank = torch.full_like(image, _GRAY)
    return draw_bounding_boxes(blank, boxes, colors="white", width=2) if len(boxes) else blank
