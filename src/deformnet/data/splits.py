"""Sums of splits, such as `train2014+val2014`: what they are made of, and what they must not be."""

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """One part of a sum, as it was read."""

    name: str
    """For messages: the file or folder that lists the part."""
    classes: tuple[str, ...]
    images: Sequence[str]
    """Names of its images."""


def split_parts(split: str) -> list[str]:
    """The names that are joined by `+`, one or more.

    Raises:
        ValueError: if one is empty or comes twice.
    """
    names = split.split("+")
    if not all(names):
        raise ValueError(f"split {split!r}: wanted the names of splits, joined by +")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"split {split!r}: names {name} more than once")
    return names


def require_union(parts: Sequence[Part]) -> None:
    """Checks that parts can be taken as one set.

    Raises:
        ValueError: one line that names both parts, if their classes differ or an image's name is
            in both: detections and scores are kept by name.
    """
    owners: dict[str, str] = {}
    for part in parts:
        if part.classes != parts[0].classes:
            raise ValueError(
                f"{part.name}: has the classes {', '.join(part.classes)}, but {parts[0].name} has "
                f"{', '.join(parts[0].classes)}: they cannot be joined"
            )
        own = dict.fromkeys(part.images, part.name)
        common = next((name for name in own if name in owners), None)
        if common is not None:
            raise ValueError(
                f"{part.name}: image {common} is also in {owners[common]}: they cannot be joined, "
                "as images are told apart by their names"
            )
        owners |= own
