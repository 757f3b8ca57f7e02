"""The order of training images: a function of the seed and of the number of the draw alone.

A training run is one endless sequence of draws. Draw k gives an image (every epoch is one
permutation of all images) and a seed for all randomness in its sample. So nothing has to be stored
to resume a run in the middle of an epoch, and the number of processes or of loader workers changes
nothing: iteration i with batch size B consists of the draws i*B to i*B + B - 1, whoever loads them.
"""

from collections.abc import Sequence

import numpy as np
import torch

from deformnet._errors import UserError
from deformnet.recipes import Recipe
from deformnet.tasks.base import Batch, TrainingSet

# The independent streams of random numbers.
_ORDER, _SAMPLE = 0, 1


class Draws:
    """The endless sequence of draws of a training run.

    Args:
        images: number of images.
        seed: seed of the whole sequence.
        batch: draws per iteration; used with `groups` only.
        groups: a number for each image. Every batch consists of images of one number, except for
            leftovers at both ends of an epoch. None puts any images together.
    """

    def __init__(
        self, images: int, seed: int, batch: int = 1, groups: Sequence[int] | None = None
    ) -> None:
        if images == 0:
            raise UserError("images: expected at least one to train on, but the data set is empty")
        self.images, self.seed, self.batch = images, seed, batch
        self.groups = None if groups is None else np.asarray(groups)
        self._epoch = -1
        self._order: list[int] = []

    def image_index(self, draw: int) -> int:
        """The image of a draw."""
        epoch, position = divmod(draw, self.images)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mixed(self.seed, _ORDER, epoch))
            order = torch.randperm(self.images, generator=generator)
            if self.groups is not None:
                order = self._grouped(self.groups, order.numpy(), epoch, generator)
            self._order = order.tolist()
            self._epoch = epoch
        return self._order[position]

    def sample_seed(self, draw: int) -> int:
        """The seed of all randomness in the sample of a draw."""
        return _mixed(self.seed, _SAMPLE, draw)

    def _grouped(
        self, groups: np.ndarray, order: np.ndarray, epoch: int, generator: torch.Generator
    ) -> np.ndarray:
        """The order of an epoch, with images of one group moved together into its batches."""
        size = self.batch
        # Draws of the epoch that belong to the batch in which the previous epoch ended.
        head = -epoch * len(order) % size
        batches, leftovers = [], []
        for group in np.unique(groups):
            members = order[groups[order] == group]
            whole = len(members) // size * size
            batches.extend(members[:whole].reshape(-1, size))
            leftovers.append(members[whole:])
        rest = np.concatenate(leftovers)
        if len(rest) < head and batches:  # one batch has to fill the batch that is begun
            rest = np.concatenate([rest, batches.pop()])
        places = torch.randperm(len(batches), generator=generator).tolist()
        return np.concatenate([rest[:head], *(batches[i] for i in places), rest[head:]])


class Iterations:
    """The batches of a training run: item i is what one process computes in iteration i.

    Args:
        images: data set.
        recipe: batch size and seed of the run.
        parts: number of parts into which each process splits its fraction of a batch.
        rank, processes: this process, and the number of processes that share each batch.
    """

    def __init__(
        self, images: TrainingSet, recipe: Recipe, parts: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.images, self.batch = images, recipe.batch
        self.draws = Draws(len(images), recipe.seed, recipe.batch, images.groups)
        self.parts, self.rank, self.processes = parts, rank, processes

    def __getitem__(self, iteration: int) -> list[Batch]:
        start = iteration * self.batch
        draws = range(start + self.rank, start + self.batch, self.processes)
        size = len(draws) // self.parts
        indices = [self.draws.image_index(draw) for draw in draws]
        seeds = [self.draws.sample_seed(draw) for draw in draws]
        parts = (slice(first, first + size) for first in range(0, len(draws), size))
        return [self.images.batch(indices[part], seeds[part]) for part in parts]


def _mixed(seed: int, stream: int, number: int) -> int:
    """A well-mixed seed of 64 bits."""
    return int(np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0])
