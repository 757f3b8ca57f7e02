"""Choice of a kernel's tile by timing, at the first call of its kind on a card.

What was the fastest is kept for later processes in a file of each card and version, in Triton's
cache folder (TRITON_CACHE_DIR). DEFORMNET_AUTOTUNE=0 turns it off, as do
`torch.use_deterministic_algorithms(True)`, since tiles decide in which order numbers are summed,
and the capture of a graph, in which nothing can be timed: the first candidate is then used.
"""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.errors import TritonError

from deformnet._errors import UserError
from deformnet._files import read_json, to_json, write_file
from deformnet.ops.triton import DEVICE_TYPES

_SWITCH = "DEFORMNET_AUTOTUNE"
# Milliseconds of each candidate, besides its compilation.
_WARM_UP, _TIMED = 5, 20

_T = TypeVar("_T", bound=NamedTuple)

# By card: what its file held at first, and what has been found since; by name of the problem.
_found: dict[str, dict[str, Any]] = {}


def fastest(on: Tensor, problem: str, tiles: Sequence[_T], run: Callable[[_T], object]) -> _T:
    """The fastest of some tiles for a problem, or the first one where nothing is to be timed.

    Args:
        on: a tensor on the GPU in question.
        problem: name of everything that the choice depends on, other than the card.
        run: runs the kernel with a tile; it is called many times.
    """
    if len(tiles) == 1 or on.device.type not in DEVICE_TYPES or not enabled():
        return tiles[0]
    card = torch.get_device_module(on.device).get_device_name(on.device)
    if card not in _found:
        _found[card] = _read(card)
    known = _found[card].get(problem)
    for tile in tiles:
        # Files may hold anything.
        if isinstance(known, list | tuple) and tuple(known) == tuple(tile):
            return tile
    if _capturing(on):
        return tiles[0]
    seconds = {tile: _seconds(tile, run) for tile in tiles}
    best = min(tiles, key=lambda tile: seconds[tile])
    _found[card][problem] = tuple(best)
    _write(card)
    return best


def enabled() -> bool:
    """Whether tiles may be chosen by timing."""
    choice = os.environ.get(_SWITCH, "1")
    if choice not in ("0", "1"):
        raise ValueError(f"expected {_SWITCH} to be 0 or 1, but got {choice!r}")
    return choice == "1" and not torch.are_deterministic_algorithms_enabled()


def forget() -> None:
    """Forget what was found in this process; files stay."""
    _found.clear()


def _capturing(on: Tensor) -> bool:
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def _seconds(tile: _T, run: Callable[[_T], object]) -> float:
    """Median time of a run; infinite if the card cannot run it."""
    try:
        seconds: Any = triton.testing.do_bench(
            lambda: run(tile), warmup=_WARM_UP, rep=_TIMED, return_mode="median"
        )
    except (TritonError, RuntimeError):  # too large, not compiled, or no memory for a trial
        return float("inf")
    return seconds


def _file(card: str) -> Path:
    from deformnet import __version__

    name = re.sub(r"[^\w.]+", "-", f"{card}-{__version__}-{triton.__version__}")
    return Path(knobs.cache.dir) / "deformnet" / f"{name}.json"


def _read(card: str) -> dict[str, Any]:
    """The content of a card's file; empty if there is none, or none that is of use."""
    try:
        content = read_json(_file(card))
    except (OSError, UserError):
        return {}
    if not isinstance(content, dict) or content.get("card") != card:
        return {}
    tiles = content.get("tiles")
    return tiles if isinstance(tiles, dict) else {}


def _write(card: str) -> None:
    """Keeps what was found; other processes may have found more. Without it, later processes time
    again, so that a folder that cannot be written to is no error."""
    content = {"card": card, "tiles": _read(card) | _found[card]}
    with contextlib.suppress(OSError):
        write_file(_file(card), to_json(content), durable=False)
