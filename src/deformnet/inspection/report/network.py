"""A trained network, and how to look into it."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from deformnet.analysis import effective_receptive_field, record_sampling
from deformnet.inference import DetectionPredictor, SegmentationPredictor
from deformnet.inspection.report.parts import pooling_layer
from deformnet.inspection.report.scenes import Grid, Unit, look
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Detector
from deformnet.nn import DeformConv2d
from deformnet.visualization import ReceptiveFieldMap, SampledUnit

_DEPTH = 3  # layers whose samples are followed, as in Figure 6

Predictor = SegmentationPredictor | DetectionPredictor


class Network:
    """A network by name, and how to look into it."""

    def __init__(
        self, name: str, predictor: Predictor, model: DeepLab | Detector | None = None
    ) -> None:
        self.name = name
        self.predictor = predictor
        self.model = model or predictor.model
        chain = predictor.model.backbone.filter_chain()[:_DEPTH]
        self.layers = tuple(f"backbone.{layer}" for layer in chain)
        self.deforms = any(isinstance(m, DeformConv2d) for m in self.model.modules())
        self.pooling = pooling_layer(self.model)

    def grid(self, image: Tensor) -> Grid:
        return Grid.over(self.predictor.prepare(image), self.model.backbone.stride)

    def looks(
        self, image: Tensor, units: Sequence[Unit], *, at_rest: bool = False, kinds: bool = False
    ) -> list[SampledUnit]:
        """What units sample; `kinds` names them by their kind alone."""
        prepared = self.predictor.prepare(image)
        stack = record_sampling(self.model, prepared.input, self.layers, call=self.model.backbone)
        return [
            look(image, prepared, stack, it, what=it.kind if kinds else None, at_rest=at_rest)
            for it in units
        ]

    def heats(self, image: Tensor, units: Sequence[Unit]) -> list[ReceptiveFieldMap]:
        """The effective receptive fields of units, over the image as the network sees it."""
        prepared = self.predictor.prepare(image)
        small = F.resize(image, list(prepared.size), antialias=True)
        stack = record_sampling(
            self.model, prepared.input, self.layers[:1], call=self.model.backbone
        )
        heats = []
        for unit in tqdm(units, desc=f"receptive fields, {self.name}", disable=None):
            place = (unit.row, unit.column)
            field = effective_receptive_field(
                self.model, prepared.input, self.layers[0], place, call=self.model.backbone
            )
            heats.append(ReceptiveFieldMap(small, unit.what, stack.centre(place), field))
        return heats

    def at_rest(self) -> "Network":
        """The same with all offsets of its convolutions zero."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, DeformConv2d):
                for numbers in module.conv_offset.parameters():
                    nn.init.zeros_(numbers)
        return Network("offsets at zero", self.predictor, model)
