"""Unions of splits, such as `train2014+val2014`: parsing and consistency."""

from collections.abc import Sequence
from typing import NamedTuple

from deformnet._errors import UserError
from deformnet.data.files import listing


class Part(NamedTuple):
    """One part of a union, as read from disk."""

    name: str
    """File or folder that lists the part, for messages."""
    classes: tuple[str, ...]
    images: Sequence[str]
    """Names of its images."""


def split_parts(split: str) -> list[str]:
    """Names of the splits in a union, one or more, joined by `+`.

    Raises:
        UserError: if a name is empty or repeated.
    """
    names = split.split("+")
    if not all(names):
        raise UserError(f"split {split!r}: expected names of splits joined by +, as in train+val")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"split {split!r}: {name} is named more than once")
    return names


def require_union(parts: Sequence[Part]) -> None:
    """Checks that parts can form one data set.

    Raises:
        UserError: one line that names both parts, if their classes differ or they share the name
            of an image, by which detections and scores are kept.
    """
    owners: dict[str, str] = {}
    for part in parts:
        if part.classes != parts[0].classes:
            raise UserError(
                f"{part.name}: expected the classes of {parts[0].name} "
                f"({listing(parts[0].classes)}) to join both splits, "
                f"but got {listing(part.classes)}"
            )
        names = dict.fromkeys(part.images, part.name)
        common = next((name for name in names if name in owners), None)
        if common is not None:
            raise UserError(
                f"{part.name}: image {common} is also in {owners[common]}; splits with images of "
                "the same name cannot be joined"
            )
        owners |= names
