"""Lists stored in a few tensors, without a Python object per entry.

A forked `DataLoader` worker copies every memory page with Python objects when it updates their
reference counts; tensors are not copied, and spawned workers share them.
"""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class BytesList(Sequence[bytes]):
    """A list of byte strings in two tensors."""

    def __init__(self, entries: Iterable[bytes]) -> None:
        content, ends = bytearray(), []
        for entry in entries:
            content += entry
            ends.append(len(content))
        self._bytes = torch.from_numpy(np.frombuffer(content, np.uint8))
        self._ends = torch.tensor(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._bytes[span(self._ends, index)].numpy().tobytes()


class StringList(Sequence[str]):
    """A list of strings in two tensors."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._encoded = BytesList(os.fsencode(string) for string in strings)

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return os.fsdecode(self._encoded[index])


def span(ends: Tensor, index: int) -> slice:
    """Range of the entries of `index`, which may be negative, in a flat tensor."""
    index = range(len(ends))[index]
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
