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


_OTHER_NAMES = {
    "train": ("training",),
    "val": ("valid", "validation", "dev", "test"),
}
"""Names under which a split may be found, the likeliest first; `test` if there is none to validate
on."""

USUAL_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "trainval")
)
"""Names by which a folder is known to be a split."""


def resolve(names: Sequence[str], wanted: str) -> str:
    """The split of a data set that has the name `wanted`, in any case, or another usual name of it.

    Args:
        names: the splits that exist.
    Returns:
        one of `names`, or `wanted` if none fits
    """
    if wanted in names:
        return wanted
    by_name = {name.lower(): name for name in reversed(names)}
    others = (wanted.lower(), *_OTHER_NAMES.get(wanted.lower(), ()))
    return next((by_name[other] for other in others if other in by_name), wanted)


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
