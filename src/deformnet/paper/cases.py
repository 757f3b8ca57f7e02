"""The networks of Table 4 (Dai et al. 2017), plain and deformable, ready to be timed.

Random weights alone would measure something else. Through 33 residual blocks whose batch norm has
never seen data, activations grow to tens of thousands; offsets made from them leave the map, where
nothing is read, and no box is proposed. So batch norm gets the statistics of one image, and offsets
a size that trained networks have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from deformnet.data.transforms import segmentation_evaluation_transforms
from deformnet.models.deeplab import DeepLab
from deformnet.models.detection.detector import Candidates, Detector, Size
from deformnet.nn.offsets import OffsetLayer
from deformnet.paper.settings import Table4Network
from deformnet.recipes import (
    BackboneName,
    ClassAwareRPNRecipe,
    DeepLabRecipe,
    DetectorRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
)

OFFSETS = 2.0
"""Standard deviation of the offsets: pixels of the map in a convolution, tenths of the box in
pooling."""


@dataclass(frozen=True)
class Case:
    """Two networks that differ in their deformable layers alone, and the size of an image.

    Attributes:
        plain, deformable: their recipes; the second has three deformable convolutions, and
            deformable pooling if it pools.
        classes: as `build_model` counts them, with DeepLab's background.
        photo: height and width of the image before it is resized.
    """

    plain: DeepLabRecipe | DetectorRecipe
    deformable: DeepLabRecipe | DetectorRecipe
    classes: int
    photo: Size


def case(row: Table4Network, backbone: BackboneName, scale: float = 1.0) -> Case:
    """The networks of a row of Table 4.

    DeepLab on Cityscapes sees the images as they are, 1024x2048; on VOC, 375x500 pixels become
    360x480; detectors see 600x1000, of 300x500. The paper does not give its sizes of images; these
    are its settings of the shorter side (section 4), on an image of the data set.

    Args:
        row: of the table.
        backbone: as in recipes.
        scale: factor on the sides of the images.
    """
    if row == "deeplab-cityscapes":
        recipe, photo, classes = DeepLabRecipe(short_side=1024, max_side=2048), (1024, 2048), 19
        plain = replace(recipe, deform_layers=0)
    elif row == "deeplab-voc":
        recipe, photo, classes = DeepLabRecipe(short_side=360, max_side=600), (375, 500), 21
        plain = replace(recipe, deform_layers=0)
    else:
        photo, classes = (300, 500), 20
        if row == "class-aware-rpn":
            recipe = ClassAwareRPNRecipe()
            plain = replace(recipe, deform_layers=0)
        elif row == "faster-rcnn":
            recipe = FasterRCNNRecipe()
            plain = replace(recipe, deform_layers=0, pool="max")
        else:
            recipe = RFCNRecipe()
            plain = replace(recipe, deform_layers=0, pool="average")
    sides: dict[str, Any] = {
        "backbone": backbone,
        "short_side": round(scale * recipe.short_side),
        "max_side": None if recipe.max_side is None else round(scale * recipe.max_side),
    }
    height, width = (round(scale * side) for side in photo)
    return Case(replace(plain, **sides), replace(recipe, **sides), classes, (height, width))


def prepared(chosen: Case, photo: Tensor) -> Tensor:
    """An image uint8 [3, H, W] as the network takes it: resized, normalised, float32 [3, h, w]."""
    recipe = chosen.plain
    prepare = segmentation_evaluation_transforms(
        short_side=recipe.short_side, max_side=recipe.max_side
    )
    nothing = tv_tensors.Mask(torch.zeros(photo.shape[1:], dtype=torch.uint8))
    return prepare(tv_tensors.Image(photo), nothing)[0]


def build(chosen: Case, images: Tensor) -> tuple[DeepLab | Detector, DeepLab | Detector]:
    """The plain and the deformable network, in evaluation mode, where the images are.

    They share all weights that both have, so detectors propose the same boxes.

    Args:
        chosen: which networks.
        images: float32 [N, 3, h, w], normalised; batch norm gets their statistics.
    """
    torch.manual_seed(0)
    plain, deformable = (
        recipe.build_model(chosen.classes)
        .to(images.device)
        .to(memory_format=torch.channels_last)
        .eval()
        for recipe in (chosen.plain, chosen.deformable)
    )
    assert isinstance(plain, (DeepLab, Detector))
    assert isinstance(deformable, (DeepLab, Detector))
    with torch.no_grad():
        _settle(plain, images)
        deformable.load_state_dict(plain.state_dict(), strict=False)
        layers = [layer for layer in deformable.modules() if isinstance(layer, OffsetLayer)]
        for layer in layers:
            nn.init.normal_(layer.get_parameter("weight"))
        hooks = [layer.register_forward_hook(_set_offsets) for layer in layers]
        forward(deformable, images)()
        for hook in hooks:
            hook.remove()
    return plain, deformable


def forward(model: DeepLab | Detector, images: Tensor) -> Callable[[], Tensor | list[Candidates]]:
    """The network's forward pass on [N, 3, h, w]: to scores, or to boxes before suppression."""
    if isinstance(model, DeepLab):
        return lambda: model(images)
    sizes = [(images.shape[2], images.shape[3])] * len(images)
    return lambda: model(images, sizes)


def require_sound(name: str, found: Tensor | list[Candidates]) -> None:
    """Refuses outputs whose timing would mean nothing.

    Raises:
        FloatingPointError: if they hold NaN or infinity.
        RuntimeError: if a detector has found no boxes.
    """
    if isinstance(found, Tensor):
        parts = [found]
    else:
        parts = [part for image in found for part in image]
        if any(not len(part) for part in parts):
            raise RuntimeError(f"{name}: the network proposes no boxes, there is nothing to time")
    if not all(part.isfinite().all() for part in parts):
        raise FloatingPointError(f"{name}: the network's output is not finite")


def _settle(model: DeepLab | Detector, images: Tensor) -> None:
    """Gives batch norm the statistics of the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # takes them over as they are
        norm.train()
    model.backbone(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        norm.eval()


def _set_offsets(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook that gives the offsets of a layer their size; they are linear in its weights."""
    factor = OFFSETS / output.std()
    layer.get_parameter("weight").mul_(factor)
    return output * factor
