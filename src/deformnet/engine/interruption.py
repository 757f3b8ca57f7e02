"""Ctrl-C and SIGTERM: the first stops at a safe point, the second immediately, even in a wait.

Python runs signal handlers between two instructions, so a process that waits in C++ for another one
would not react. A thread receives signals at any time, and ends such a process.
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
"""Seconds that an interrupted process has to exit by itself."""
_TWICE = 1.0
"""Seconds within which two signals count as one request, since launchers forward theirs."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """The processes of a run were asked to stop, and have reached a safe point."""


class _Requests:
    """Counts signals."""

    def __init__(self) -> None:
        self.first: float | None = None

    def repeated(self) -> bool:
        """Records a signal; returns whether it repeats an earlier one."""
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        return now - self.first > _TWICE


class Interruption:
    """Requests to stop that a process has received."""

    def __init__(self) -> None:
        self.polite = False
        self._requests = _Requests()

    @property
    def requested(self) -> bool:
        """Whether to stop at the next safe point."""
        return self._requests.first is not None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Treats the first signal, which may come from a batch system or torchrun, as a request."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._requests.repeated():
                raise KeyboardInterrupt

        handlers = {}
        if threading.current_thread() is threading.main_thread():  # only it receives signals
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
    """Ends the program if it is still in the block a few seconds after a signal to exit."""
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
                if not receiver.recv(64):  # the program has left the block
                    return
            except TimeoutError:
                break
    print("deformnet: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # the shell's code for a program ended by Ctrl-C
