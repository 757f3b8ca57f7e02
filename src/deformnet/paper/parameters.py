"""Parameter counts of the paper's networks, compared to those it publishes (Tables 4 and 7)."""

from typing import NamedTuple

import torch

from deformnet import recipes
from deformnet._errors import users_values
from deformnet._text import Table
from deformnet.paper.cases import count_parameters

# Millions, plain and deformable, for 20 classes on ResNet-101; DeepLab has a background class, too.
_TABLE4: tuple[tuple[type[recipes.Recipe], int, tuple[float, float]], ...] = (
    (recipes.DeepLabRecipe, 1, (46.0, 46.1)),
    (recipes.ClassAwareRPNRecipe, 0, (46.0, 46.1)),
    (recipes.FasterRCNNRecipe, 0, (58.3, 59.9)),
    (recipes.RFCNRecipe, 0, (47.1, 49.5)),
)
# Millions, with a classifier of 1000 classes.
_TABLE7: dict[recipes.BackboneName, float] = {"resnet101": 46.0, "aligned-inception-resnet": 64.3}
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


def parameter_counts(num_classes: int, recipe: recipes.Recipe) -> Count:
    """Count parameters of the network of a recipe with and without its deformable layers."""
    with torch.device("meta"), users_values():  # counting needs no memory
        plain, deformable = (it.build_model(num_classes) for it in (recipe.baseline(), recipe))
    rpn = count_parameters(plain.get_submodule("rpn")) if recipe.takes_proposals else 0
    return Count(count_parameters(plain), count_parameters(deformable), rpn)


def parameter_table(num_classes: int, backbone: recipes.BackboneName) -> str:
    """Return the counts of all networks as tables, with those of the paper if it has them."""
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


def _classifier_parameters(backbone: recipes.BackboneName) -> int:
    with torch.device("meta"):
        return count_parameters(recipes.ClassifierRecipe(backbone=backbone).build_model(1000))


def _cell(ours: int, paper: float | None) -> str:
    return f"{ours / 1e6:.3f}" + ("" if paper is None else f" ({paper:.1f})")
