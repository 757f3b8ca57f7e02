"""The images of an evaluation, shared among processes and loaded by workers."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deformnet.tasks.base import Processes

_S_co = TypeVar("_S_co", covariant=True)


class Samples(Protocol[_S_co]):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _S_co: ...


class _Numbered(Dataset[tuple[int, _S_co]]):
    def __init__(self, samples: Samples[_S_co]) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[int, _S_co]:
        return index, self.samples[index]


def shared(
    samples: Samples[_S_co], processes: Processes, *, workers: int, progress: bool
) -> Iterator[tuple[int, _S_co]]:
    """The samples that fall to this process, each with its index.

    Args:
        workers: processes that load samples; 0 loads them in this one.
        progress: show a progress bar, in the first process.
    """
    mine = range(processes.rank, len(samples), processes.count)
    loader = DataLoader(
        _Numbered(samples),
        sampler=mine,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=processes.device.type == "cuda",
    )
    hidden = not progress or processes.rank > 0
    return iter(tqdm(loader, desc="evaluation", disable=True if hidden else None))


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
