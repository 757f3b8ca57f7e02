"""What tasks have in common whose networks give logits for an image, or for its pixels."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from deformnet.tasks.base import EvaluationSet, Processes, Scores
from deformnet.tasks.loading import shared
from deformnet.tasks.predictor import ready


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, C, ...] of normalized images [N, 3, H, W]."""
    return model(images.contiguous(memory_format=torch.channels_last))


class CountingSet(EvaluationSet):
    """Images whose scores follow from counts, which add up exactly over images and processes."""

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, processes: Processes) -> Scores:
        device = processes.device
        network, metric = ready(model, device), self._metric().to(device)
        for _, sample in shared(self, processes):
            metric.update(*self._predict(network, *(part.to(device) for part in sample)))
        counts = torch.stack(processes.gather(metric.compute().cpu()))
        return self._scores(counts.sum(dim=0))

    @abstractmethod
    def __getitem__(self, index: int) -> Sequence[Tensor]:
        """Input and ground truth of an image, which workers load."""

    @abstractmethod
    def _metric(self) -> Metric:
        """The metric that counts in one process."""

    @abstractmethod
    def _predict(self, model: nn.Module, *sample: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and ground truth of a sample, as the metric takes them."""

    @abstractmethod
    def _scores(self, counts: Tensor) -> Scores:
        """The scores of all images."""
