"""The networks of Table 4 (Dai et al. 2017), plain and deformable, prepared for timing.

Random weights alone would measure something else: through 33 residual blocks whose batch norm has
never seen data, activations grow to tens of thousands; offsets computed from them leave the map,
where nothing is read, and no box is proposed. Therefore batch norm takes the statistics of one
image, and offsets get a magnitude that trained networks have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deformnet.models import Network
from deformnet.nn.offsets import OffsetLayer
from deformnet.paper.rows import CITYSCAPES, VOC_DETECTION, VOC_SEGMENTATION, DataSet
from deformnet.paper.settings import Table4Network, TimingOptions
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
)
from deformnet.tasks import task_of
from deformnet.tasks.base import DataIdentity
from deformnet.tasks.predictor import Predictor, Prepared

OFFSETS = 2.0
"""Standard deviation of the offsets: pixels of the map in a convolution, tenths of the box in
pooling."""


@dataclass(frozen=True)
class Case:
    """A network of Table 4 with and without deformable layers.

    Attributes:
        plain, deformable: recipes; the second has three deformable convolutions, and deformable
            RoI pooling if it pools.
        data: data set.
        photo: height and width of an image of the data set, before resizing.
    """

    plain: Recipe
    deformable: Recipe
    data: DataSet
    photo: tuple[int, int]


# The paper does not state the image sizes. These follow its settings of the shorter side
# (section 4) on an image of the data set.
_CASES: dict[Table4Network, tuple[Recipe, DataSet, tuple[int, int]]] = {
    "deeplab-cityscapes": (DeepLabRecipe(short_side=1024, max_side=2048), CITYSCAPES, (1024, 2048)),
    "deeplab-voc": (DeepLabRecipe(short_side=360, max_side=600), VOC_SEGMENTATION, (375, 500)),
    "class-aware-rpn": (ClassAwareRPNRecipe(), VOC_DETECTION, (300, 500)),
    "faster-rcnn": (FasterRCNNRecipe(), VOC_DETECTION, (300, 500)),
    "rfcn": (RFCNRecipe(), VOC_DETECTION, (300, 500)),
}


def case(network: Table4Network, options: TimingOptions) -> Case:
    """Return a network of Table 4 with the backbone and the image scale of the options."""
    recipe, data, (height, width) = _CASES[network]
    recipe = replace(recipe, backbone=options.backbone).scaled(options.scale)
    photo = round(options.scale * height), round(options.scale * width)
    return Case(recipe.baseline(), recipe, data, photo)


@dataclass(frozen=True)
class Networks:
    """The two networks of a case with an image.

    Attributes:
        plain, deformable: predictors.
        photo: uint8 [3, H, W], random pixels.
        prepared: input of both networks.
    """

    plain: Predictor
    deformable: Predictor
    photo: Tensor
    prepared: Prepared


def build(case: Case, device: torch.device) -> Networks:
    """Build the plain and the deformable network of a case, in evaluation mode.

    They share all weights that both have, so that detectors propose the same boxes.
    """
    photo = torch.randint(256, (3, *case.photo), dtype=torch.uint8)
    torch.manual_seed(0)
    plain, deformable = (
        _predictor(recipe, case.data, device) for recipe in (case.plain, case.deformable)
    )
    networks = Networks(plain, deformable, photo, plain.prepare(photo))
    with torch.no_grad():
        set_statistics(cast(Network, plain.model).backbone, networks.prepared.input)
        deformable.model.load_state_dict(plain.model.state_dict(), strict=False)
    set_offsets(deformable.model, lambda: forward(deformable, networks.prepared))
    return networks


@torch.no_grad()
def set_offsets(model: nn.Module, call: Callable[[], object]) -> None:
    """Draw the weights of offset layers, so that offsets are as large as in trained networks.

    Args:
        model: network with deformable layers.
        call: runs it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, OffsetLayer)]
    for layer in layers:
        nn.init.normal_(layer.get_parameter("weight"))
    hooks = [layer.register_forward_hook(_set_offsets) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()


def forward(predictor: Predictor, prepared: Prepared) -> object:
    """Run the network alone: to logits, or to boxes before non-maximum suppression."""
    return predictor.model(*predictor.arguments(prepared))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_sound(name: str, output: object) -> None:
    """Check that the output of a network is worth timing.

    Raises:
        FloatingPointError: if it holds NaN or infinity.
        RuntimeError: if it holds no boxes.
    """
    tensors: list[Tensor] = tree_leaves(output)
    if not all(tensor.numel() for tensor in tensors):
        raise RuntimeError(f"{name}: the network proposes no boxes, nothing to time")
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError(f"{name}: the output of the network is not finite")


def _predictor(recipe: Recipe, data: DataSet, device: torch.device) -> Predictor:
    classes = tuple(map(str, range(data.classes)))
    model = recipe.build_model(data.classes)
    return task_of(recipe).predictor(model, DataIdentity(classes, 1, ""), device)


def set_statistics(backbone: nn.Module, images: Tensor) -> None:
    """Set batch norm to the statistics of the images."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # replaces the old statistics
        norm.train()
    backbone(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _set_offsets(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Scale the weights of an offset layer, in which its offsets are linear."""
    factor = OFFSETS / output.std()
    layer.get_parameter("weight").mul_(factor)
    return output * factor
