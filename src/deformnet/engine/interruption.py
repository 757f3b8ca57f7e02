"""Ctrl-C and SIGTERM: the first stops at a safe point, the second at once, whatever is waited for.

Python runs its handlers between two instructions, so a process that waits in C++ for another one
would be deaf. A thread hears signals at any time, and ends such a process.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AT_ONCE = 3.0
"""Seconds for an interrupted process to end by itself."""
_TWICE = 1.0
"""Seconds within which two signals are one request, as when a launcher passes on its own."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """The processes of a run were asked to stop, and have reached a point where they can."""


class _Requests:
    """Counts signals."""

    def __init__(self) -> None:
        self.first: float | None = None

    def repeated(self) -> bool:
        """Takes note of a signal; returns whether it repeats an earlier one."""
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        return now - self.first > _TWICE


class Interruption:
    """Requests to stop, as a process receives them."""

    def __init__(self) -> None:
        self.polite = False
        self._requests = _Requests()

    @property
    def requested(self) -> bool:
        """Whether to stop at the next safe point."""
        return self._requests.first is not None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Makes the first signal, which may come from a batch system or torchrun, a request."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._requests.repeated():
                raise KeyboardInterrupt

        handlers = {}
        if threading.current_thread() is threading.main_thread():  # signals belong to it
            handlers = {number: signal.signal(number, ask) for number in _SIGNALS}
        self.polite = True
        try:
            yield
        finally:
            self.polite = False
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ends the program if it is in the block some seconds after a signal that is to end it."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(receiver, interruption), daemon=True).start()
    try:
        yield interruption
    finally:
        signal.set_wakeup_fd(before)
        sender.close()


def _listen(receiver: socket.socket, interruption: Interruption) -> None:
    requests = _Requests()
    with receiver:
        while numbers := receiver.recv(64):
            if not set(numbers) & set(_SIGNALS):
                continue
            if requests.repeated() or not interruption.polite:
                break
        else:
            return
        deadline = time.monotonic() + _AT_ONCE
        while (left := deadline - time.monotonic()) > 0:
            receiver.settimeout(left)
            try:
                if not receiver.recv(64):  # the block is left
                    return
            except TimeoutError:
                break
    print("deformnet: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # the shell's code for a program ended by Ctrl-C
