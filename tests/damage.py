"""Damaged files, and how readers handle them.

DEFORMNET_FUZZ sets the number of cases of each test.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from deformnet import UserError

_T = TypeVar("_T")


def cases(default: int) -> int:
    """Number of cases of a test."""
    return int(os.environ.get("DEFORMNET_FUZZ", default))


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies of the content, each with one random bit flipped."""
    rng = random.Random(seed)
    for _ in range(count):
        changed, place = bytearray(content), rng.randrange(8 * len(content))
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def result(path: Path, read: Callable[[Path], _T]) -> _T | None:
    """What a reader returns; None if it raises a one-line error that names the file."""
    try:
        return read(path)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return None
