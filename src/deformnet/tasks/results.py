"""Predictions of files: what is read, and what is written where."""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet.tasks.images import InputFile, as_image
from deformnet.tasks.video import read_frames

BoxFormat = Literal["jsonl", "coco", "yolo", "csv"]
"""File of detections: our own (`deformnet.metrics.detections`), a COCO data set with scores, a
text file of an image for YOLO, or one table."""


class Written(NamedTuple):
    """The outcome of an image or of a frame of a video."""

    name: str
    problem: str | None = None
    """One line about what is wrong with it, or None."""
    boxes: int = 0
    """Number of boxes that were drawn."""
    best: float | None = None
    """Best score of its boxes; None without a box."""


class Source(NamedTuple):
    """An image, or a frame of a video."""

    name: str
    path: Path
    result: str
    """Path of its results in each folder, without a suffix."""
    read: Callable[[], Tensor]


def sources(file: InputFile, *, upright: bool) -> Iterator[Source]:
    """The image of a file, or the frames of a video: `clip.mp4/000000`, `clip.mp4/000001`, ..."""
    if not file.is_video:
        yield Source(file.name, file.path, file.result, partial(_read, file.path, upright))
        return
    frames = read_frames(file.path)
    number = 0
    while True:
        try:
            frame = next(frames, None)
        except (OSError, ValueError) as error:
            yield Source(file.name, file.path, file.name, partial(_fail, error))
            return
        if frame is None:
            return
        name = f"{file.name}/{number:06}"
        yield Source(name, file.path, name, partial(_same, frame))
        number += 1


def require_apart(files: Sequence[InputFile], out: Path, folders: dict[str, str]) -> None:
    """Raises UserError if a picture, in one of `folders` of `out`, would overwrite an input."""
    inputs = {_identity(file.path): file.path for file in files}
    for file in files:
        for folder, suffix in folders.items():
            identity = _identity(out / folder / f"{file.result}{suffix}")
            if identity is not None and identity in inputs:
                raise UserError(
                    f"{out}: expected a folder apart from the images, but the results of "
                    f"{file.path} would overwrite {inputs[identity]}"
                )


def write_picture(path: Path, content: bytes) -> None:
    """Writes or replaces a picture as a whole."""
    with replacing(path) as file:
        file.write(content)


def encoded(picture: Image.Image, suffix: str) -> bytes:
    """A picture as PNG, or as JPEG of high quality; in memory, as Pillow misses a full disk."""
    memory = io.BytesIO()
    if suffix == ".png":
        picture.save(memory, format="PNG")
    else:
        picture.save(memory, format="JPEG", quality=92, subsampling=0)
    return memory.getvalue()


def problem(path: Path, error: Exception) -> str | None:
    """One line about an error that concerns this image alone; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    ):
        return f"{path}: too large for the memory of this machine"
    if isinstance(error, UserError):  # such as a strip that resizing would make too large
        return f"{path}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
        return f"{path}: {error.strerror}"
    return None


def _read(path: Path, upright: bool) -> Tensor:
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: expected an image file")
    return as_image(path, upright=upright)


def _same(frame: Tensor) -> Tensor:
    return frame


def _fail(error: Exception) -> Tensor:
    raise error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells files apart, whatever their names; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
