"""Processes close the connections that a run has made, and do not wait for others forever."""

import subprocess
import sys

import pytest

START = """
import atexit, sys
import torch
from torch.distributed import all_reduce, init_process_group, is_initialized
from deformnet.engine import connections
from deformnet.engine.connections import closed_at_exit

def connect(rank, processes):
    where = "file://" + sys.argv[1]
    init_process_group("gloo", init_method=where, rank=rank, world_size=processes)

def tell_at_exit():
    # A handler that is registered first is called last.
    atexit.register(lambda: print("connected" if is_initialized() else "closed"))
"""

MADE_WITHIN = """
tell_at_exit()
with closed_at_exit():
    connect(0, 1)
"""

NONE = """
tell_at_exit()
with closed_at_exit():
    pass
"""

OF_THE_CALLER = "connect(0, 1)" + NONE

# Rank 1 never adds its part to the second sum.
STALLS = """
connections.PATIENCE = 0.5
rank = int(sys.argv[2])
with closed_at_exit():
    connect(rank, 2)
    all_reduce(torch.ones(1))
    if rank == 1:
        sys.stdin.read()
    all_reduce(torch.ones(1), async_op=True)
    raise RuntimeError("something else is wrong")
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", START + program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("program", "at_exit"),
    [(MADE_WITHIN, "closed"), (OF_THE_CALLER, "connected"), (NONE, "closed")],
)
def test_connections_that_were_made_within_are_closed(tmp_path, program, at_exit):
    process = start(program, tmp_path / "store")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert printed.split() == [at_exit]


def test_a_failed_process_does_not_wait_for_one_that_has_stalled(tmp_path):
    stalled = start(STALLS, tmp_path / "store", 1)
    try:
        failed = start(STALLS, tmp_path / "store", 0)
        printed, _ = failed.communicate(timeout=60)
        assert failed.returncode == 1, printed
        assert "something else is wrong" in printed
        assert stalled.poll() is None
    finally:
        stalled.kill()
        stalled.communicate()
