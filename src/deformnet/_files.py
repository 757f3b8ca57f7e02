"""Atomic writing of files, and bounded reading.

A file is written under a temporary name next to its target, then renamed: a crash at any time
leaves the old file or the new one, and of two concurrent writers, one complete file remains. A
temporary file that a killed process left is removed when the same file is written again.
"""

import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from deformnet._errors import TOO_LARGE, UserError, lacks_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL = ".partial"
"""Suffix of temporary files. A killed process leaves one behind; nothing reads it, and the next
writer of the same file removes it."""

MAX_BYTES = 1 << 32
"""Larger files raise an error if they have to be in memory as a whole; the largest data sets have
JSON files of 1 to 2 GB."""
MAX_LINES_BYTES = 1 << 28
"""The same for files of lines; a list of a million images has about 100 MB."""
MAX_ANNOTATION_BYTES = 1 << 26
"""The same for the annotation of one image, as text."""

_LARGE_READ = 1 << 20

UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
"""Error numbers of file systems without locks, or that cannot sync a folder."""

FileVersion = tuple[int, int, int]
"""Inode, size and time of a file."""

_CLOSED = "lost+found"
"""Folder at the root of a file system, which only root can read."""

_NUMBERS = re.compile(r'\[\n *([^\[\]{}"]+?)\n *\]')
"""A list without strings, lists and objects in indented JSON."""
_LARGE_NUMBER = re.compile(r"[0-9]{200}|[0-9][eE]\+?[0-9]{3}")


# Writing.


class _Writer(io.BufferedWriter):
    """A file without a descriptor: libraries that bypass the buffer do not notice a full disk
    (Pillow does, and writes a truncated picture)."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def write(self, data: Any, /) -> int:
        # After an exception, the destructor of PyTorch's archive writer writes once more; an error
        # there would abort the process.
        return memoryview(data).nbytes if self.closed else super().write(data)


@contextmanager
def replacing(
    path: Path, *, earlier: Path | None = None, durable: bool = True
) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` once it is complete.

    Args:
        path: file to write or replace.
        earlier: where to keep the file that was at `path`, replacing what was there.
        durable: wait until the file is on disk, which is slow for many small files.
    Raises:
        OSError: if writing fails, for example because the disk is full; `path` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), _unfinished(path) as (partial, raw):
        with raw, _Writer(raw) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(raw.fileno())
        if earlier is not None and path.exists():
            _keep(path, earlier)
        partial.replace(path)
    if durable:
        with naming(path):
            _sync_folder(path.parent)


@contextmanager
def _unfinished(path: Path) -> Iterator[tuple[Path, io.FileIO]]:
    """A temporary file next to `path`, which the caller renames to `path`; removed on failure.

    Its name depends only on that of `path`, so that the next writer finds and removes the file that
    a killed process left. A lock protects it from concurrent writers of `path`, which use random
    names instead; if they are killed, their files remain.
    """
    # A hash, since the name itself may have the maximum length.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    partial = path.with_name(f".{digest}{PARTIAL}")
    _remove_abandoned(partial)
    try:
        raw = io.FileIO(partial, "xb")
        if _lock(raw.fileno()) is False or not _is_named(raw.fileno(), partial):
            raw.close()
            raise FileExistsError  # another writer considered it abandoned
    except FileExistsError:
        partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
        raw = io.FileIO(partial, "xb")
    # Holds the lock until the file is renamed. Not on Windows, which cannot rename open files.
    lock = None if fcntl is None else os.dup(raw.fileno())
    try:
        yield partial, raw
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _remove_abandoned(partial: Path) -> None:
    """Removes a temporary file that is not locked: that of a killed process."""
    with suppress(OSError), partial.open("r+b", buffering=0) as file:
        if _lock(file.fileno()) and _is_named(file.fileno(), partial):
            partial.unlink()


def _lock(handle: int) -> bool | None:
    """Locks an open file until it is closed.

    Returns:
        Whether the lock was free; None if the system or file system does not support locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_named(handle: int, path: Path) -> bool:
    """Whether `path` still refers to the open file, which may have been renamed or removed."""
    opened = os.fstat(handle)
    return identity(path) == (opened.st_dev, opened.st_ino)


