"""Figures 5, 6 and 7 of the paper, from trained runs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from benchmarks.photographs.plan import CONV, CONV_POOL, Run
from deformnet._errors import UserError
from deformnet.inspection.report.bins import find_bins
from deformnet.inspection.report.recording import UnitRecorder
from deformnet.inspection.report.scenes import Scene, choose_scenes
from deformnet.inspection.runs import OpenedRun
from deformnet.tasks.annotations import AnnotatedImages, Annotation
from deformnet.visualization import (
    SampledUnit,
    bins_figure,
    sampling_figure,
    save_figure,
    two_layer_figure,
)

_RUNS = (Run("rfcn", CONV_POOL, 0), Run("deeplab", CONV, 0))
_SCENES, _DETECTIONS = 2, 6
_GRAY = 96


def draw(out: Path, data: Path, *, photographs: bool) -> list[Path]:
    """Draws the figures of the first runs that are finished, R-FCN's before DeepLab's.

    Args:
        photographs: draw over the photographs; otherwise over the boxes of their objects, for
            pages on which the photographs may not be shown.
    Returns:
        The files, in `out`.
    Raises:
        UserError: if no such run is finished.
    """
    folders = [folder for run in _RUNS if (folder := out / "runs" / run.name).is_dir()]
    if not folders:
        raise UserError(
            f"{out}: expected a finished run to draw, {' or '.join(run.name for run in _RUNS)}, "
            "but got none"
        )
    run = OpenedRun(folders[0], "cpu")
    images = run.task.annotated(data, "val", run.data)
    recorder = UnitRecorder(run.network, run)
    objects = images.countable or images.classes
    scenes = choose_scenes(
        ((truth.contents(objects), recorder.grid(image)) for image, truth in _all(images)), _SCENES
    )
    sampled = _sampled(images, recorder, scenes, photographs)
    figures = {
        "figure5": two_layer_figure(_farthest(sampled)),
        "figure6": sampling_figure(sampled),
    }
    if run.predictor.pooling is not None:
        bins = find_bins(run.predictor, _all(images), _DETECTIONS)
        if not photographs:
            bins = [replace(one, image=_boxes_alone(one.image, one.box[None])) for one in bins]
        figures["figure7"] = bins_figure(bins)
    files = []
    for name, figure in figures.items():
        files.append(out / f"{name}.png")
        save_figure(figure, files[-1])
    return files


def _all(images: AnnotatedImages) -> Iterator[tuple[Tensor, Annotation]]:
    return (images[index] for index in range(len(images)))


def _sampled(
    images: AnnotatedImages, recorder: UnitRecorder, scenes: Sequence[Scene], photographs: bool
) -> dict[str, list[SampledUnit]]:
    """The units of scenes, with the offsets of their layers and without."""
    found: dict[str, list[SampledUnit]] = {"regular": [], "deformable": []}
    for scene in scenes:
        image, truth = images[scene.index]
        boxes = truth.contents(images.countable or images.classes).boxes()
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
