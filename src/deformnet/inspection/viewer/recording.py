"""A forward pass over an image, recorded so that no question about it needs another one."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis import (
    DilationMap,
    SamplingLocations,
    SamplingStack,
    dilation_maps,
    record_sampling,
)
from deformnet.inspection.runs import OpenedRun
from deformnet.nn import DeformConv2d
from deformnet.tasks.annotations import Annotation
from deformnet.tasks.predictor import Bins, Inference, Prepared

MOST_POINTS = 100_000
"""Maximum number of sampling locations of a unit; deeper layers are not offered."""
LEAST_SCORE = 0.05
"""Minimum score of detections that can be shown."""
MOST_DETECTIONS = 100
"""Maximum number of detections that can be shown."""

# Two browsers may ask at once, and each recording would see both passes.
_recording = threading.Lock()

Point = tuple[float, float]
"""(y, x) in pixels of the image; whole numbers are centers of pixels."""


class UnitSamples(NamedTuple):
    """Sampling locations of a unit.

    Attributes:
        center: of the unit.
        levels: its samples one layer below, two layers below, and so on: `points` [P, 2] in pixels
            of the image, and `inside` [P].
    """

    center: Point
    levels: tuple[SamplingLocations, ...]


class FilterRow(NamedTuple):
    """A deformable layer at a point; means over its offset groups.

    Attributes:
        layer: name of the layer.
        dilation: effective dilation of the filter there.
        image: its mean over the image.
        layer_dilation: dilation of the layer.
        shift: mean shift of the filter's taps, in pixels of the layer's input.
    """

    layer: str
    dilation: float
    image: float
    layer_dilation: int
    shift: float


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass over one image; everything is on the CPU, in pixels of the image.

    Attributes:
        prediction: the prediction; of detections, those that can be shown.
        bins: bins of the detections, if RoI pooling is deformable.
        frame: part of the image that the network saw, x1, y1, x2, y2 (a classifier sees the central
            square).
    """

    prediction: Annotation
    bins: Bins | None
    frame: tuple[float, float, float, float]
    _prepared: Prepared
    _stack: SamplingStack
    _filters: Mapping[str, DilationMap]

    def samples(self, point: Point, depth: int) -> UnitSamples:
        """Return the sampling locations of the top unit nearest to a point, `depth` layers down.

        Raises:
            ValueError: if there are fewer layers.
        """
        unit = self._stack.unit_at(self._prepared.to_input(point))
        y, x = self._prepared.to_image(torch.tensor(self._stack.center(unit)).double()).tolist()
        levels = []
        for level in range(1, depth + 1):
            points, inside = self._stack.locations(unit, depth=level)
            points = self._prepared.to_image(points[0].cpu())
            levels.append(SamplingLocations(points, inside[0].cpu()))
        return UnitSamples((y, x), tuple(levels))

    def filters(self, point: Point) -> list[FilterRow]:
        """Return the deformable layers, the top one first, at the units nearest to a point."""
        rows = []
        for name, maps in reversed(list(self._filters.items())):
            row, column = maps.unit_at(self._prepared.to_input(point))
            dilation, shift = (
                float(values[0, :, row, column].mean()) for values in (maps.dilation, maps.shift)
            )
            rows.append(
                FilterRow(
                    name, dilation, float(maps.dilation.mean()), maps.layer_dilation[0], shift
                )
            )
        return rows

    def detection_at(self, point: Point, least_score: float) -> int | None:
        """Return the index of the smallest box around a point, of those with enough score."""
        if self.prediction.scores is None:
            return None
        y, x = (place + 0.5 for place in point)
        x1, y1, x2, y2 = self.prediction.boxes.unbind(1)
        around = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
        around &= self.prediction.scores >= least_score
        if not around.any():
            return None
        area = (x2 - x1) * (y2 - y1)
        return int(area.where(around, torch.inf).argmin())


def record_pass(run: OpenedRun, image: Tensor) -> ForwardPass:
    """Run a network once on an image uint8 [3, H, W]."""
    with _recording, torch.no_grad():
        return _record(run, image)


def _record(run: OpenedRun, image: Tensor) -> ForwardPass:
    prepared = run.predictor.prepare(image)
    height, width = image.shape[1:]
    passes: list[Inference] = []
    filters: dict[str, DilationMap] = {}

    def infer(batch: Tensor) -> None:
        passes.append(run.predictor.infer(prepared._replace(input=batch), (height, width)))

    def infer_with_filters(batch: Tensor) -> None:
        if run.deformable:
            filters.update(dilation_maps(run.model, batch, call=infer))
        else:
            infer(batch)

    chain = run.chain[: depth_limit(run)]
    stack = record_sampling(run.model, prepared.input, chain, call=infer_with_filters)
    (inference,) = passes
    prediction = inference.annotation.best(MOST_DETECTIONS, LEAST_SCORE)
    h, w = prepared.size
    corners = torch.tensor([[-0.5, -0.5], [h - 0.5, w - 0.5]])
    (y1, x1), (y2, x2) = (prepared.to_image(corners) + 0.5).tolist()
    bins = inference.bins(prediction)
    return ForwardPass(prediction, bins, (x1, y1, x2, y2), prepared, stack, filters)


def depth_limit(run: OpenedRun) -> int:
    """Return the number of layers to follow samples through before they become too many."""
    points = 1
    for depth, name in enumerate(run.chain):
        layer: nn.Module = run.model.get_submodule(name)
        points *= 9 * (layer.offset_groups if isinstance(layer, DeformConv2d) else 1)
        if points > MOST_POINTS and depth:
            return depth
    return len(run.chain)
