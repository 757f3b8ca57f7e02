"""Parameter counts of the paper's networks, compared to those it publishes (Tables 4 and 7)."""

from typing import NamedTuple

import torch
from torch import nn

from deformnet._errors import users_values
from deformnet._text import Table
from deformnet.recipes import (
    BackboneName,
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
)

# Millions, plain and deformable, for 20 classes on ResNet-101; DeepLab has a background class, too.
_TABLE4: tuple[tuple[type[Recipe], int, tuple[float, float]], ...] = (
    (DeepLabRecipe, 1, (46.0, 46.1)),
    (ClassAwareRPNRecipe, 0, (46.0, 46.1)),
    (FasterRCNNRecipe, 0, (58.3, 59.9)),
    (RFCNRecipe, 0, (47.1, 49.5)),
)
# Millions, with a classifier of 1000 classes.
_TABLE7: dict[BackboneName, float] = {"resnet101": 46.0, "aligned-inception-resnet": 64.3}
_PUBLISHED = (20, "resnet101")
_EXPLANATION = """\
In parentheses: the paper's counts, without region proposal networks, which it trains separately.
ResNet-101 has 1.45 M more parameters in the paper (Table 7) than in torchvision and He et al.; the
paper does not explain them. Apart from these, plain DeepLab, Faster R-CNN and R-FCN agree to 0.2 M.
For class-aware RPN, the paper seems to leave out the 3x3 convolution of the head (4.72 M). The
parameters that deformable layers add agree for R-FCN (2.459 for 2.4). The others differ by more
than the rounding of the paper's numbers: three offset convolutions from 512 to 18 channels have
0.249 M, and together with the fully connected layer of Faster R-CNN's pooling 1.478 M."""


class Count(NamedTuple):
    """Parameters of a network with and without deformable layers.

    Attributes:
        plain, deformable: counts of the whole networks.
        rpn: count of the region proposal network in each two-stage detector; 0 for others.
    """

    plain: int
    deformable: int
    rpn: int


def parameter_counts(num_classes: int, recipe: Recipe) -> Count:
    """Count parameters with and without deformable layers.

    Args:
        num_classes: number of classes, as `Recipe.build_model` takes it.
        recipe: recipe of the deformable network.
    """
    with torch.device("meta"), users_values():  # counting needs no memory
        plain, deformable = (it.build_model(num_classes) for it in (recipe.baseline(), recipe))
    rpn = _count(plain.get_submodule("rpn")) if recipe.takes_proposals else 0
    return Count(_count(plain), _count(deformable), rpn)


def parameter_table(num_classes: int, backbone: BackboneName) -> str:
    """Return the counts of all networks as tables, with those of the paper if it has them.

    Args:
        num_classes: number of classes of objects.
        backbone: backbone of the networks.
    """
    published = (num_classes, backbone) == _PUBLISHED
    rows = []
    for network, background, paper in _TABLE4:
        count = parameter_counts(num_classes + background, network(backbone=backbone))
        plain, deformable = count.plain - count.rpn, count.deformable - count.rpn
        ours = (plain, deformable, deformable - plain)
        theirs = (*paper, paper[1] - paper[0]) if published else (None, None, None)
        cells = map(_cell, ours, theirs)
        rows.append((network.network, *cells, f"{count.rpn / 1e6:.3f}" if count.rpn else "-"))
    networks = Table(
        f"{num_classes} classes, {backbone}, one offset group; millions of parameters",
        ("network", "plain", "deformable", "difference", "RPN (not included)"),
        rows,
    )
    classifiers = Table(
        "classifiers with 1000 classes; millions of parameters",
        ("backbone", "plain"),
        [(name, _cell(_classifier_parameters(name), paper)) for name, paper in _TABLE7.items()],
    )
    return "\n\n".join(map(str, (networks, classifiers, *([_EXPLANATION] if published else []))))


def _classifier_parameters(backbone: BackboneName) -> int:
    with torch.device("meta"):
        return _count(ClassifierRecipe(backbone=backbone).build_model(1000))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _cell(ours: int, paper: float | None) -> str:
    return f"{ours / 1e6:.3f}" + ("" if paper is None else f" ({paper:.1f})")
