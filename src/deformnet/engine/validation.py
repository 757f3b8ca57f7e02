"""Validation of a network while it trains: the best network, and when to give up.

A validation works on a copy of the network or on its average, and what it has shown is part of the
checkpoint: training continues as if there had been none, and a resumed run validates as one that
was never interrupted.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import nn

from deformnet.engine.evaluation import score
from deformnet.engine.runs import Validated
from deformnet.engine.settings import LoopOptions
from deformnet.tasks.base import DataIdentity, EvaluationSet, Scores, Task
from deformnet.tasks.own import Data

Pictures = Callable[[nn.Module, torch.device], Iterable[tuple[str, Image.Image]]]
"""Names and pictures of predictions of a network on a device."""
_COUNT, _SIDE = 4, 640  # pictures of predictions, and their longer side in pixels


class Validator:
    """The validations of a run; every process has one.

    Args:
        images: images to score on; None never validates.
        loop: how often, and with how much patience.
        total: last iteration of the run.
        workers: processes that load images.
        validated: what earlier validations have shown.
    Attributes:
        pictures: draws predictions; none by default.
    """

    pictures: Pictures = staticmethod(lambda model, device: ())

    def __init__(
        self,
        images: EvaluationSet | None,
        loop: LoopOptions,
        total: int,
        workers: int,
        validated: Validated | None = None,
    ) -> None:
        self._images, self._workers = images, workers
        self._patience, self._total = loop.patience, total
        every = loop.validate_every
        self._every = math.ceil(total / 10) if every == "auto" else every
        self.validated: Validated = validated or {
            "iteration": 0,
            "best": None,
            "best_iteration": 0,
            "waited": 0,
        }

    def due(self, iteration: int) -> bool:
        """Whether the network of an iteration is still to be validated.

        The last one is, so that it can be the best; also if only earlier calls validated.
        """
        if self._images is None or iteration in (0, self.validated["iteration"]):
            return False
        if self._every is None:
            return iteration == self._total and self.validated["best"] is not None
        return iteration == self._total or iteration % self._every == 0

    @property
    def exhausted(self) -> bool:
        """Whether there has been no improvement for too long."""
        return self._patience is not None and self.validated["waited"] >= self._patience

    def score(self, fabric: Fabric, model: nn.Module) -> Scores:
        """The scores of a network; all processes call this method."""
        assert self._images is not None
        # A copy: training goes on with a network and caches that have seen no inference.
        return score(fabric, copy.deepcopy(model), self._images, self._workers, progress=False)

    def add(self, iteration: int, value: float | None) -> bool:
        """Notes the main score of an iteration; whether it is the best so far."""
        best = self.validated["best"]
        if value is not None and not math.isfinite(value):
            value = None
        improved = value is not None and (best is None or value > best)
        if improved:
            self.validated = {
                "iteration": iteration,
                "best": value,
                "best_iteration": iteration,
                "waited": 0,
            }
        else:
            waited = self.validated["waited"] + (value is not None)
            self.validated = {**self.validated, "iteration": iteration, "waited": waited}
        return improved


def pictures_of(task: Task, data: Data, split: str, trained_on: DataIdentity) -> Pictures:
    """Draws the predictions for the first images of a split, opened at the first call."""
    opened = []

    def draw(model: nn.Module, device: torch.device) -> Iterator[tuple[str, Image.Image]]:
        if trained_on.proposals:  # such a network cannot predict an image by itself
            return
        if not opened:
            opened.append(task.annotated(data, split, trained_on))
        (images,) = opened
        predictor = task.predictor(copy.deepcopy(model), trained_on, device)
        for index in range(min(_COUNT, len(images))):
            image, _ = images[index]
            picture = predictor.annotate(image).best(20, 0.3).draw(image)
            if picture is not None:
                picture.thumbnail((_SIDE, _SIDE))
                yield images.names[index], picture

    return draw
