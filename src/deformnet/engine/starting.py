"""Starts the processes of a run on this machine if no launcher has done so.

As with Lightning, they run the program again with the same arguments. But they exit when the
process that started them exits, for whatever reason, and it exits when one of them fails.
"""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from deformnet.data.workers import PATIENCE, end_with_parent

_PARENT = "DEFORMNET_STARTED_BY"  # environment variable: a process ID
_Others = Mapping[int, subprocess.Popen[bytes]]


@contextmanager
def started(environment: ClusterEnvironment, devices: int, nodes: int) -> Iterator[None]:
    """Starts the other processes on this machine unless a launcher has done so."""
    if (parent := os.environ.get(_PARENT)) is not None and sys.platform == "linux":
        end_with_parent(int(parent))
    if environment.creates_processes_externally or devices == 1:
        yield
        return
    os.environ |= {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "LOCAL_RANK": "0",  # tells Lightning that the processes have been started
        "WORLD_SIZE": str(devices * nodes),
    }
    main = sys.modules["__main__"].__spec__
    program = [os.path.abspath(sys.argv[0])] if main is None else ["-m", main.name]  # noqa: PTH100
    others = {}
    for rank in range(1, devices):
        own = {"LOCAL_RANK": str(rank), _PARENT: str(os.getpid())}
        command = [sys.executable, *program, *sys.argv[1:]]
        others[rank] = subprocess.Popen(command, env=os.environ | own)
    atexit.register(_end, others)
    left = threading.Event()
    threading.Thread(target=_watch, args=(others, left), daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(others: _Others, left: threading.Event) -> None:
    """Ends this process after another one failed, since it may wait for that one in vain."""
    while not left.wait(0.5):
        for rank, process in others.items():
            if process.poll():
                # Connected processes detect this themselves, with a more specific message.
                if not left.wait(PATIENCE):
                    message = f"process {rank} of this run exited with code {process.returncode}"
                    print(f"deformnet: {message}", file=sys.stderr, flush=True)
                    _kill(others)
                    os._exit(1)
                return


def _end(others: _Others) -> None:
    """Waits briefly for the others to exit, then kills them."""
    deadline = time.monotonic() + PATIENCE
    while any(it.poll() is None for it in others.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(others)


def _kill(others: _Others) -> None:
    for process in others.values():
        process.kill()
        process.wait(PATIENCE)
