"""Autotuning: chooses a kernel's tile by timing, at the first call for a problem on a GPU.

The choices are stored for later processes in Triton's cache folder (TRITON_CACHE_DIR), in one file
per GPU model and version. DEFORMNET_AUTOTUNE=0 turns autotuning off, as does
`torch.use_deterministic_algorithms(True)`, since tiles determine the order of summation: the first
candidate is then used. The same goes for new problems during CUDA graph capture, where nothing can
be timed.
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
# Milliseconds per candidate, in addition to its compilation.
_WARM_UP, _TIMED = 5, 20

_T = TypeVar("_T", bound=NamedTuple)

# By GPU and problem: the tiles that the GPU's file contained at first, and those found since.
_found: dict[str, dict[str, Any]] = {}


def fastest(on: Tensor, problem: str, tiles: Sequence[_T], run: Callable[[_T], object]) -> _T:
    """The fastest of several tiles for a problem, or the first one if nothing is to be timed.

    Args:
        on: a tensor on the GPU.
        problem: name of the problem, with everything that the choice depends on except the GPU.
        run: runs the kernel with a tile; called many times.
    """
    if len(tiles) == 1 or on.device.type not in DEVICE_TYPES or not enabled():
        return tiles[0]
    card = torch.get_device_module(on.device).get_device_name(on.device)
    if card not in _found:
        _found[card] = _read(card)
    known = _found[card].get(problem)
    for tile in tiles:
        # Files may contain anything.
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
    """Whether autotuning is on."""
    choice = os.environ.get(_SWITCH, "1")
    if choice not in ("0", "1"):
        raise ValueError(f"expected {_SWITCH} to be 0 or 1, but got {choice!r}")
    return choice == "1" and not torch.are_deterministic_algorithms_enabled()


def forget() -> None:
    """Discards the choices kept in this process, but not the files."""
    _found.clear()


def _capturing(on: Tensor) -> bool:
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def _seconds(tile: _T, run: Callable[[_T], object]) -> float:
    """Median time of a run; infinite if the GPU cannot run it."""
    try:
        seconds: Any = triton.testing.do_bench(
            lambda: run(tile), warmup=_WARM_UP, rep=_TIMED, return_mode="median"
        )
    except (TritonError, RuntimeError):  # too large, does not compile, or out of memory
        return float("inf")
    return seconds


def _file(card: str) -> Path:
    from deformnet import __version__

    name = re.sub(r"[^\w.]+", "-", f"{card}-{__version__}-{triton.__version__}")
    return Path(knobs.cache.dir) / "deformnet" / f"{name}.json"


def _read(card: str) -> dict[str, Any]:
    """The tiles in a GPU's file; empty if the file is missing or unusable."""
    try:
        content = read_json(_file(card))
    except (OSError, UserError):
        return {}
    if not isinstance(content, dict) or content.get("card") != card:
        return {}
    tiles = content.get("tiles")
    return tiles if isinstance(tiles, dict) else {}


def _write(card: str) -> None:
    """Stores the choices, in addition to those that other processes have stored.

    A read-only folder is not an error: later processes just time the tiles again.
    """
    content = {"card": card, "tiles": _read(card) | _found[card]}
    with contextlib.suppress(OSError):
        write_file(_file(card), to_json(content), durable=False)
