"""What a network did with an image, kept so that any number of questions cost no further run."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis import (
    FilterMap,
    MovedBins,
    SamplingLocations,
    SamplingStack,
    moved_bins,
    record_filters,
    record_sampling,
)
from deformnet.inference import DetectionPredictor, Prepared, SegmentationPredictor, open_predictor
from deformnet.models.classifier import Classifier
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Detections, Detector, Features
from deformnet.models.detection.faster_rcnn import FasterRCNN
from deformnet.models.detection.rfcn import RFCN
from deformnet.models.detection.rpn import RPNDetector
from deformnet.nn import DeformConv2d

MOST_POINTS = 100_000
"""Sampling locations of a unit; a depth with more is not offered."""
LEAST_SCORE = 0.05
MOST_DETECTIONS = 100
"""Detections that can be looked at: the best, if they score more than `LEAST_SCORE`."""

Point = tuple[float, float]
"""(y, x) in pixels of the image; whole numbers are centres of pixels."""


class Sampling(NamedTuple):
    """What one unit samples.

    Attributes:
        centre: of the unit.
        levels: its samples in the map below, in the next one, and so on; `points` [P, 2] are in
            pixels of the image, `inside` [P].
    """

    centre: Point
    levels: tuple[SamplingLocations, ...]


class FilterRow(NamedTuple):
    """A deformable layer at a point; the mean over its offset groups.

    Attributes:
        layer: its name.
        dilation: the effective dilation of the filter there.
        image: the mean of it over the image.
        at_rest: the dilation of the layer.
        shift: how far the filter's taps are moved in the mean, in cells of the layer's input.
    """

    layer: str
    dilation: float
    image: float
    at_rest: int
    shift: float


@dataclass(frozen=True)
class Look:
    """What a network did with one image; all of it is on the CPU, in pixels of the image.

    Attributes:
        found: the label map uint8 [H, W], the detections, or the probability of each class.
        bins: of the detections, if their pooling is deformable: plain [D, ph, pw, 4] and moved, of
            each detection's class.
        frame: the part of the image that the network saw, x1 y1 x2 y2 (a classifier sees the
            square in the middle).
    """

    found: Tensor | Detections
    bins: tuple[Tensor, Tensor] | None
    frame: tuple[float, float, float, float]
    _prepared: Prepared
    _stack: SamplingStack
    _filters: Mapping[str, FilterMap]

    def sampling(self, point: Point, depth: int) -> Sampling:
        """What the unit of the top layer nearest to a point samples, `depth` layers down.

        Raises:
            ValueError: if there are not so many layers.
        """
        unit = self._stack.unit_at(self._prepared.to_input(point))
        y, x = self._prepared.to_image(torch.tensor(self._stack.centre(unit)).double()).tolist()
        levels = []
        for level in range(1, depth + 1):
            points, inside = self._stack.locations(unit, depth=level)
            levels.append(
                SamplingLocations(self._prepared.to_image(points[0].cpu()), inside[0].cpu())
            )
        return Sampling((y, x), tuple(levels))

    def filters(self, point: Point) -> list[FilterRow]:
        """The deformable layers, the top one first, at the unit of each nearest to a point."""
        rows = []
        for name in reversed(tuple(self._filters)):
            maps = self._filters[name]
            row, column = maps.unit_at(self._prepared.to_input(point))
            dilation, shift = (
                float(values[0, :, row, column].mean()) for values in (maps.dilation, maps.shift)
            )
            rows.append(
                FilterRow(name, dilation, float(maps.dilation.mean()), maps.at_rest[0], shift)
            )
        return rows

    def detection_at(self, point: Point, least_score: float) -> int | None:
        """The smallest box around a point, of those that score enough: the one in front."""
        if not isinstance(self.found, Detections):
            return None
        y, x = (place + 0.5 for place in point)
        x1, y1, x2, y2 = self.found.boxes.unbind(1)
        around = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2) & (self.found.scores >= least_score)
        if not around.any():
            return None
        area = (x2 - x1) * (y2 - y1)
        return int(area.where(around, torch.inf).argmin())


class Network:
    """A run, opened to be looked into.

    Args:
        run: a run folder, or the file of an exported run.
        device: where to compute; None takes a GPU if there is one.
    Attributes:
        deformable: names of its deformable convolutions.
        pool: name of its deformable RoI pooling, or None.
        depths: how many layers there are to follow samples through.
    Raises:
        FileNotFoundError, ValueError: as `open_predictor`; also for a region proposal network
            alone, which has no such layers.
    """

    def __init__(self, run: Path, device: torch.device | str | None = None) -> None:
        self.predictor = open_predictor(run, device=device)
        model = self.predictor.model
        if isinstance(model, RPNDetector) and not model.class_aware:
            raise ValueError(
                f"{run}: a network that only proposes boxes does not run conv5, where deformable "
                "layers are"
            )
        assert isinstance(model, DeepLab | Detector | Classifier)
        self.run = run
        self.model = model
        self.deformable = [
            name for name, layer in model.named_modules() if isinstance(layer, DeformConv2d)
        ]
        self.pool = _pooling(model)
        chain = [f"backbone.{name}" for name in model.backbone.filter_chain()]
        self._chain = chain[: _depths([model.get_submodule(name) for name in chain])]
        self.depths = len(self._chain)
        # Two browsers may ask at once, and what watches the layers would see both runs.
        self._alone = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictor.classes

    def look(self, image: Tensor) -> Look:
        """Runs the network once.

        Args:
            image: uint8 [3, H, W].
        """
        with self._alone, torch.no_grad():
            return self._look(image)

    def _look(self, image: Tensor) -> Look:
        prepared = self.predictor.prepare(image)
        outputs: list[Tensor | Features] = []
        filters: dict[str, FilterMap] = {}

        def run(batch: Tensor) -> None:
            model = self.model
            outputs.append(model.features(batch) if isinstance(model, Detector) else model(batch))

        def run_watched(batch: Tensor) -> None:
            if self.deformable:
                filters.update(record_filters(self.model, batch, call=run))
            else:
                run(batch)

        stack = record_sampling(self.model, prepared.input, self._chain, call=run_watched)
        (output,) = outputs
        height, width = image.shape[1:]
        bins = None
        if isinstance(output, Features):
            found = self._detections(output, prepared, (height, width))
            bins = self._bins(output, found, prepared)
        elif isinstance(self.predictor, SegmentationPredictor):
            found = self.predictor.labels(output, (height, width))
        else:
            found = output.softmax(dim=1)[0].cpu()
        h, w = prepared.size
        (y1, x1), (y2, x2) = (
            prepared.to_image(torch.tensor([[-0.5, -0.5], [h - 0.5, w - 0.5]])) + 0.5
        )
        frame = (float(x1), float(y1), float(x2), float(y2))
        return Look(found, bins, frame, prepared, stack, filters)

    def _detections(
        self, features: Features, prepared: Prepared, size: tuple[int, int]
    ) -> Detections:
        """The best detections."""
        assert isinstance(self.predictor, DetectionPredictor)
        found = self.predictor.detect(features, prepared.size, size)
        count = min(MOST_DETECTIONS, int((found.scores >= LEAST_SCORE).sum()))
        return Detections(*(values[:count] for values in found))

    def _bins(
        self, features: Features, found: Detections, prepared: Prepared
    ) -> tuple[Tensor, Tensor] | None:
        """The bins of detections, plain and moved as their classes move them."""
        if self.pool is None:
            return None
        assert isinstance(self.model, Detector)
        scale = torch.tensor([*reversed(prepared.scale)] * 2)
        boxes = (found.boxes * scale).to(prepared.input)
        bins: MovedBins = moved_bins(
            self.model,
            self.pool,
            *(features, [prepared.size], [boxes]),
            call=self.model.candidates,
        )
        moved = bins.of_groups(found.labels + 1)  # those of the background come first
        return bins.plain.cpu() / scale, moved.cpu() / scale


def open_networks(
    run: Path, plain: Path | None, device: torch.device | str | None = None
) -> tuple[Network, Network | None]:
    """A run with deformable layers, and its plain twin if there is one.

    Raises:
        FileNotFoundError, ValueError: as `Network`; also if the first has no deformable layers, the
            second has some, or they are not of the same kind or do not know the same classes.
    """
    network = Network(run, device)
    if not network.deformable and network.pool is None:
        raise ValueError(
            f"{run}: has no deformable layers, so there is nothing to see; "
            "name a deformable run, and this one as its --plain twin"
        )
    if plain is None:
        return network, None
    twin = Network(plain, device)
    kinds = [type(it.model).__name__ for it in (network, twin)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"plain: wanted a run of {kinds[0]} as {run} is, {plain} is of {kinds[1]}")
    if network.classes != twin.classes:
        raise ValueError(
            f"plain: {plain} knows other classes ({', '.join(twin.classes)}) "
            f"than {run} ({', '.join(network.classes)})"
        )
    if twin.deformable or twin.pool is not None:
        count = len(twin.deformable) + (twin.pool is not None)
        raise ValueError(f"plain: wanted a plain network, {plain} has {count} deformable layers")
    return network, twin


def _pooling(model: nn.Module) -> str | None:
    """The deformable RoI pooling that class scores come from."""
    if isinstance(model, RFCN) and model.score_pool is not None:
        return "score_pool"
    if isinstance(model, FasterRCNN) and model.deform_pool is not None:
        return "deform_pool"
    return None


def _depths(chain: Sequence[nn.Module]) -> int:
    """How many layers samples can be followed through before they become too many."""
    points = 1
    for depth, layer in enumerate(chain):
        groups = layer.offset_groups if isinstance(layer, DeformConv2d) else 1
        points *= 9 * groups
        if points > MOST_POINTS and depth:
            return depth
    return len(chain)
