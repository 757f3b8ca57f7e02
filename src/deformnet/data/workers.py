"""Loader workers: processes that load items ahead of the process that uses them.

Every wait for a worker is bounded. A worker that died is reported immediately (PyTorch detects it),
one that does not respond after a timeout. Tensors are passed through shared memory, or through
pipes if /dev/shm is too small, as in many containers.
"""

import atexit
import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.multiprocessing  # not a part of `torch` by itself
from torch.multiprocessing.reductions import reduce_storage
from torch.utils.data import DataLoader

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_K = TypeVar("_K")
_K_contra = TypeVar("_K_contra", contravariant=True)

TIMEOUT = 1800
"""Default number of seconds to wait for another process."""
PATIENCE = 10.0
"""Seconds before the first warning about a wait."""

_log = logging.getLogger("deformnet")
_POLL = 0.2  # seconds between checks of what else may end a wait
_SHM = "/dev/shm"
_STATES = {"T": "stopped", "D": "waiting for a disk or the network", "Z": "dead"}
_PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl


class Items(Protocol[_K_contra, _T_co]):
    """Items by key."""

    def __getitem__(self, key: _K_contra, /) -> _T_co: ...


def loaded(
    items: Items[_K, _T],
    keys: Sequence[_K],
    *,
    workers: int,
    what: Callable[[_K], str],
    pin: bool = False,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[_T, None, None]:
    """Loads items in the order of their keys.

    Args:
        items: the items, as forked workers see them.
        keys: keys of the items to load.
        workers: number of processes; 0 loads the items in this process.
        what: returns the name of an item in messages, given its key.
        pin: load tensors into page-locked memory.
        timeout: seconds to wait for a worker.
        stopping: whether to end early; called between items and while waiting.
    Raises:
        TimeoutError: if a worker does not respond in time.
        RuntimeError: if a worker died.
        Exception: what a worker raised.
    """
    if workers > 0 and not _semaphores_for(workers):
        workers = 0
    loader = DataLoader(
        items,  # pyright: ignore[reportArgumentType] (any keys)
        sampler=keys,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_begin if workers else None,
        pin_memory=pin,
    )
    before = set(multiprocessing.active_children())
    source = iter(loader)  # in this thread: PyTorch reports dead workers to the main thread
    if workers == 0:
        for item in source:
            if stopping():
                return
            yield item
        return
    started = sorted(set(multiprocessing.active_children()) - before, key=lambda it: it.pid or 0)
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()
    # Another thread waits, so that neither a truncated message nor a worker that is stopped while
    # passing memory blocks this one.
    threading.Thread(target=_pull, args=(source, ready, closed), daemon=True).start()
    del source  # only the thread keeps it, and so ends the workers
    with _ended(started, closed):
        for number, key in enumerate(keys):
            worker = started[number % workers]
            item, error = _wait(ready, what(key), worker, timeout, stopping)
            if error is not None:
                raise error
            if stopping():
                return
            yield item
        with suppress(queue.Empty):
            ready.get(timeout=PATIENCE)  # when the workers have exited


def _wait(
    ready: "queue.Queue[tuple[Any, BaseException | None]]",
    what: str,
    worker: BaseProcess,
    timeout: float,
    stopping: Callable[[], bool],
) -> tuple[Any, BaseException | None]:
    """Waits for an item from a worker, or until `stopping`."""
    start, due = time.monotonic(), PATIENCE
    while not stopping():
        with suppress(queue.Empty):
            return ready.get(timeout=_POLL)
        waited = time.monotonic() - start
        if waited < min(due, timeout):
            continue
        who = f"loader worker with process ID {worker.pid}{_state(worker.pid)}"
        if waited >= timeout:
            raise TimeoutError(
                f"{what}: expected the {who} to load it within {timeout:g} seconds, but got "
                "nothing; check whether a disk or the network hangs, or set a longer timeout"
            )
        _log.warning("waiting for %s from the %s for %.0f seconds", what, who, waited)
        due *= 3
    return None, None


def _state(process: int | None) -> str:
    """State of a process, for messages; empty if it is running or sleeping normally."""
    with suppress(OSError, IndexError):
        letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return f" ({_STATES[letter]})" if letter in _STATES else ""
    return ""


def _pull(source: Iterator[Any], ready: "queue.Queue[Any]", closed: threading.Event) -> None:
    """Passes on what a loader yields, then its error or its end."""
    message, going = (None, None), True
    while going:
        try:
            message = next(source), None
        except StopIteration:
            message, going = (None, None), False
        except BaseException as error:
            message, going = (None, error), False
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(message, timeout=_POLL)
                break
        else:
            return


@contextmanager
def _ended(workers: Sequence[BaseProcess], closed: threading.Event) -> Iterator[None]:
    """Kills workers that are still running at the end of the block."""
    kill = partial(_kill, workers)
    atexit.register(kill)  # before `multiprocessing` waits for them
    try:
        yield
    finally:
        closed.set()
        kill()
        atexit.unregister(kill)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Kills workers that have not exited, without PyTorch reporting that as a failure."""
    if not any(worker.is_alive() for worker in workers):
        return
    handler = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(PATIENCE)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _unchanged(item: _T) -> _T:
    return item


def _semaphores_for(workers: int) -> bool:
    """Whether the queues of this many workers can be created; warns if not."""
    context = torch.multiprocessing
    try:
        _ = context.Event(), [context.Queue() for _ in range(workers + 1)]
    except OSError as error:
        warnings.warn(
            f"{_SHM}: cannot be written to ({error.strerror}), so images are loaded without "
            "workers, which is slower; start the container with --shm-size=2g",
            stacklevel=1,
        )
        return False
    return True


def _begin(worker: int) -> None:
    """Prepares a worker.

    A worker ignores signals that are sent to the whole process group, which the main process
    handles: Ctrl-C, and SIGTERM from a batch system. It exits on SIGTERM from the main process, and
    when the main process exits.
    """
    ForkingPickler.register(torch.UntypedStorage, _shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main, parent = multiprocessing.parent_process(), os.getppid()
    # Only on Linux and after a fork: elsewhere, a handler does not know the sender.
    if hasattr(signal, "sigwaitinfo") and main is not None and main.pid == parent:
        end_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Makes Linux kill this process when its parent exits, even if this process is stopped."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already exited
        os._exit(1)


def _obey_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _shared(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Reduces a storage to a shared-memory handle, or to its content if it cannot be shared."""
    try:
        return reduce_storage(storage)
    except (RuntimeError, OSError):
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        return _rebuilt, (content,)


def _rebuilt(content: np.ndarray) -> torch.UntypedStorage:
    """Rebuilds a storage that `_shared` sent as its content, in the receiving process."""
    warnings.warn(
        f"{_SHM}: has no room for images, so loader workers send them through pipes, which is "
        "slower; start the container with --shm-size=2g",
        stacklevel=1,
    )
    return torch.from_numpy(content).untyped_storage()
