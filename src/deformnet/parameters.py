"""What deformable layers add to the size of the paper's networks (Table 4)."""

import torch

from deformnet.recipes import (
    BackboneName,
    ClassAwareRPNRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    recipe_from_dict,
)


def parameter_counts(num_classes: int, recipe: Recipe) -> tuple[int, int]:
    """Parameters of the plain and of the deformable network that differ in nothing else.

    Deformable are the last three convolutions, and the pooling where there is one.

    Args:
        num_classes: classes of objects; DeepLab has the background besides.
        recipe: of the network.
    """
    counts = []
    for layers, plain in ((0, True), (3, False)):
        values = recipe.to_dict() | {"deform_layers": layers}
        if "pool" in values:
            values["pool"] = "average" if plain else "deformable"
        classes = num_classes + isinstance(recipe, DeepLabRecipe)
        with torch.device("meta"):  # counting needs no memory
            model = recipe_from_dict(values, source="parameters").build_model(classes)
        counts.append(sum(p.numel() for p in model.parameters()))
    return counts[0], counts[1]


def parameter_table(num_classes: int, backbone: BackboneName) -> str:
    """The counts of all networks, as a table for a terminal."""
    lines = [
        f"{num_classes} classes, {backbone}, one offset group; millions of parameters",
        f"{'network':16}  {'plain':>8}  {'deformable':>10}  {'difference':>10}",
    ]
    for network in (DeepLabRecipe, ClassAwareRPNRecipe, FasterRCNNRecipe, RFCNRecipe):
        recipe = network(backbone=backbone)
        plain, deformable = parameter_counts(num_classes, recipe)
        lines.append(
            f"{recipe.network:16}  {plain / 1e6:8.3f}  {deformable / 1e6:10.3f}  "
            f"{(deformable - plain) / 1e6:10.3f}"
        )
    return "\n".join(lines)
