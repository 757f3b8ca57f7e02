"""Waits for other processes are logged, end in time, and can be interrupted."""

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from kills import Forked, Kind, descendants

from deformnet.data import workers
from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.data.workers import loaded
from deformnet.engine import places, processes, starting
from deformnet.engine.logs import read_log

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


class Numbers:
    """Tensors of a size in bytes; `happens` is called in the worker of item 3."""

    def __init__(self, happens=lambda: None, size=64):
        self.happens, self.size = happens, size

    def __getitem__(self, key):
        if key == 3:
            self.happens()
        return torch.full((self.size // 4,), key, dtype=torch.int32)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def load(items, **options):
    return loaded(items, range(6), what="number {}".format, **({"workers": 2} | options))


def values(source):
    return [int(item[0]) for item in source]


def sorted_out(source):
    """The values before an error, and the error."""
    found = []
    with pytest.raises((RuntimeError, TimeoutError)) as error:
        found += values(source)
    return error


@pytest.fixture
def impatient(monkeypatch):
    for module in (workers, places, processes, starting):
        monkeypatch.setattr(module, "PATIENCE", 0.6)
    monkeypatch.setattr(places, "_BEAT", 0.2)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_items_come_in_order(count):
    assert values(load(Numbers(), workers=count)) == [0, 1, 2, 3, 4, 5]
    assert not multiprocessing.active_children()


def test_a_stopped_worker_is_named_and_not_waited_for(impatient, caplog):
    error = sorted_out(load(Numbers(stop), timeout=1))
    assert not multiprocessing.active_children()
    who = r"loader worker with process ID \d+ \(stopped\)"
    error.match(f"^number [13]: expected the {who} to load it within 1 seconds, but got nothing; ")
    assert error.type is TimeoutError
    (record,) = caplog.records
    text = record.getMessage()
    assert re.match(r"waiting for number [13] from the loader worker with process ID \d+ ", text)
    assert text.endswith("(stopped) for 1 seconds")


def test_a_killed_worker_is_named_at_once():
    start = time.monotonic()
    error = sorted_out(load(Numbers(die)))
    error.match(r"DataLoader worker \(pid \d+\) is killed by signal: Killed")
    assert time.monotonic() - start < 4
    assert not multiprocessing.active_children()


def test_a_request_to_stop_ends_the_wait():
    asked = []
    source = load(Numbers(lambda: time.sleep(60)), stopping=lambda: bool(asked))
    assert [int(next(source)[0]) for _ in range(3)] == [0, 1, 2]
    asked.append(True)
    start = time.monotonic()
    assert next(source, None) is None
    assert time.monotonic() - start < 4
    assert not multiprocessing.active_children()


def test_tensors_that_cannot_be_shared_are_sent(monkeypatch):
    def full(storage):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left")

    monkeypatch.setattr(workers, "reduce_storage", full)
    with pytest.warns(UserWarning, match=r"/dev/shm: has no room .* --shm-size=2g"):
        assert values(load(Numbers(size=2**20))) == [0, 1, 2, 3, 4, 5]


def in_namespace(work, *options):
    """Runs a function in a process with its own /dev/shm; skips where that is not permitted."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child():
        user = os.getuid()
        flags = CLONE_NEWNS | (CLONE_NEWUSER if user else 0)
        if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
            return sender.send("unshare is not permitted")
        if user:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", "/dev/shm"]
        subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
        if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
            return sender.send(f"mount is not permitted: {mounted.stderr}")
        return sender.send(work())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        assert receiver.poll(60), "hangs"
        answer = receiver.recv()
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        pytest.skip(answer)
    return answer


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
@pytest.mark.parametrize(
    ("options", "size", "warned"),
    [
        (["size=64m"], 2**20, ""),
        (["size=64m"], 40 * 2**20, "has no room"),
        (["size=64k"], 2**20, "has no room"),
        (["size=16k"], 64, "cannot be written"),
        (["ro"], 2**20, "cannot be written"),
    ],
)
def test_little_shared_memory(options, size, warned):
    def work():
        with warnings.catch_warnings(record=True) as caught:
            found = values(load(Numbers(size=size)))
        return found, " ".join(str(it.message) for it in caught)

    found, message = in_namespace(work, *options)
    assert found == [0, 1, 2, 3, 4, 5]
    assert (warned in message) if warned else ("/dev/shm" not in message)


def test_workers_end_with_a_process_that_is_killed():
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def main():
        source = load(Numbers(stop))
        next(source)
        sender.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    started = receiver.recv()
    time.sleep(0.2)  # one of them is stopped
    process.kill()
    process.join()
    deadline = time.monotonic() + 3
    while any(descendants([one]) for one in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "folder"
    look = {"height": 40, "width": 44, "radius": (0.4, 0.45), "clutter": 0, "warp": 0.0}
    write_shapes(root, Shapes(train=24, val=6, mute=1.0, layout="image-folder", **look))
    return root


@pytest.fixture
def start(data, tmp_path, impatient):
    """Starts a run and waits for its first iteration; finally kills what is left of it."""
    runs = []
    (tmp_path / "log.txt").touch()

    def begin(kind, ranks=None):
        run = Forked(kind, data, tmp_path / "run", tmp_path / "log.txt", ranks)
        runs.append(run)
        deadline = time.monotonic() + 60
        while ranks is None and len(read_log(tmp_path / "run/metrics.csv")) < 1:
            assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.005)
        return run

    yield begin
    for run in runs:
        for one in descendants(run.roots):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        for process in run.processes:
            process.join()


def ended(run, rank, seconds):
    """The exit code of a rank, which must end in time."""
    run.processes[rank].join(seconds)
    return run.codes()[rank]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_not_waited_for(start, tmp_path, stopped):
    """The first rank serves the store through which heartbeats are exchanged."""
    run = start(Kind(2, 0, timeout=4))
    os.kill(run.roots[stopped], signal.SIGSTOP)
    assert ended(run, 1 - stopped, 15) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "Timed out waiting" in log
    assert f"waiting for rank {stopped} " in log
    if stopped == 1:
        assert f"process ID {run.roots[1]}: no heartbeat for " in log


def test_the_second_signal_ends_a_wait_for_another_rank(start, tmp_path):
    run = start(Kind(2, 0, timeout=60))
    os.kill(run.roots[1], signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(run.roots[0], signal.SIGTERM)
    time.sleep(1.2)
    assert run.codes()[0] is None, "the first waits for a safe point"
    os.kill(run.roots[0], signal.SIGTERM)
    assert ended(run, 0, 6) == 130
    assert "deformnet: interrupted" in (tmp_path / "log.txt").read_text()


def test_a_rank_that_does_not_come(start, tmp_path):
    run = start(Kind(2, 0, timeout=2), ranks=[0])
    assert ended(run, 0, 15) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "rank 0: waiting for the 2 processes of this run at 127.0.0.1:" in log
    assert "rank 0: expected all 2 processes of this run to connect to 127.0.0.1:" in log


def test_an_interrupt_while_ranks_meet(start, tmp_path):
    run = start(Kind(2, 0, timeout=60), ranks=[1])
    deadline = time.monotonic() + 30
    while "rank 1: waiting for the 2 processes" not in (tmp_path / "log.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.roots[0], signal.SIGINT)
    assert ended(run, 0, 8) == 130


def test_a_stopped_worker_in_training(start, tmp_path):
    run = start(Kind(1, 1, timeout=2))
    (worker,) = descendants(run.roots) - set(run.roots)
    os.kill(worker, signal.SIGSTOP)
    assert ended(run, 0, 15) == 1
    log = (tmp_path / "log.txt").read_text()
    assert f"loader worker with process ID {worker} (stopped) to load it within 2 seconds" in log
    assert not descendants([worker])


def test_sigterm_while_a_worker_is_stopped(start, tmp_path):
    """The safe point is reached immediately: no iteration is in progress."""
    run = start(Kind(1, 1, timeout=60))
    (worker,) = descendants(run.roots) - set(run.roots)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(run.roots[0], signal.SIGTERM)
    assert ended(run, 0, 8) == 130
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
