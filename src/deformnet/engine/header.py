"""Summary of a run, printed before training starts."""

from collections.abc import Iterator

from lightning.fabric import Fabric
from torch import nn

from deformnet.data.files import listing
from deformnet.recipes import Recipe
from deformnet.tasks.base import EvaluationSet, TrainingSet


def header(
    recipe: Recipe,
    images: TrainingSet,
    split: str,
    validation: EvaluationSet | None,
    val_split: str | None,
    fabric: Fabric,
    model: nn.Module,
) -> Iterator[str]:
    """Lines that describe the data, network, schedule and device."""
    scored = "no validation images"
    if val_split is not None:
        scored += f", because there is no split {val_split}"
    if validation is not None:
        scored = f"{len(validation)} images to validate on ({val_split})"
    yield f"data: {len(images)} images to train on ({split}), {scored}"
    yield f"classes: {len(images.classes)} ({listing(images.classes)})"
    yield from images.summary()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"network: {recipe.network} on {recipe.backbone}, {parameters / 1e6:.2f} M parameters"
    passes = recipe.iterations * recipe.batch / len(images)
    yield (
        f"schedule: {recipe.iterations} iterations of {recipe.batch} images, "
        f"{passes:.3g} passes over the data; {recipe.optimizer}, {recipe.schedule}"
    )
    kind = "GPU" if fabric.device.type == "cuda" else fabric.device.type.upper()
    count = "" if fabric.world_size == 1 else f"{fabric.world_size} processes, "
    yield f"device: {count}{kind}, {recipe.precision}"
