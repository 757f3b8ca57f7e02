"""The exponential moving average of a network's weights during training."""

import copy

import torch
from torch import nn


class AveragedNetwork:
    """A copy of a network with an exponential moving average of its weights.

    The decay is lower than `decay` early in training, so that the initial weights are soon
    forgotten. The average depends only on the weights and the iteration, so a resumed run computes
    the same average.

    Args:
        model: the network, whose current weights initialize the average.
        decay: fraction of the average that each iteration keeps.
    Attributes:
        model: the averaged network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, iteration: int) -> None:
        """Updates the average after an iteration (counted from 1); buffers are copied."""
        decay = min(self.decay, iteration / (iteration + 9))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
