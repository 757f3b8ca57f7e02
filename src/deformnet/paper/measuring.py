"""What timings share: device and threads, conditions, and summaries of a comparison."""

import os
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from deformnet._errors import UserError
from deformnet._files import read_json, require_own, require_writable
from deformnet.engine.runs import machine, versions
from deformnet.ops import backends
from deformnet.paper.settings import TimingOptions
from deformnet.paper.timing import Summary, Timing, compare


class Conditions(TypedDict):
    """What the times depend on."""

    machine: str
    load: float | None
    versions: dict[str, str | None]
    device: str
    threads: int
    kernels: str
    backbone: str
    scale: float
    rounds: int
    precision: str


class Seconds(Summary):
    """Times of a call."""

    rounds: list[float]


class Comparison(TypedDict):
    """Times of two networks, and the ratio of the second to the first."""

    plain: Seconds
    deformable: Seconds
    ratio: Summary


@contextmanager
def running(
    options: TimingOptions, out: Path | None, keys: Set[str]
) -> Iterator[tuple[torch.device, Conditions]]:
    """Yield device and conditions, which are printed, with the number of threads of the options.

    Args:
        out: file that the report will be written to.
        keys: keys of the report.
    Raises:
        UserError: if there is no such device, or `out` is a folder or not a report of this kind.
    """
    if out is not None and out.is_dir():
        raise UserError(f"expected out to be a file, but got the folder {out}")
    if out is not None:
        require_own(out, "the results of an earlier run", partial(_has_keys, keys))
        require_writable(out.parent)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("expected a GPU for device cuda, but PyTorch finds none; use cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        conditions = _conditions(options)
        print(_describe(conditions), flush=True)
        yield torch.device(options.device), conditions
    finally:
        torch.set_num_threads(before)


def _has_keys(keys: Set[str], path: Path) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and content.keys() == keys


def _conditions(options: TimingOptions) -> Conditions:
    return {
        "machine": machine(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "kernels": backends.resolve("auto", options.device),
        "backbone": options.backbone,
        "scale": options.scale,
        "rounds": options.rounds,
        "precision": options.precision,
    }


def _describe(conditions: Conditions) -> str:
    """Return the conditions as text for a terminal."""
    packages = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    load = "" if conditions["load"] is None else f", load {conditions['load']} at the start"
    lines = [
        f"{conditions['machine']}{load}",
        f"{packages}; {conditions['kernels']!r} operators on {conditions['device']}",
        f"{conditions['backbone']}, random weights, random pixels, precision "
        f"{conditions['precision']}; medians of {conditions['rounds']} rounds, networks in turns; "
        "ratios per round (p20-p80)",
    ]
    if conditions["scale"] != 1:
        lines.append(
            f"--scale {conditions['scale']:g}: smaller images than the paper's, the ratios do not "
            "compare to it"
        )
    return "\n".join(lines)


def side_by_side(
    plain: Callable[[], object], deformable: Callable[[], object], options: TimingOptions
) -> Comparison:
    """Time two calls, and the ratio of the second to the first."""
    times = compare(
        {"plain": _synchronized(plain, options), "deformable": _synchronized(deformable, options)},
        rounds=options.rounds,
    )
    return {
        "plain": _seconds(times["plain"]),
        "deformable": _seconds(times["deformable"]),
        "ratio": times["deformable"].relative_to(times["plain"]).summary(),
    }


def autocast(options: TimingOptions) -> torch.autocast:
    """Return the autocast context of a forward pass, disabled for 32-true."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision != "32-true")


def spread(ratio: Summary) -> str:
    """Return a ratio with its quantiles as text."""
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"


def _synchronized(call: Callable[[], object], options: TimingOptions) -> Callable[[], object]:
    """Return the call, extended on a GPU until all of its kernels are done."""
    if options.device != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def _seconds(timing: Timing) -> Seconds:
    return {**timing.summary(), "rounds": list(timing.rounds)}
