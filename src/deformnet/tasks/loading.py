"""The images of an evaluation, shared among processes and loaded by workers."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet.tasks.base import Processes

_MOST_PIXELS = 10**9
_S = TypeVar("_S")
_S_co = TypeVar("_S_co", covariant=True)
_T = TypeVar("_T")


class Samples(Protocol[_S_co]):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _S_co: ...


class _Numbered(Dataset[tuple[int, _S_co]]):
    def __init__(self, samples: Samples[_S_co]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[int, _S_co]:
        return index, self.samples[index]


def shared(samples: Samples[_S_co], processes: Processes) -> Iterator[tuple[int, _S_co]]:
    """The samples that fall to this process, each with its index."""
    loader = DataLoader(
        _Numbered(samples),
        sampler=range(processes.rank, len(samples), processes.count),
        batch_size=None,
        num_workers=processes.workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=processes.device.type == "cuda",
    )
    hidden = not processes.progress or processes.rank > 0
    return iter(tqdm(loader, desc="evaluation", disable=True if hidden else None))


def predictions(
    samples: Samples[_S], predict: Callable[[int, _S], _T], processes: Processes
) -> list[_T]:
    """The predictions for all samples in their order, from their indices and themselves, made by
    all processes."""
    own = [(index, predict(index, sample)) for index, sample in shared(samples, processes)]
    by_index = dict(pair for part in processes.gather(own) for pair in part)
    return [by_index[index] for index in range(len(samples))]


def stack(images: Sequence[Tensor], padding: float = 0) -> Tensor:
    """Stacks images [..., h, w] of different sizes, padded on the right and at the bottom."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    if len(images) * height * width > _MOST_PIXELS:
        raise UserError(
            f"expected a batch of at most {_MOST_PIXELS // 10**6} million pixels, but got "
            f"{len(images)} images, {width}x{height} with their padding; use a smaller max_side or "
            "batch, or a crop"
        )
    return torch.stack([pad(image, height, width, padding) for image in images])


def pad(images: Tensor, height: int, width: int, padding: float = 0) -> Tensor:
    """Pads images [..., h, w] on the right and at the bottom."""
    h, w = images.shape[-2:]
    return F.pad(images, (0, width - w, 0, height - h), value=padding)


def ignore_interrupts(worker: int) -> None:
    """Makes a loader worker leave signals to the whole process group to the main process.

    These are Ctrl-C, and SIGTERM of a batch system. SIGTERM from the main process ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a handler does not know the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def _obey_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
