"""Recording what the units of a network sample, and their effective receptive fields."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from deformnet.analysis import SamplingLocations, effective_receptive_field, record_sampling
from deformnet.inspection.report.scenes import Grid, Unit
from deformnet.inspection.runs import OpenedRun
from deformnet.models import Network
from deformnet.nn import DeformConv2d
from deformnet.visualization import ReceptiveFieldMap, SampledUnit

_DEPTH = 3  # layers to follow samples through, as in Figure 6


class UnitRecorder:
    """Records the units of a network.

    Args:
        name: name of the network in figures.
        model: network to record in place of that of the run.
    Attributes:
        layers: names of the layers to follow samples through, the top one first.
    """

    def __init__(self, name: str, run: OpenedRun, model: Network | None = None) -> None:
        self.name = name
        self.run = run
        self.model = model or run.model
        self.layers = run.chain[:_DEPTH]

    def grid(self, image: Tensor) -> Grid:
        """Return the grid of units over an image."""
        return Grid.over(self.run.predictor.prepare(image), self.model.backbone.stride)

    def samples(
        self,
        image: Tensor,
        units: Sequence[Unit],
        *,
        zero_offsets: bool = False,
        kinds: bool = False,
    ) -> list[SampledUnit]:
        """Record what units of the top map sample in each layer, over an image uint8 [3, H, W].

        Args:
            zero_offsets: ignore the offsets.
            kinds: name the units by their kind only.
        """
        prepared = self.run.predictor.prepare(image)
        backbone = self.model.backbone
        stack = record_sampling(self.model, prepared.input, self.layers, call=backbone)
        sampled = []
        for unit in units:
            place = (unit.row, unit.column)
            levels = []
            for depth in range(1, len(self.layers) + 1):
                points, inside = stack.locations(place, depth=depth, zero_offsets=zero_offsets)
                points = prepared.to_image(points[0]).cpu()
                levels.append(SamplingLocations(points, inside[0].cpu()))
            center = torch.tensor(stack.center(place), dtype=torch.float64)
            y, x = prepared.to_image(center).tolist()
            sampled.append(SampledUnit(image, unit.kind if kinds else unit.title, (y, x), levels))
        return sampled

    def receptive_fields(self, image: Tensor, units: Sequence[Unit]) -> list[ReceptiveFieldMap]:
        """Compute the effective receptive fields of units, over the image at network resolution."""
        prepared = self.run.predictor.prepare(image)
        resized = F.resize(image, list(prepared.size), antialias=True)
        backbone, top = self.model.backbone, self.layers[0]
        stack = record_sampling(self.model, prepared.input, [top], call=backbone)
        maps = []
        for unit in tqdm(units, desc=f"receptive fields, {self.name}", disable=None):
            place = (unit.row, unit.column)
            field = effective_receptive_field(self.model, prepared.input, top, place, call=backbone)
            maps.append(ReceptiveFieldMap(resized, unit.title, stack.center(place), field))
        return maps

    def without_offsets(self) -> "UnitRecorder":
        """Return a recorder of the same network with the offsets of its convolutions at zero."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, DeformConv2d):
                for parameter in module.conv_offset.parameters():
                    nn.init.zeros_(parameter)
        return UnitRecorder("offsets at zero", self.run, model)
