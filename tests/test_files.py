"""Atomic writing: files are complete or unchanged, whatever happens; inputs are not overwritten.

The JSON reader is tested with the data sets.
"""

import errno
import gc
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from deformnet import UserError
from deformnet._files import (
    encoding_png,
    fitting,
    mapped,
    matching,
    naming,
    parse_json,
    read_file,
    read_json,
    read_lines,
    refuse_overwrite,
    remove_partial,
    replacing,
    require_own,
    write_file,
)
from small_sets import one_line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_error_within_torch_save_does_not_abort_the_process(tmp_path, monkeypatch):
    """A killed loader worker raises an error in the main process at any time."""

    def interrupted(*args: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    monkeypatch.setattr(torch.serialization._open_zipfile_writer_buffer, "__exit__", interrupted)
    with pytest.raises(RuntimeError, match="killed"), replacing(tmp_path / "a") as file:
        torch.save({}, file)
    gc.collect()
    assert names(tmp_path) == []


def test_names_of_the_maximum_length(tmp_path):
    write_file(tmp_path / ("a" * 255), b"new")
    with pytest.raises(OSError, match="a" * 256):
        write_file(tmp_path / ("a" * 256), b"new")
    assert names(tmp_path) == ["a" * 255]


def test_two_writers_of_one_path(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write(b"one")
        with replacing(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    contents = [bytes([number]) * 300_000 for number in range(4)]

    def work(content: bytes) -> None:
        for _ in range(20):
            write_file(path, content, durable=False)
            assert path.read_bytes() in contents

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["a"]


def picture(path: Path) -> None:
    """A PNG of 120 kB, written by Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def figure(path: Path) -> None:
    from deformnet.visualization.canvas import blank, save_figure

    made = blank(width=4, height=4)
    made.subplots().imshow(np.random.default_rng(0).random((200, 200)))
    save_figure(made, path)


@pytest.mark.parametrize("draw", [picture, figure])
def test_a_picture_on_a_full_disk(draw: Callable[[Path], None], tmp_path):
    """Pillow bypasses Python's file if it can, and does not notice a short write."""
    path = tmp_path / "a.png"
    draw(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            draw(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.png"]


def test_a_picture_without_memory():
    with pytest.raises(MemoryError, match="out of memory"), encoding_png():
        raise OSError("codec configuration error when writing image file")
    with pytest.raises(OSError, match="No space left"), encoding_png():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_killed_process_leaves(tmp_path):
    (tmp_path / ".0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / "a.partial").write_bytes(b"a file of a user")
    write_file(tmp_path / "a", b"new")
    remove_partial(tmp_path)
    assert names(tmp_path) == ["a", "a.partial"]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "a"
    if (child := os.fork()) == 0:
        with replacing(path) as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = names(tmp_path)
    assert len(left) == 1
    write_file(tmp_path / "b", b"other")
    assert names(tmp_path) == [*left, "b"]
    write_file(path, b"new")
    assert names(tmp_path) == ["a", "b"]


def test_without_locks_no_file_is_considered_abandoned(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    path = tmp_path / "a"
    with replacing(path) as one:
        one.write(b"one")
        write_file(path, b"other")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_the_earlier_file_is_kept(links, tmp_path, monkeypatch):
    if not links:  # like FAT

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path, earlier = tmp_path / "a", tmp_path / "b"
    for number in range(3):
        with replacing(path, earlier=earlier) as file:
            file.write(b"%d" % number)
        assert path.read_bytes() == b"%d" % number
        assert earlier.exists() == (number > 0)
    assert earlier.read_bytes() == b"1"
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_any_moment(links, tmp_path, monkeypatch):
    """At each call that changes the folder, two complete files exist, including the newest."""
    path, earlier = tmp_path / "a", tmp_path / "b"
    write_file(path, b"1")
    with replacing(path, earlier=earlier) as file:
        file.write(b"2")
    moments = []

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            moments.append((path.read_bytes(), earlier.read_bytes()))
            if function is os.link and not links:
                raise OSError(95, "Operation not supported")
            return function(*arguments, **options)

        return call

    for name in ("link", "fsync", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with replacing(path, earlier=earlier) as file:
        file.write(b"3")
    moments.append((path.read_bytes(), earlier.read_bytes()))
    assert set(moments) == {(b"2", b"1"), (b"2", b"2"), (b"3", b"2")}


@pytest.mark.parametrize("name", ["link", "fsync", "replace", "open"])
def test_a_failure_of_the_system(name, tmp_path, monkeypatch):
    path, earlier = tmp_path / "a", tmp_path / "b"
    for content in (b"1", b"2"):
        with replacing(path, earlier=earlier) as file:
            file.write(content)
    real, count = getattr(os, name), 0
    failed = 0
    for number in range(4):
        count = 0

        def failing(*arguments: object, number: int = number, **options: object) -> object:
            nonlocal count, failed
            count += 1
            if count == number + 1:
                failed += 1
                raise OSError(5, "Input/output error")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with suppress(OSError), replacing(path, earlier=earlier) as file:
                file.write(b"3")
        assert path.read_bytes() in (b"2", b"3")
        assert earlier.read_bytes() in (b"1", b"2", b"3")
        assert names(tmp_path) == ["a", "b"]
    assert failed


def test_the_file_is_named_where_the_system_does_not(tmp_path):
    with pytest.raises(OSError, match="No space") as error, naming(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize(
    "pattern", ["*", "*.txt", "*/", "*/labels/", "*/labels", "V*/a.txt", "**/*.txt", "*/**/a*"]
)
def test_what_matches_is_what_glob_finds(pattern, tmp_path):
    for name in ("a.txt", "b.TXT", "x/labels/a.txt", "y/labels", "V7/a.txt", ".h/.a.txt", "V.txt/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "broken").symlink_to(tmp_path / "missing")
    found = sorted(matching(tmp_path, pattern))
    assert found == sorted(tmp_path.glob(pattern))
    assert found
    assert not list(matching(tmp_path / "missing", pattern))
    assert not list(matching(tmp_path / "a.txt", pattern))


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def checked(path):
        if path == tmp_path / "closed":
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", checked)
    for pattern in ("*/*.txt", "**/*.txt"):
        with pytest.raises(OSError, match="Input/output") as error:
            list(matching(tmp_path, pattern))
        assert error.value.filename == str(tmp_path / "closed")


def test_lost_and_found_of_a_disk(tmp_path):
    (tmp_path / "lost+found/labels").mkdir(parents=True)
    assert not list(matching(tmp_path, "*/"))


def test_an_input_is_not_overwritten(tmp_path):
    photo = tmp_path / "photo"
    photo.write_bytes(b"photo")
    (tmp_path / "hard").hardlink_to(photo)
    (tmp_path / "soft").symlink_to(photo)
    for name in ("photo", "hard", "soft", "../" + tmp_path.name + "/photo"):
        with one_line(UserError, tmp_path / name, "but got the input"):
            refuse_overwrite(tmp_path / name, [tmp_path / "missing", photo])
    refuse_overwrite(tmp_path / "new", [tmp_path / "new", photo])


@pytest.mark.parametrize(
    ("read", "limit"), [(read_json, 1 << 32), (read_file, 1 << 32), (read_lines, 1 << 28)]
)
def test_files_that_are_too_large(read, limit, tmp_path):
    path = tmp_path / "a"
    path.touch()
    os.truncate(path, 1 << 42)
    with one_line(UserError, path, f"expected a file of at most {limit} bytes, but got {1 << 42}"):
        read(path)


def test_only_the_beginning_of_a_large_file_is_mapped(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.touch()
    assert mapped(path) == b""
    path.write_bytes(b"0123456789")
    assert mapped(path)[:] == b"0123456789"
    monkeypatch.setattr("deformnet._files.MAX_BYTES", 4)
    assert mapped(path)[:] == b"0123"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")]
)
def test_a_file_that_exhausts_the_memory_is_named(error, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("[1]")
    for name in ("pathlib.Path.read_bytes", "deformnet._files.parse_json"):
        with monkeypatch.context() as patch:
            patch.setattr(name, Mock(side_effect=error))
            with one_line(MemoryError, f"{path}: too large for the memory of this machine"):
                read_json(path)
    with pytest.raises(RuntimeError, match="another"), fitting(path):
        raise RuntimeError("another")


def test_only_own_files_are_replaced(tmp_path):
    path = tmp_path / "a"
    require_own(path, "a report", lambda path: False)
    path.write_text("own")
    require_own(path, "a report", lambda path: path.read_text() == "own")
    (tmp_path / "broken").symlink_to(tmp_path / "missing")
    for other in (path, tmp_path, tmp_path / "broken"):
        with one_line(UserError, other, "expected a new file or a report, but got another file"):
            require_own(other, "a report", lambda path: False)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOSYS, errno.EIO])
@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_folder_that_cannot_be_synced(name, number, tmp_path, monkeypatch):
    """The file in it is complete, and has been renamed."""
    real = getattr(os, name)

    def failing(what: int | Path, *arguments: object) -> object:
        if what == tmp_path or (isinstance(what, int) and stat.S_ISDIR(os.fstat(what).st_mode)):
            raise OSError(number, os.strerror(number))
        return real(what, *arguments)

    monkeypatch.setattr(os, name, failing)
    is_failure = number == errno.EIO  # of the disk
    with pytest.raises(OSError, match="Input/output") if is_failure else nullcontext():
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("text", ["NaN", "[1e999]", "-Infinity", "9" * 400, "[" * 200_000, "{"])
def test_json_that_is_refused(text):
    with pytest.raises(UserError) as error:
        parse_json(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
