"""Where the processes of a run are, so that those that wait can say for whom.

All processes go through the same places in the same order. Whoever has reached a later one than
another waits for it.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore

from deformnet.data.workers import PATIENCE

_log = logging.getLogger("deformnet")
_BEAT = 2.0  # seconds between two signs of life


class Places:
    """The place of this process, which is shown to the others, and theirs.

    Args:
        rank, count: this process, and the number of all.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        self._number, self._place, self._since = 0, "start", time.monotonic()
        self._signs: dict[int, tuple[str, float]] = {}  # and when they were new

    def at(self, place: str) -> None:
        """Takes note of a place; all processes call this equally often."""
        self._number += 1
        self._place, self._since = place, time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the place to the others in the block, and logs whom this process waits for."""
        address = os.environ.get("MASTER_ADDR")
        if self._count == 1 or address is None:
            yield
            return
        left = threading.Event()
        thread = threading.Thread(target=self._show, args=(address, left), daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join(PATIENCE)  # a connection is not cut while it is used

    def _show(self, address: str, left: threading.Event) -> None:
        port, patience = int(os.environ["MASTER_PORT"]), timedelta(seconds=PATIENCE)
        # A connection of its own: that of the process group is blocked while somebody waits.
        with suppress(RuntimeError):  # the others have gone
            store = TCPStore(address, port, is_master=False, timeout=patience)
            due, number, beat = PATIENCE, 0, 0
            while not left.wait(_BEAT if beat else 0):
                beat += 1
                values = (self._number, self._place, socket.gethostname(), os.getpid(), beat)
                store.set(f"deformnet/{self._rank}", json.dumps(values))
                waited = time.monotonic() - self._since
                if self._number != number:
                    due, number = PATIENCE, self._number
                others = self._others(store)
                if waited >= due and others:
                    place = self._place
                    _log.warning("%s: waiting for %s for %.0f seconds", place, others, waited)
                    due *= 3

    def _others(self, store: TCPStore) -> str:
        """The processes that this one waits for, in words, unless a lower one says it."""
        behind = {}
        for rank in range(self._count):
            if rank == self._rank or not store.check([key := f"deformnet/{rank}"]):
                continue
            sign, now = store.get(key).decode(), time.monotonic()
            if self._signs.get(rank, ("", 0.0))[0] != sign:
                self._signs[rank] = sign, now
            silent = now - self._signs[rank][1]
            number, place, host, process, _ = json.loads(sign)
            if silent > PATIENCE:
                place = f"no sign of life for {silent:.0f} seconds"
            if silent > PATIENCE or number < self._number:
                behind[rank] = f"rank {rank} ({host}, process ID {process}: {place})"
        reporter = next(rank for rank in range(self._count) if rank not in behind)
        return ", ".join(behind.values()) if reporter == self._rank else ""
