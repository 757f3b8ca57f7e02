"""Contents of a folder, for messages about data sets without a known layout."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from deformnet.data.files import IMAGE_SUFFIXES, listing

_LIMIT = 2000  # maximum number of files and folders to list
_SNIFFED = 20  # maximum number of files to open per suffix
_START = 1 << 16  # bytes to read from each of them
_SHOWN = 5

_IMAGES = "images"
_SUFFIXES = {
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "archives"),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), "videos"),
    **dict.fromkeys((".csv", ".tsv"), "tables (.csv)"),
    **dict.fromkeys((".tfrecord", ".record"), "TFRecord files"),
    **dict.fromkeys((".mat", ".npy", ".npz", ".h5"), "arrays (.mat, .npy)"),
    **dict.fromkeys((".heic", ".heif", ".avif", ".dng", ".cr2", ".nef"), "photos (.heic, raw)"),
}
_JSON = (  # content that identifies the files of a program
    ("labelme JSON files", (b'"shapes"', b'"imagePath"')),
    ("COCO JSON files", (b'"images"', b'"categories"')),
    ("COCO JSON files", (b'"images"', b'"annotations"')),
    ("VIA JSON files", (b'"regions"', b'"filename"')),
    ("Create ML JSON files", (b'"annotations"', b'"coordinates"')),
)
_XML = (
    ("CVAT XML files", (b"<annotations", b"<version")),
    ("CVAT XML files", (b"<annotations", b"<image ")),
    ("VOC XML files", (b"<annotation",)),
)
_YOLO = re.compile(rb"\s*\d+(\s+-?[\d.eE+-]+){4,}\s*(\n|$)")
_WORDS = {".json": "JSON", ".xml": "XML", ".txt": "YOLO"}
"""Suffixes of files that are opened, and a word in the names of their kinds."""

_ADVICE = {
    "archives": "unpack the archives",
    "videos": "save frames of the videos as images",
    "VIA JSON files": "export them as COCO",
    "Create ML JSON files": "export them as COCO",
    "CVAT XML files": "export them as COCO or YOLO",
    "tables (.csv)": "convert the tables to COCO",
    "TFRecord files": "export them as COCO",
    "photos (.heic, raw)": "save the photos as JPEG",
    "YOLO label files": (
        "write the names of their classes, one per line, to classes.txt beside images/ and labels/"
    ),
}


@dataclass(frozen=True)
class Survey:
    """Files in a folder and its subfolders.

    Attributes:
        counts: number of files of each kind; other files are left out.
        names: names in the folder itself.
        is_complete: False if there are more files than were listed.
    """

    counts: Counter[str]
    names: tuple[str, ...]
    is_complete: bool

    @property
    def has_images(self) -> bool:
        """Whether there are images."""
        return bool(self.counts[_IMAGES])

    @property
    def has_annotations(self) -> bool:
        """Whether there may be annotations."""
        return any(kind not in (_IMAGES, "videos", "photos (.heic, raw)") for kind in self.counts)

    def advice(self) -> list[str]:
        """Advice on files that no layout can read."""
        return list(dict.fromkeys(_ADVICE[kind] for kind in self.counts if kind in _ADVICE))

    def __str__(self) -> str:
        more = "" if self.is_complete else "at least "
        kinds = [f"{count} {kind}" for kind, count in self.counts.most_common()]
        files = more + listing(kinds, _SHOWN) if kinds else "no images or annotations"
        return f"{files}; the folder contains {listing(self.names, _SHOWN)}"


def survey(root: Path, limit: int = _LIMIT) -> Survey:
    """Lists a folder, level by level, in bounded time."""
    counts: Counter[str] = Counter()
    sniffed: Counter[str] = Counter()
    entries = list(islice(_entries(root, limit), limit))
    for path in entries:
        suffix = path.suffix.lower()
        kind = _IMAGES if suffix in IMAGE_SUFFIXES else _SUFFIXES.get(suffix)
        if suffix in _WORDS:
            sniffed[suffix] += 1
            # If there are many files, later ones are assumed to be like the first.
            is_early = sniffed[suffix] <= _SNIFFED
            kind = _sniff(path, suffix) if is_early else _most_frequent(counts, _WORDS[suffix])
        if kind is not None and path.is_file():
            counts[kind] += 1
    names = (path.name for path in islice(root.iterdir(), limit))
    visible = tuple(sorted(name for name in names if not name.startswith(".")))
    return Survey(counts, visible, len(entries) < limit)


def _most_frequent(counts: Counter[str], word: str) -> str | None:
    return next((kind for kind, _ in counts.most_common() if word in kind), None)


def _entries(root: Path, limit: int) -> Iterator[Path]:
    """Visible files and folders in a folder and its subfolders, nearer ones first."""
    folders, seen = [root], {os.path.realpath(root)}
    for folder in folders:
        try:
            entries = sorted(islice(folder.iterdir(), limit))
        except OSError:
            continue  # of another user
        for path in entries:
            if path.name.startswith("."):
                continue
            yield path
            if path.is_dir() and os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                folders.append(path)


def _sniff(path: Path, suffix: str) -> str | None:
    """The kind of a file, by its beginning and end."""
    if not path.is_file():  # reading a named pipe would block
        return None
    try:
        with path.open("rb") as file:
            start = file.read(_START)
            file.seek(max(0, path.stat().st_size - _START))
            content = start + file.read(_START)
    except OSError:
        return None
    if suffix == ".txt":
        return "YOLO label files" if _YOLO.match(start) else None
    kinds = _JSON if suffix == ".json" else _XML
    found = (kind for kind, signs in kinds if all(sign in content for sign in signs))
    return next(found, "other JSON files" if suffix == ".json" else "other XML files")
