"""Text files, and files that are replaced as a whole: written beside, then renamed into place."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from deformnet._errors import UserError

_NUMBERS = re.compile(r'\[\n *([^\[\]{}"]+?)\n *\]')
"""A list without strings, lists and objects in indented JSON."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` once it is complete and on the disk.

    Raises:
        OSError: if writing fails, a full disk included; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to errors of writing it, which the system reports without it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # others have a text of their own
            error.filename = str(path)
        raise


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Writes or replaces a JSON file as a whole; a list of numbers is in one line."""
    text = json.dumps(values, indent=2)
    # JSON strings have no line breaks, so that nothing within them matches.
    text = _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: if it is not one.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not a JSON file ({error})") from error


def read_lines(path: Path) -> list[str]:
    """Reads the non-blank lines of a text file, stripped.

    Raises:
        UserError: if the file is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text") from error
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
