"""Images that two splits share although they should not, by file or by content."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

from deformnet._files import naming
from deformnet.data.files import listing
from deformnet.data.items import files_of
from deformnet.data.layouts import ImageList

_PEEKED = 256  # bytes of a file in its fingerprint
_SHOWN = 3

_ROLES = {
    **dict.fromkeys(("train", "training", "train_aug"), frozenset({"train"})),
    **dict.fromkeys(("val", "valid", "validation", "dev"), frozenset({"val"})),
    **dict.fromkeys(("test", "testing"), frozenset({"test"})),
    "trainval": frozenset({"train", "val"}),
}


def role(images: ImageList) -> frozenset[str]:
    """Purpose of a list by its name: train, val, both or test; empty if unknown."""
    name = images.name.removesuffix(" (masks)").rpartition("/")[2].lower()
    name = name.removeprefix("instances_").rstrip("0123456789").rstrip("_-")
    return _ROLES.get(name, frozenset())


def fingerprint(file: Path) -> int:
    """The size of a file and a checksum of bytes in its middle, since photos of the same camera
    have equal headers."""
    size = file.stat().st_size
    with naming(file), file.open("rb") as content:
        content.seek(max(size - _PEEKED, 0) // 2)
        return size << 32 | zlib.crc32(content.read(_PEEKED))


def find_duplicates(
    groups: Iterable[Sequence[ImageList]], fingerprints: Mapping[str, int | None]
) -> Iterator[str]:
    """One line for all pairs of lists that share the same images although they should not.

    Args:
        groups: lists of one data set with one kind of annotations each.
        fingerprints: fingerprints of the image files; None for files that cannot be read.
    """
    keys: tuple[_Key, ...] = (fingerprints.get, cache(_digest))  # few files are read as a whole
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for lists in groups:
        for one, other in combinations(lists, 2):
            first, second = role(one), role(other)
            if first and second and not first & second:
                pairs = _pairs(_images(one), _images(other), keys)
                if pairs:
                    found.setdefault(tuple(pairs), []).append(f"{one.title} and {other.title}")
    for pairs, names in found.items():
        yield (
            f"{listing(names, 1)} have {len(pairs)} images in common, which makes scores too good: "
            f"{_listing(pairs)}"
        )


def _images(images: ImageList) -> list[str]:
    return list(dict.fromkeys(files_of(item)[0] for item in images.items))


def _listing(pairs: Sequence[tuple[str, str]]) -> str:
    names = [[Path(file).name for file in pair] for pair in pairs[:_SHOWN]]
    shown = [name if name == copy else f"{name} = {copy}" for name, copy in names]
    return listing(shown + [""] * (len(pairs) - len(shown)), _SHOWN)


_Key = Callable[[str], int | bytes | None]


def _pairs(
    files: Sequence[str], others: Sequence[str], keys: Sequence[_Key]
) -> list[tuple[str, str]]:
    """Files and their duplicates among other files (the same file, or the same content)."""
    both = set(files) & set(others)
    groups = [([it for it in files if it not in both], [it for it in others if it not in both])]
    for key in keys:
        groups = [part for group in groups for part in _parts(*group, key)]
    copies = ((file, group[1][0]) for group in groups for file in group[0])
    return sorted([*((file, file) for file in both), *copies])


def _parts(
    files: Iterable[str], others: Iterable[str], key: _Key
) -> list[tuple[list[str], list[str]]]:
    """Pairs of files that have the same key."""
    parts: dict[int | bytes | None, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((files, others)):
        for name in names:
            parts.setdefault(key(name), ([], []))[side].append(name)
    parts.pop(None, None)
    return [part for part in parts.values() if all(part)]


def _digest(file: str) -> bytes | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        with Path(file).open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest()
    except OSError:
        return None
