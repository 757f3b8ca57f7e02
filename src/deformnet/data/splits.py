"""Split names, unions such as `train2014+val2014`, and parts held out of a split."""

import hashlib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

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
    "val": ("valid", "validation", "dev", "test", "testing"),
}
"""Common names of a split, in order of preference; `test` if there is no validation split."""

USUAL_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "trainval")
)
"""Folder names that identify splits."""


def resolve(names: Sequence[str], wanted: str) -> str:
    """The split of a data set that is called `wanted` (ignoring case) or has another common name.

    The only split of a data set is used as `train`, unless it has the common name of another split.

    Args:
        names: the splits that exist.
    Returns:
        one of `names`, or `wanted` if there is no match
    """
    if wanted in names:
        return wanted
    by_name = {name.lower(): name for name in reversed(names)}
    others = (wanted.lower(), *_OTHER_NAMES.get(wanted.lower(), ()))
    if wanted.lower() == "train" and len(names) == 1 and not is_usual(names[0]):
        return names[0]
    return next((by_name[other] for other in others if other in by_name), wanted)


def is_usual(name: str) -> bool:
    """Whether a split has a common name, with or without a year: `val2017`, `VOC2007/test`."""
    return name.rpartition("/")[2].lower().rstrip("0123456789").rstrip("_-") in USUAL_SPLITS


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


class PartOfSplit(NamedTuple):
    """A split, the part that is held out of it, or the rest."""

    name: str
    fraction: float | None = None
    """Fraction of the images to hold out; None for the whole split."""
    is_held_out: bool = False
    """Whether this is the part that is held out; False for the rest."""
    seed: int = 0

    def choose(self, names: Sequence[str]) -> list[int]:
        """Indices of the images of this part, given the image names of the split.

        The images to hold out depend only on their names and the seed: they are ranked by SHA-256.

        Raises:
            UserError: if this part or the rest would have no image.
        """
        if self.fraction is None:
            return list(range(len(names)))
        count = round(self.fraction * len(names))
        if not 0 < count < len(names):
            raise UserError(
                f"split {self.name!r}: expected a fraction that leaves an image on both sides, but "
                f"{self.fraction:g} of its {len(names)} images is {count}"
            )
        ranked = sorted(
            range(len(names)),
            key=lambda i: hashlib.sha256(os.fsencode(f"{self.seed}/{names[i]}")).digest(),
        )
        return sorted(ranked[:count] if self.is_held_out else ranked[count:])


_PART = re.compile(
    r"(?P<name>[^\[\]]+)"
    r"(?:\[(?P<kind>held-out|without)=(?P<fraction>[0-9.eE-]+)(?:,seed=(?P<seed>[0-9]{1,18}))?\])?"
)


def parse_part(text: str) -> PartOfSplit:
    """Parses the name of a split, `NAME[held-out=F]` (a fraction F of its images) or
    `NAME[without=F]` (the rest). `seed=S` after the fraction makes another selection.

    Raises:
        UserError: if it has another form, or F is not between 0 and 1.
    """
    match = _PART.fullmatch(text)
    if match is None:
        raise UserError(
            f"split {text!r}: expected NAME, NAME[held-out=F] or NAME[without=F], or with a seed "
            "NAME[held-out=F,seed=S], such as train[held-out=0.2]"
        )
    if match["kind"] is None:
        return PartOfSplit(match["name"])
    try:
        fraction = float(match["fraction"])
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise UserError(
            f"split {text!r}: expected a fraction between 0 and 1, but got {match['fraction']}"
        )
    return PartOfSplit(
        match["name"], fraction, match["kind"] == "held-out", int(match["seed"] or 0)
    )


class Selectable(Protocol):
    """A data set with named images that supports subsets."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def subset(self, indices: Sequence[int], split: str) -> Self:
        """A subset of the data set, as the split with that name."""
        ...


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
