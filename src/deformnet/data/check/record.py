"""Record of the valid files of a check, so that an interrupted check resumes."""

import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from deformnet._errors import UserError
from deformnet._files import naming, parse_json, read_file
from deformnet.data.items import Fault, Item, files_of


class Result(NamedTuple):
    """Result of the check of an item."""

    faults: list[Fault]
    counts: Counter[int]
    """Objects or pixels of each class."""
    is_rotated: bool
    """Whether the image has an EXIF orientation other than upright."""
    fingerprint: int | None
    """Fingerprint of the image, to find duplicates; None if it cannot be read."""


class Record:
    """A file with a line for each valid item: key, tab and content. An incomplete line is
    ignored."""

    def __init__(self, path: Path, root: Path) -> None:
        """
        Raises:
            UserError: if another file has this name.
        """
        self._path, self._root = path, f"{root}{os.sep}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a regular file for the record, but got another kind")
        text = read_file(path).decode("ascii", errors="replace") if path.exists() else ""
        if text and not text.startswith('["'):
            raise UserError(
                f"{path}: expected a new file or the record of an earlier check, but got another "
                "file, which was not changed; choose another name"
            )
        lines = (line.partition("\t") for line in text.splitlines())
        self._known = {key: content for key, _, content in lines}
        self._file = path.open("a", encoding="ascii")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def key(self, item: Item) -> str | None:
        """The current key of the item: its files with sizes and times (ns), and a checksum of its
        other fields. None if a file cannot be read."""
        try:
            stats = [Path(file).stat() for file in files_of(item)]
        except (OSError, ValueError):
            return None
        files = [
            [file.removeprefix(self._root), stat.st_size, stat.st_mtime_ns]
            for file, stat in zip(files_of(item), stats, strict=True)
        ]
        checksum = zlib.crc32(repr(item[len(files) :]).encode())
        return json.dumps([type(item).__name__, *files, checksum])

    def find(self, key: str) -> Result | None:
        """The content of the item with this key; None if it is not recorded as valid."""
        try:
            counts, is_rotated, fingerprint = parse_json(self._known[key])
            numbers = Counter({int(label): int(count) for label, count in counts})
        except (KeyError, ValueError, TypeError):
            return None
        return Result([], numbers, bool(is_rotated), int(fingerprint))

    def add(self, key: str, result: Result) -> None:
        """Records a valid item."""
        content = json.dumps([list(result.counts.items()), result.is_rotated, result.fingerprint])
        # Flushed at once, so that the data survives if the process is killed.
        with naming(self._path):
            self._file.write(f"{key}\t{content}\n")
            self._file.flush()

    def close(self) -> None:
        with naming(self._path):  # retries what could not be written
            self._file.close()
