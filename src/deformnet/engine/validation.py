"""Validation during training: selection of the best network, and early stopping.

Validation runs on a copy of the network or on its average, and its outcome is stored in the
checkpoint. It does not affect training, and a resumed run validates like an uninterrupted one.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from PIL import Image
from torch import nn

from deformnet.engine.checkpoints import Validated
from deformnet.engine.evaluation import score
from deformnet.engine.processes import FabricProcesses
from deformnet.engine.settings import LoopOptions
from deformnet.tasks.base import DataIdentity, EvaluationSet, Scores, Task
from deformnet.tasks.features import FeatureCache
from deformnet.tasks.own import Data

Pictures = Callable[[nn.Module, torch.device], Iterable[tuple[str, Image.Image]]]
"""Draws predictions of a network on a device; returns image names and pictures."""
_COUNT, _SIDE = 4, 640  # pictures of predictions, and their longer side in pixels


class Validator:
    """Validates the network of a run; every process has its own instance.

    Args:
        images: images to validate on; None disables validation.
        loop: frequency of validations, and patience.
        total: last iteration of the run.
        processes: the processes of the run.
        validated: outcome of earlier validations.
    Attributes:
        pictures: function that draws predictions; draws none by default.
        cache: features of the frozen backbone, if they are kept.
    """

    cache: FeatureCache | None = None
    pictures: Pictures = staticmethod(lambda model, device: ())

    def __init__(
        self,
        images: EvaluationSet | None,
        loop: LoopOptions,
        total: int,
        processes: FabricProcesses,
        validated: Validated | None = None,
    ) -> None:
        self._images, self._processes = images, processes
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
        """Whether the network is to be validated after an iteration.

        If the run has been validated during training, the last iteration is validated as well,
        because its network may be the best.
        """
        if self._images is None or iteration in (0, self.validated["iteration"]):
            return False
        if self._every is None:
            return iteration == self._total and self.validated["best"] is not None
        return iteration == self._total or iteration % self._every == 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self.validated["waited"] >= self._patience

    def score(self, model: nn.Module) -> Scores:
        """Evaluates a network; all processes must call this method.

        Raises:
            StopRequested: if the processes are asked to stop.
        """
        assert self._images is not None
        # On a copy, so that inference does not affect the network and caches used in training.
        model = copy.deepcopy(model)
        return score(self._processes, model, self._images, progress=False, cache=self.cache)

    def add(self, iteration: int, value: float | None) -> bool:
        """Records the main score of an iteration; returns whether it is the best so far."""
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
    """Draws the predictions for the first images of a split, which the first call opens."""
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
