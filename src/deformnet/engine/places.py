"""Progress of the processes of a run, so that one that waits can report which ones it waits for.

All processes go through the same places in the same order. A process waits for those that have not
reached its place.
"""

import itertools
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from deformnet.data.workers import PATIENCE

_log = logging.getLogger("deformnet")
_BEAT = 2.0  # seconds between two heartbeats


class Places:
    """The place of this process, which is shown to the others, and theirs.

    Args:
        rank: rank of this process.
        count: number of processes.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        self._number, self._place, self._since = 0, "start", time.monotonic()
        self._signs: dict[int, tuple[str, float]] = {}  # heartbeats, and their times
        self._answered = self._since

    def at(self, place: str) -> None:
        """Records that this process has reached a place; all processes call this equally often."""
        self._number += 1
        self._place, self._since = place, time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """In the block, shows the place to the others, and logs waits for other processes."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self._count == 1 or address is None or port is None:
            yield
            return
        left = threading.Event()
        # Two threads: the one that exchanges heartbeats blocks if the store does not respond.
        exchanging = threading.Thread(
            target=self._exchange, args=(address, int(port), left), daemon=True
        )
        exchanging.start()
        threading.Thread(target=self._tell, args=(f"{address}:{port}", left), daemon=True).start()
        try:
            yield
        finally:
            left.set()
            exchanging.join(_BEAT)  # does not cut a connection in use

    def _exchange(self, address: str, port: int, left: threading.Event) -> None:
        """Sends heartbeats, and receives those of the others, until the block or the store ends."""
        own = f"deformnet/{self._rank}"
        with suppress(RuntimeError):
            # A separate connection: that of the process group is blocked during waits.
            store = TCPStore(address, port, is_master=False)
            for beat in itertools.count():
                values = (self._number, self._place, socket.gethostname(), os.getpid(), beat)
                store.set(own, json.dumps(values))
                self._signs = {
                    rank: self._sign(rank, store.get(key).decode())
                    for rank in range(self._count)
                    if rank != self._rank and store.check([key := f"deformnet/{rank}"])
                }
                self._answered = time.monotonic()
                if left.wait(_BEAT):
                    store.delete_key(own)
                    return
        self._signs, self._answered = {}, math.inf

    def _sign(self, rank: int, sign: str) -> tuple[str, float]:
        """A heartbeat, and when it changed."""
        old = self._signs.get(rank)
        return old if old is not None and old[0] == sign else (sign, time.monotonic())

    def _tell(self, store: str, left: threading.Event) -> None:
        """Logs which processes this one waits for, at growing intervals."""
        due, number = PATIENCE, 0
        while not left.wait(_BEAT):
            waited = time.monotonic() - self._since
            if self._number != number:
                due, number = PATIENCE, self._number
            if waited >= due and (others := self._others(store)):
                _log.warning("%s: waiting for %s for %.0f seconds", self._place, others, waited)
                due *= 3

    def _others(self, store: str) -> str:
        """Describes the processes that this one waits for; empty if a lower rank reports them."""
        now = time.monotonic()
        if now - self._answered > PATIENCE:
            return f"rank 0 (no response from {store} for {now - self._answered:.0f} seconds)"
        behind = {}
        for rank, (sign, new) in self._signs.items():
            number, place, host, process, _ = json.loads(sign)
            if now - new > PATIENCE:
                place = f"no heartbeat for {now - new:.0f} seconds"
            if now - new > PATIENCE or number < self._number:
                behind[rank] = f"rank {rank} ({host}, process ID {process}: {place})"
        reporter = next(rank for rank in range(self._count) if rank not in behind)
        return ", ".join(behind.values()) if reporter == self._rank else ""