def require_writable(folder: Path) -> None:
    """Checks, before a long computation, that its results can be written to a folder.

    Raises:
        OSError: if the folder, or a file in it, cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to system errors without one, or with that of an unfinished file."""
    try:
        yield
    except OSError as error:
        nameless = error.errno is not None and error.filename is None  # not for custom messages
        if nameless or str(error.filename).endswith(PARTIAL):
            error.filename = str(path)
            error.filename2 = None
        raise


@contextmanager
def encoding_png() -> Iterator[None]:
    """Raises MemoryError where Pillow, out of memory, raises an OSError without errno."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise MemoryError(f"out of memory ({error})") from error
        raise


@contextmanager
def fitting(path: Path | str) -> Iterator[None]:
    """Raises MemoryError with the name of a file if there is not enough memory to read it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise MemoryError(f"{path}: {TOO_LARGE}") from error


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes or replaces a file as a whole; see `replacing`."""
    with replacing(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Writes or replaces a JSON file as a whole."""
    write_file(path, to_json(values))


def to_json(values: Mapping[str, object]) -> bytes:
    """The content of a JSON file, with each list of numbers on one line."""
    text = json.dumps(values, indent=2)
    # JSON strings have no line breaks, so that nothing within them matches.
    text = _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    return f"{text}\n".encode()


def remove_partial(folder: Path) -> None:
    """Removes the unfinished files of killed processes from a folder and its subfolders.

    No other process may be writing there.
    """
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes that would write to it, if the system supports it.

    Raises:
        UserError: if one does, or has just renamed it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if _lock(handle) is False or not _is_named(handle, folder):
            raise UserError(
                f"{folder}: expected a folder that no other process writes to, but one does; "
                "wait for it to end, or choose another folder"
            )
        yield
    finally:
        os.close(handle)


def remove_abandoned_folder(folder: Path) -> None:
    """Removes the unfinished folder of a killed process, which no longer locks it.

    Without locks, as on Windows and most network file systems, it could be another process's.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if _lock(handle):
                shutil.rmtree(folder)
        finally:
            os.close(handle)


def identity(path: Path) -> tuple[int, int] | None:
    """Identity of a file, independent of its name; None if the file does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def file_version(path: Path) -> FileVersion | None:
    """What changes when a file is replaced or written to; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_overwrite(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses to overwrite a file that the same command reads, even under another name.

    Raises:
        UserError: if `path` is one of the `inputs`.
    """
    written = identity(path)
    for file in inputs if written is not None else ():
        if identity(file) == written:
            raise UserError(
                f"{path}: expected a new path for the result, but got the input {file}; choose "
                "another name"
            )


def require_own(path: Path, kind: str, is_own: Callable[[Path], bool]) -> None:
    """Refuses to replace a file of another kind.

    Args:
        kind: what the command writes, for the message.
        is_own: whether an existing file is of this kind.
    Raises:
        UserError: if it is not; it is not changed.
    """
    if (path.exists() or path.is_symlink()) and not (path.is_file() and is_own(path)):
        raise UserError(
            f"{path}: expected a new file or {kind}, but got another file, which was not changed; "
            "choose another name"
        )


# Reading.


def require_file(path: Path) -> None:
    """Raises UserError for pipes and devices, from which reading may block forever."""
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # folders have the system's message
        raise UserError(f"{path}: expected a file, but got a pipe or a device")


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file of up to `limit` bytes.

    Raises:
        UserError: if it is a pipe or a device, or larger.
        OSError: if it cannot be read.
        MemoryError: if it does not fit into memory; the message names it.
    """
    require_file(path)
    if (size := path.stat().st_size) > limit:
        raise UserError(f"{path}: expected a file of at most {limit} bytes, but got {size}")
    with naming(path), fitting(path):
        return path.read_bytes()


class BoundedReader(io.BufferedReader):
    """A file that allocates at most its own size: damaged headers can announce petabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGE_READ:
            size = min(size, os.fstat(self.fileno()).st_size)
        return super().read(size)


