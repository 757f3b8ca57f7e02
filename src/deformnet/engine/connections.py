"""Closing of the connections between the processes of a run."""

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

PATIENCE = 5.0
"""Seconds that an ending process waits for its connections to close."""


@contextmanager
def closed_at_exit() -> Iterator[None]:
    """Closes CPU connections that are made in the block before the interpreter shuts down.

    A thread of gloo that drops its last tensor later than that asks for the interpreter's lock,
    which then ends the thread, and C++ takes this for the failure of the whole process ("terminate
    called without an active exception", seen with PyTorch 2.14). Lightning closes those of GPUs.
    """
    before = _connected_by_gloo()
    try:
        yield
    finally:
        if not before and _connected_by_gloo():
            _close_at_exit()


def _connected_by_gloo() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_backend() == "gloo"
    )


def _close_at_exit() -> None:
    # Closing waits for what other processes still owe. One that has stalled must not keep a failed
    # process alive, so a thread does it: started now, because Python starts none while it ends.
    ending = threading.Event()

    def close() -> None:
        ending.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()

    def end() -> None:
        ending.set()
        thread.join(PATIENCE)

    atexit.register(end)
