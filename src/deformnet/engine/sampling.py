"""Which image is drawn when: a function of the seed and of the number of the draw alone.

A training run is one endless sequence of draws. Draw k gives an image (every epoch is one
permutation of all images) and a seed for whatever is random in its sample. So nothing has to be
stored to resume a run in the middle of an epoch, and the number of processes or of loader workers
changes nothing: iteration i with a batch of B is made of the draws i*B to i*B + B - 1, whoever
loads them.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

# The independent streams of random numbers.
_ORDER, _SAMPLE = 0, 1


class Images(Sized, Protocol):
    """A data set, whatever its samples are."""

    def __getitem__(self, index: int, /) -> Any: ...


class Draws(Dataset[Any]):
    """A data set of images seen as the endless sequence of draws of a training run.

    Args:
        images: the images; whatever is random in a sample comes from torch's generator.
        seed: of the whole sequence.
        batch: draws per iteration; it matters to `groups` alone.
        groups: a number for each image. Every batch is made of images of one number, but for those
            that are left over, which come at both ends of an epoch. None puts any together.
    """

    def __init__(
        self, images: Images, seed: int, batch: int = 1, groups: Sequence[int] | None = None
    ) -> None:
        if len(images) == 0:
            raise ValueError("images: the data set is empty")
        self.images = images
        self.seed = seed
        self.batch = batch
        self.groups = None if groups is None else np.asarray(groups)
        self._epoch = -1
        self._order: list[int] = []

    def image_index(self, draw: int) -> int:
        """Which image a draw shows."""
        epoch, position = divmod(draw, len(self.images))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, _ORDER, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            if self.groups is not None:
                order = self._grouped(order.numpy(), epoch, generator)
            self._order = order.tolist()
            self._epoch = epoch
        return self._order[position]

    def _grouped(self, order: np.ndarray, epoch: int, generator: torch.Generator) -> np.ndarray:
        """The order of an epoch, with images of one group moved together into its batches."""
        assert self.groups is not None
        size = self.batch
        # Draws of the epoch that belong to the batch in which the one before ended.
        head = -epoch * len(order) % size
        batches, left_over = [], []
        for group in np.unique(self.groups):
            members = order[self.groups[order] == group]
            whole = len(members) // size * size
            batches.extend(members[:whole].reshape(-1, size))
            left_over.append(members[whole:])
        rest = np.concatenate(left_over)
        if len(rest) < head and batches:  # a batch of its own must fill the one that is begun
            rest = np.concatenate([rest, batches.pop()])
        places = torch.randperm(len(batches), generator=generator).tolist()
        return np.concatenate([rest[:head], *(batches[i] for i in places), rest[head:]])

    def __getitem__(self, draw: int) -> Any:
        index = self.image_index(draw)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(self.seed, _SAMPLE, draw))
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
    """For loader workers: only the main process decides what a signal to the whole group means.

    Such are Ctrl-C, and the SIGTERM of a batch system. One from the main process ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a handler does not know the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def _obey_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
