"""The exponential moving average of a network's weights during training."""

import copy

import torch
from torch import nn


class AveragedNetwork:
    """A copy of a network whose weights follow those of the network smoothly.

    Early in training the average is shorter than `decay` says, so that the initial weights leave
    it. It depends on the weights and the iteration alone: a resumed run averages as before.

    Args:
        model: the network, with the weights that the average starts from.
        decay: fraction of the average that an iteration keeps.
    Attributes:
        model: the averaged network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, iteration: int) -> None:
        """Adds the weights after an iteration, counted from 1; buffers are copied."""
        decay = min(self.decay, iteration / (iteration + 9))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
