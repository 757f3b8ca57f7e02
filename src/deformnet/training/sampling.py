"""Which image is drawn when: a function of the seed and of the number of the draw alone.

A training run is one endless sequence of draws. Draw k gives an image (every epoch is one
permutation of all images) and a seed for its augmentation. So nothing has to be stored to resume a
run in the middle of an epoch, and the number of processes or of loader workers changes nothing:
iteration i with a batch of B is made of the draws i*B to i*B + B - 1, whoever loads them.
"""

import signal
from collections.abc import Iterator, Sized
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

_ORDER, _AUGMENTATION = 0, 1  # the two independent streams of random numbers


class _Images(Sized, Protocol):
    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


class Draws(Dataset[tuple[Tensor, Tensor]]):
    """A data set of images seen as the endless sequence of draws of a training run.

    Args:
        images: the images, with transforms that take their randomness from torch's generator.
        seed: of the whole sequence.
    """

    def __init__(self, images: _Images, seed: int) -> None:
        if len(images) == 0:
            raise ValueError("images: the data set is empty")
        self.images = images
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def image_index(self, draw: int) -> int:
        """Which image a draw shows."""
        epoch, position = divmod(draw, len(self.images))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, _ORDER, epoch))
            self._order = torch.randperm(len(self.images), generator=generator).tolist()
            self._epoch = epoch
        return self._order[position]

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        index = self.image_index(draw)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(self.seed, _AUGMENTATION, draw))
            return self.images[index]


class DrawSampler(Sampler[list[int]]):
    """The draws of each iteration that fall to one process.

    Args:
        first: the iteration to begin with; 0 in a new run.
        iterations: the iteration to stop before.
        batch: draws per iteration, over all processes.
        rank: this process.
        processes: how many processes share each batch.
    Raises:
        ValueError: if the batch cannot be shared evenly.
    """

    def __init__(
        self, first: int, iterations: int, batch: int, rank: int = 0, processes: int = 1
    ) -> None:
        if batch % processes != 0:
            raise ValueError(f"batch {batch} cannot be shared evenly by {processes} processes")
        self.first = first
        self.iterations = iterations
        self.batch = batch
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.first, self.iterations):
            start = iteration * self.batch
            yield list(range(start + self.rank, start + self.batch, self.processes))

    def __len__(self) -> int:
        # Of the whole run: Lightning compares it with its own count, which a resumed run continues.
        return self.iterations


def _seed(seed: int, stream: int, number: int) -> int:
    """A well-mixed seed of 64 bits."""
    return int(np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0])


def ignore_interrupts(worker: int) -> None:
    """For loader workers: Ctrl-C reaches the whole group, and only the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
