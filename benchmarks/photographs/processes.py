"""Runs in several processes, which cannot import their function from `__main__`."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.grid import claimed
from benchmarks.photographs.plan import Job, result_path
from benchmarks.photographs.report import in_words, report
from benchmarks.photographs.training import compute
from deformnet.data.workers import end_with_parent
from deformnet.engine import TrainingStopped


def in_processes(count: int, todo: Sequence[Job], data: Path, out: Path) -> bool:
    """Computes the jobs in this process or in several; returns whether all succeeded."""
    if count == 1:
        return _work(todo, data, out)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(os.getpid(), todo, data, out)) for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # the workers have it, too
        for worker in workers:
            worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _worker(parent: int, todo: Sequence[Job], data: Path, out: Path) -> None:
    end_with_parent(parent)
    sys.exit(0 if _work(todo, data, out) else 1)


def _work(todo: Sequence[Job], data: Path, out: Path) -> bool:
    """Computes the jobs that no other process computes; returns False if asked to stop."""
    torch.set_num_threads(1)
    for number, job in enumerate(todo, start=1):
        with claimed(out / "locks" / job.name) as alone:
            if not alone or result_path(job, out).is_file():
                continue
            begin = time.perf_counter()
            try:
                scores = compute(job, data, out)["scores"]
            except (TrainingStopped, KeyboardInterrupt) as stopped:
                print(f"{job.name}: {stopped or 'stopped'}", flush=True)
                return False
            seconds = time.perf_counter() - begin
            print(
                f"[{number}/{len(todo)}] {job.name}: {in_words(scores)}, {seconds:.0f} s; "
                f"{time.strftime('%H:%M')}",
                flush=True,
            )
        report(out)
    return True
