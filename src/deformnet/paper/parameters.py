"""How large the paper's networks are, beside its own counts (Tables 4 and 7)."""

from dataclasses import dataclass

import torch
from torch import nn

from deformnet.recipes import (
    BackboneName,
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    recipe_from_dict,
)

# Millions, plain and deformable, for 20 classes on ResNet-101.
_TABLE4: dict[type[Recipe], tuple[float, float]] = {
    DeepLabRecipe: (46.0, 46.1),
    ClassAwareRPNRecipe: (46.0, 46.1),
    FasterRCNNRecipe: (58.3, 59.9),
    RFCNRecipe: (47.1, 49.5),
}
# Millions, with a classifier of 1000 classes.
_TABLE7: dict[BackboneName, float] = {"resnet101": 46.0, "aligned-inception-resnet": 64.3}
_OF_PAPER = (20, "resnet101")
_EXPLANATION = """\
In brackets the paper's counts. Its region proposal networks are trained apart and are not in them.
ResNet-101 itself has 1.45 M more in the paper (Table 7) than in torchvision's and He et al.'s
network; but for these the plain DeepLab, Faster R-CNN and R-FCN agree to 0.2 M. What they are, the
paper does not say. Of class-aware RPN the paper seems to leave out the 3x3 convolution of the head
(4.72 M). What deformable layers add agrees for R-FCN (2.459 for 2.4); for the others it lies
outside the rounding of the paper's numbers: three offset convolutions of 18 channels on 512 are
0.249 M by themselves, and with the fully connected layer of Faster R-CNN's pooling 1.478 M."""


@dataclass(frozen=True)
class Count:
    """Parameters of a plain and of a deformable network that differ in nothing else.

    Attributes:
        plain, deformable: of the whole networks.
        rpn: of the region proposal network inside each, for a detector of two stages; else 0.
    """

    plain: int
    deformable: int
    rpn: int


def parameter_counts(num_classes: int, recipe: Recipe) -> Count:
    """Parameters with and without deformable layers.

    Deformable are the last three convolutions, and the pooling where there is one.

    Args:
        num_classes: classes of objects; DeepLab has the background besides.
        recipe: of the network.
    """
    classes = num_classes + isinstance(recipe, DeepLabRecipe)
    counts, rpn = [], 0
    for layers, pool in ((0, "average"), (3, "deformable")):
        values = recipe.to_dict() | {"deform_layers": layers}
        if "pool" in values:
            values["pool"] = pool
        with torch.device("meta"):  # counting needs no memory
            model = recipe_from_dict(values, source="parameters").build_model(classes)
        counts.append(_count(model))
        if "pool" in values:
            rpn = _count(model.get_submodule("rpn"))
    plain, deformable = counts
    return Count(plain, deformable, rpn)


def classifier_parameters(backbone: BackboneName, num_classes: int = 1000) -> int:
    """Parameters of a classification network."""
    with torch.device("meta"):
        return _count(ClassifierRecipe(backbone=backbone).build_model(num_classes))


def parameter_table(num_classes: int, backbone: BackboneName) -> str:
    """The counts of all networks, as tables for a terminal, beside the paper's where it has any."""
    compared = (num_classes, backbone) == _OF_PAPER
    heading = f"{'plain':>14}  {'deformable':>14}  {'difference':>14}  {'RPN besides':>11}"
    lines = [
        f"{num_classes} classes, {backbone}, one offset group; millions of parameters",
        f"{'network':16}  {heading}",
    ]
    for network, paper in _TABLE4.items():
        found = parameter_counts(num_classes, network(backbone=backbone))
        plain, deformable = found.plain - found.rpn, found.deformable - found.rpn
        published = (*paper, paper[1] - paper[0]) if compared else (None, None, None)
        cells = (
            _cell(ours, theirs)
            for ours, theirs in zip((plain, deformable, deformable - plain), published, strict=True)
        )
        rpn = f"{found.rpn / 1e6:.3f}" if found.rpn else "-"
        lines.append(f"{network.network:16}  {'  '.join(cells)}  {rpn:>11}")
    lines += ["", "classifiers of 1000 classes"]
    lines += [
        f"{name:26}  {_cell(classifier_parameters(name), theirs)}"
        for name, theirs in _TABLE7.items()
    ]
    if compared:
        lines += ["", _EXPLANATION]
    return "\n".join(lines)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _cell(ours: int, theirs: float | None) -> str:
    paper = "" if theirs is None else f" ({theirs:.1f})"
    return f"{f'{ours / 1e6:.3f}{paper}':>14}"
