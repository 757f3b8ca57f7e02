"""Default settings for a data set and a machine."""

import statistics
from typing import TypeVar

from deformnet.engine.processes import Layout
from deformnet.engine.settings import Hardware
from deformnet.recipes import BackboneName, Recipe, finetune
from deformnet.tasks import task_of
from deformnet.tasks.own import Data

_RecipeT = TypeVar("_RecipeT", bound=Recipe)
_SAMPLED = 20  # number of images whose size is read


def finetune_on(
    recipe: type[_RecipeT],
    data: Data,
    *,
    split: str = "train",
    batch: int | None = None,
    backbone: BackboneName = "resnet50",
    init: str | None = "IMAGENET1K_V1",
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
) -> _RecipeT:
    """Returns the settings of `deformnet.recipes.finetune` for a data set and this machine.

    Args:
        recipe: the network's class.
        data: data set, as for `train`.
        split: training split.
        batch: batch size; None selects it automatically.
        backbone, init: backbone network and its initial weights; None for random weights.
        hardware: processes and devices to train on.
    Raises:
        FileNotFoundError, UserError: see `train`.
    """
    images = task_of(recipe()).annotated(data, split)
    count = len(images)
    chosen = sorted({round(n * (count - 1) / (_SAMPLED - 1)) for n in range(_SAMPLED)})
    sides = [min(images[index][0].shape[1:]) for index in chosen] if count else [480]
    return finetune(
        recipe,
        images=max(1, count),
        short_side=round(statistics.median(sides)),
        gpu=Layout.of(hardware).gpu,
        batch=batch,
        backbone=backbone,
        init=init,
    )