def mapped(path: Path) -> bytes | mmap.mmap:
    """The first `MAX_BYTES` of a file, mapped into memory, so that only the pages in use are read.

    Raises:
        UserError: if it is a pipe or a device.
        OSError: if it cannot be read.
    """
    require_file(path)
    with naming(path), path.open("rb") as file:
        size = min(os.fstat(file.fileno()).st_size, MAX_BYTES)
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""


def matching(folder: Path, pattern: str) -> Iterator[Path]:
    """The paths in a folder that match a pattern such as `*.txt` or `*/labels/`, unsorted; none if
    the folder does not exist.

    Unlike `Path.glob`, raises an error for a folder that cannot be read.

    Raises:
        OSError: if a folder cannot be read.
    """
    name, inside, rest = pattern.partition("/")
    if name == "**":
        yield from matching(folder, rest)
    for entry in _entries(folder):
        path = folder / entry.name
        if name == "**":
            if entry.is_dir(follow_symlinks=False):
                yield from matching(path, pattern)
        elif fnmatchcase(entry.name, name) and (not inside or entry.is_dir()):
            yield from matching(path, rest) if rest else (path,)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with naming(folder), os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name != _CLOSED]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_json(path: Path, hook: Callable[[dict[str, object]], object] | None = None) -> Any:
    """Reads a JSON file.

    Args:
        path: a regular file in UTF-8, of up to `MAX_BYTES`.
        hook: applied to every object, innermost first, to drop or compress large values.
    Raises:
        UserError: see `parse_json` and `read_file`.
        MemoryError: see `read_file`.
    """
    content = read_file(path)
    try:
        with fitting(path):
            return parse_json(content.decode("utf-8-sig"), hook)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_json(text: str, hook: Callable[[dict[str, object]], object] | None = None) -> Any:
    """Parses JSON.

    Raises:
        UserError: if it is not JSON or too deeply nested, or if a number is NaN, infinite, or too
            large for a float.
    """
    try:
        # Numbers are checked one by one in Python only if the text may contain a large one.
        suspicious = _LARGE_NUMBER.search(text) is not None
        return json.loads(
            text,
            object_hook=hook,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int if suspicious else None,
            parse_float=_bounded_float if suspicious else None,
        )
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("not readable as JSON (nested too deeply)") from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"not readable as JSON ({reason})") from error


def read_lines(path: Path, limit: int = MAX_LINES_BYTES) -> list[str]:
    """Reads the non-blank lines of a text file of up to `limit` bytes, stripped.

    Raises:
        UserError: if the file is not UTF-8 text; also see `read_file`.
        MemoryError: see `read_file`.
    """
    content = read_file(path, limit)
    try:
        with fitting(path):
            lines = content.decode("utf-8-sig").splitlines()
            return [stripped for line in lines if (stripped := line.strip())]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text") from error


def _refuse_constant(name: str) -> object:
    raise UserError(f"expected finite numbers, but got {name}")


def _bounded_int(text: str) -> object:
    return int(text) if len(text) <= 308 else _refuse_large(text)


def _bounded_float(text: str) -> object:
    value = float(text)
    return value if math.isfinite(value) else _refuse_large(text)


def _refuse_large(text: str) -> object:
    raise UserError(f"expected numbers below 1e308, but got {text[:20]}...")


def _keep(path: Path, name: Path) -> None:
    """Gives a file a second name, replacing any file of that name. `path` exists throughout, even
    after a crash."""
    partial = name.with_name(f".{secrets.token_hex(8)}{PARTIAL}")
    try:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
        partial.replace(name)
    finally:  # also if both already are the same file: a rename then does nothing
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the system can."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # EACCES: the folder can be written to, but not read
        if error.errno not in (*UNSUPPORTED, errno.EACCES):
            raise
