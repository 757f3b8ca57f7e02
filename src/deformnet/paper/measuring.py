"""What the benchmarks share: where and how they run, and what is reported of a comparison."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deformnet.engine.runs import machine, versions
from deformnet.ops import backends
from deformnet.paper.settings import TimingOptions
from deformnet.paper.timing import Timing, compare


@contextmanager
def running(bench: TimingOptions) -> Iterator[torch.device]:
    """The device of a benchmark, with the threads that it asks for.

    Raises:
        ValueError: if there is no such device.
    """
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: wanted cuda, but PyTorch finds no GPU here")
    before = torch.get_num_threads()
    torch.set_num_threads(bench.threads or before)
    try:
        yield torch.device(bench.device)
    finally:
        torch.set_num_threads(before)


def require_writable(out: Path | None) -> None:
    """Refuses, before minutes of work, a name that no file can have.

    Raises:
        ValueError: if it is a folder.
    """
    if out is not None and out.is_dir():
        raise ValueError(f"out: wanted the name of a file, got the folder {out}")


def conditions(bench: TimingOptions) -> dict[str, Any]:
    """What the figures depend on, in plain values; under a load of others they mean little."""
    return {
        "machine": machine(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "device": bench.device,
        "threads": torch.get_num_threads(),
        "kernels": backends.resolve("auto", bench.device),
        "backbone": bench.backbone,
        "scale": bench.scale,
        "rounds": bench.rounds,
    }


def condition_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    packages = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    load = "" if found["load"] is None else f", load {found['load']} at the start"
    lines = [
        f"{found['machine']}{load}",
        f"{packages}; operators on {found['device']} by {found['kernels']!r}",
        f"{found['backbone']}, random weights, random pixels, float32; median of "
        f"{found['rounds']} rounds in turns, ratios round by round (p20-p80)",
    ]
    if found["scale"] != 1:
        lines.append(
            f"--scale {found['scale']:g}: images are smaller than the paper's, and so is this "
            "comparison"
        )
    return lines


def side_by_side(
    plain: Callable[[], object],
    deformable: Callable[[], object],
    bench: TimingOptions,
) -> dict[str, Any]:
    """Seconds of both calls in every round, and how many times as long the second takes."""
    times = compare(
        {"plain": _waiting(plain, bench), "deformable": _waiting(deformable, bench)},
        rounds=bench.rounds,
    )
    return {
        "plain": _seconds(times["plain"]),
        "deformable": _seconds(times["deformable"]),
        "ratio": times["deformable"].relative_to(times["plain"]).summary(),
    }


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio with its spread, as text."""
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"


def _waiting(call: Callable[[], object], bench: TimingOptions) -> Callable[[], object]:
    """The call, over when the GPU has done all that it asked for."""
    if bench.device != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def _seconds(timing: Timing) -> dict[str, Any]:
    return {**timing.summary(), "rounds": list(timing.rounds)}
