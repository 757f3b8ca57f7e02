"""Processes close the connections that a run has made, and do not wait for others forever."""

import atexit
import signal

import pytest
import torch
from torch.distributed import all_reduce, init_process_group, is_initialized

from deformnet.engine import connections
from deformnet.engine.connections import closed_at_exit
from forks import Fork


def connect(store, rank, processes):
    where = f"file://{store}"
    init_process_group("gloo", init_method=where, rank=rank, world_size=processes)


def tell_at_exit():
    # A handler that is registered first is called last.
    atexit.register(lambda: print("connected" if is_initialized() else "closed"))


def made_within(store):
    tell_at_exit()
    with closed_at_exit():
        connect(store, 0, 1)


def none(store):
    tell_at_exit()
    with closed_at_exit():
        pass


def of_the_caller(store):
    connect(store, 0, 1)
    none(store)


def stalls(store, rank):
    """Rank 1 never adds its part to the second sum."""
    connections.PATIENCE = 0.5
    with closed_at_exit():
        connect(store, rank, 2)
        all_reduce(torch.ones(1))
        if rank == 1:
            signal.pause()
        all_reduce(torch.ones(1), async_op=True)
        raise RuntimeError("something else is wrong")


@pytest.mark.parametrize(
    ("program", "at_exit"),
    [(made_within, "closed"), (of_the_caller, "connected"), (none, "closed")],
)
def test_connections_that_were_made_within_are_closed(tmp_path, program, at_exit):
    process = Fork(tmp_path / "printed.txt", program, tmp_path / "store")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert printed.split() == [at_exit]


def test_a_failed_process_does_not_wait_for_one_that_has_stalled(tmp_path):
    stalled = Fork(tmp_path / "stalled.txt", stalls, tmp_path / "store", 1)
    try:
        failed = Fork(tmp_path / "failed.txt", stalls, tmp_path / "store", 0)
        printed, _ = failed.communicate(timeout=60)
        assert failed.returncode == 1, printed
        assert "something else is wrong" in printed
        assert stalled.poll() is None
    finally:
        stalled.send_signal(signal.SIGKILL)
        stalled.communicate()
