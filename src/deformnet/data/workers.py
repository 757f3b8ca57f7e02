"""Loader workers: processes that load items ahead of the process that uses them.

No wait for a worker is endless. A worker that died is reported at once (PyTorch listens for that),
one that does not answer after a timeout. Tensors come through shared memory where /dev/shm has
room, and through pipes where it has none, as in a container with little of it.
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
"""Seconds of waiting before a line says for what."""

_log = logging.getLogger("deformnet")
_POLL = 0.2  # seconds between looks at what else may end a wait
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
        items: where workers, which are forked, get the items.
        keys: the items to load.
        workers: number of processes; 0 loads in this one.
        what: what an item is called in messages, by its key.
        pin: load tensors into page-locked memory.
        timeout: seconds to wait for a worker.
        stopping: whether to end before the last item; asked between items and while waiting.
    Raises:
        TimeoutError: if a worker does not answer in time.
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
    source = iter(loader)  # in this thread: PyTorch tells the main thread of workers that died
    if workers == 0:
        for item in source:
            if stopping():
                return
            yield item
        return
    started = sorted(set(multiprocessing.active_children()) - before, key=lambda it: it.pid or 0)
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()
    # A thread waits, so that neither a message that is cut short nor a worker that is stopped while
    # it hands over memory holds up this one.
    threading.Thread(target=_pull, args=(source, ready, closed), daemon=True).start()
    del source  # the thread's alone, which ends the workers that way
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
            ready.get(timeout=PATIENCE)  # the workers have ended


def _wait(
    ready: "queue.Queue[tuple[Any, BaseException | None]]",
    what: str,
    worker: BaseProcess,
    timeout: float,
    stopping: Callable[[], bool],
) -> tuple[Any, BaseException | None]:
    """Waits for an item of a worker, or until it is time to stop."""
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
                f"{what}: expected it from the {who} within {timeout:g} seconds, but got nothing; "
                "see whether a disk or the network hangs, or set a longer timeout"
            )
        _log.warning("waiting for %s from the %s for %.0f seconds", what, who, waited)
        due *= 3
    return None, None


def _state(process: int | None) -> str:
    """What the system says of a process, for messages; empty if nothing of interest."""
    with suppress(OSError, IndexError):
        letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return f" ({_STATES[letter]})" if letter in _STATES else ""
    return ""


def _pull(source: Iterator[Any], ready: "queue.Queue[Any]", closed: threading.Event) -> None:
    """Passes on what a loader yields, and the error or the end of it."""
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
    """Ends workers with the block, whatever they do."""
    kill = partial(_kill, workers)
    atexit.register(kill)  # before `multiprocessing` waits for them
    try:
        yield
    finally:
        closed.set()
        kill()
        atexit.unregister(kill)


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Kills those workers that have not ended; PyTorch must not take that for a failure."""
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
    """Whether the queues of this many workers can be made; warns if not."""
    context = torch.multiprocessing
    try:
        _ = context.Event(), [context.Queue() for _ in range(workers + 1)]
    except OSError as error:
        warnings.warn(
            f"{_SHM}: cannot be written ({error.strerror}), so images are loaded without workers, "
            "which is slower; start a container with --shm-size=2g",
            stacklevel=1,
        )
        return False
    return True


def _begin(worker: int) -> None:
    """Prepares a worker.

    It leaves signals to the whole process group to the main process: Ctrl-C, and SIGTERM of a batch
    system. SIGTERM from the main process ends it, and so does the end of the main process.
    """
    ForkingPickler.register(torch.UntypedStorage, _shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main, parent = multiprocessing.parent_process(), os.getppid()
    # Linux, forked; elsewhere a handler does not know the sender.
    if hasattr(signal, "sigwaitinfo") and main is not None and main.pid == parent:
        end_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process when its parent ends, even if it is stopped then."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _obey_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _shared(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Reduces the memory of a tensor to a handle, or to its content where none can be shared."""
    try:
        return reduce_storage(storage)
    except (RuntimeError, OSError):
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        return _rebuilt, (content,)


def _rebuilt(content: np.ndarray) -> torch.UntypedStorage:
    """What `_shared` sent by its content; in the process that receives it."""
    warnings.warn(
        f"{_SHM}: has no room for images, so loader workers send them through pipes, which is "
        "slower; start a container with --shm-size=2g",
        stacklevel=1,
    )
    return torch.from_numpy(content).untyped_storage()
