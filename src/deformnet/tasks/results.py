"""Inputs and outputs of `Predictor.write`."""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor

from deformnet._errors import TOO_LARGE, UserError, lacks_memory
from deformnet._files import encoding_png, identity, read_lines
from deformnet.tasks.images import InputFile, as_image
from deformnet.tasks.video import read_frames

BoxFormat = Literal["jsonl", "coco", "yolo", "csv"]
"""Format of detection files: deformnet's (`deformnet.metrics.detections`), a COCO data set with
scores, a YOLO text file per image, or a CSV table."""
_LABELS = "labels"  # the folder of label maps and YOLO files


class Written(NamedTuple):
    """The outcome for an image or a video frame."""

    name: str
    problem: str | None = None
    """One line that describes the problem; None if there is none."""
    boxes: int = 0
    """Number of boxes that were drawn."""
    best: float | None = None
    """Highest score of its boxes; None if there are no boxes."""


class Source(NamedTuple):
    """An image or a video frame."""

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


def require_apart(
    files: Sequence[InputFile], out: Path, folders: dict[str, str], box_format: BoxFormat
) -> None:
    """Raises UserError if a result would overwrite an input, or the annotations of a data set,
    which are called like label maps and YOLO files.

    Args:
        folders: see `Predictor`.
    """
    inputs = {identity(file.path): file.path for file in files}
    pictures = [folder for folder in folders if folder != _LABELS]
    labels = ".txt" if box_format == "yolo" else folders.get(_LABELS)
    for file in files:
        results = {folder: out / folder / f"{file.result}{folders[folder]}" for folder in folders}
        for result in results.values():
            if (there := identity(result)) is not None and there in inputs:
                raise UserError(
                    f"{out}: expected a separate folder for the results, but those of {file.path} "
                    f"would overwrite {inputs[there]}"
                )
        if labels is None:
            continue
        label = out / _LABELS / f"{file.result}{labels}"
        # Results come with a picture, which is written first.
        has_picture = any(identity(results[folder]) is not None for folder in pictures)
        if identity(label) is not None and not (has_picture and _is_result(label)):
            raise UserError(
                f"{out}: expected a separate folder for the results, but those of {file.path} "
                f"would overwrite {label}, which is not one of them"
            )


def _is_result(label: Path) -> bool:
    """Whether a label file has scores, if it is text; annotations have none."""
    return label.suffix != ".txt" or all(len(line.split()) == 6 for line in read_lines(label))


def encoded(picture: Image.Image, suffix: str) -> bytes:
    """Encodes a picture as PNG or high-quality JPEG, in memory as Pillow ignores full disks."""
    memory = io.BytesIO()
    if suffix == ".png":
        with encoding_png():
            picture.save(memory, format="PNG")
    else:
        picture.save(memory, format="JPEG", quality=92, subsampling=0)
    return memory.getvalue()


def problem(path: Path, error: Exception) -> str | None:
    """One line about an error that concerns only this image; None for any other error."""
    if lacks_memory(error):
        return f"{path}: {TOO_LARGE}"
    if isinstance(
        error, UserError
    ):  # such as a long, narrow image that is too large after resizing
        return f"{path}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
        return f"{path}: {error.strerror}"
    return None


def _read(path: Path, upright: bool) -> Tensor:
    if path.is_dir():
        any(path.iterdir())  # raises PermissionError if it could not be searched
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: expected an image file, but got a folder, a pipe or a device")
    return as_image(path, upright=upright)


def _same(frame: Tensor) -> Tensor:
    return frame


def _fail(error: Exception) -> Tensor:
    raise error
