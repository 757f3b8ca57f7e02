"""Input images: files, folders, patterns, videos, PIL images, arrays and tensors."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import matching
from deformnet.data.files import read_image, to_rgb
from deformnet.tasks.video import VIDEO_SUFFIXES, require_reader

ImageInput = str | Path | Image.Image | np.ndarray | Tensor
"""Path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W], in RGB."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def as_image(image: ImageInput, *, upright: bool = True) -> Tensor:
    """Converts an image in any supported form to uint8 [3, H, W].

    Args:
        image: the image.
        upright: apply the EXIF orientation of files and PIL images.
    Raises:
        TypeError: if the object has an unsupported type.
        ValueError: if an array or tensor has an unsupported dtype or shape, or no pixels.
        OSError: if a file cannot be read.
    """
    if isinstance(image, str | Path):
        orientation = "upright" if upright else "stored"
        return read_image(Path(image).expanduser(), orientation=orientation)
    if isinstance(image, Image.Image):
        turned = ImageOps.exif_transpose(image) if upright else image
        return torch.from_numpy(np.array(to_rgb(turned))).permute(2, 0, 1).contiguous()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                "expected image to be an array of uint8 [H, W, 3], but got "
                f"{image.dtype} {list(image.shape)}"
            )
        return torch.tensor(image).permute(2, 0, 1).contiguous()  # a copy: it may be read-only
    if isinstance(image, Tensor):
        return require_image(image)
    raise TypeError(
        "expected image to be a path, a PIL image, a NumPy array, a tensor or a list of those, "
        f"but got {type(image).__name__}"
    )


def require_image(image: Tensor) -> Tensor:
    """Returns an image, or raises ValueError if it is not uint8 [3, H, W] or has no pixels."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(
            f"expected image to be uint8 [3, H, W], but got {image.dtype} {list(image.shape)}"
        )
    return image.as_subclass(Tensor)


class InputFile(NamedTuple):
    """An image file or a video.

    Attributes:
        name: path relative to the given folder, with "/" and the suffix; for a file that was given
            directly, its file name.
        path: the file.
        result: relative path of its results, without a suffix: `name` without its suffix, or all of
            `name` if another file differs only in the suffix.
    """

    name: str
    path: Path
    result: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_images(
    paths: Sequence[str | Path], *, videos: bool = False, apart_from: Path | None = None
) -> list[InputFile]:
    """Lists the given files, the images in the given folders, and the matches of patterns.

    Folders are searched recursively and sorted by name; names that begin with a dot are skipped,
    and links to folders are not followed. A path that does not exist may be a pattern, such as
    `photos/**/*.jpg`.

    Args:
        paths: files, folders and patterns.
        videos: also list videos in folders.
        apart_from: folder to skip (that of the results), inside other folders and in patterns.
    Raises:
        FileNotFoundError: if a folder contains no image, or nothing matches a pattern.
        OSError: if a folder cannot be read.
        UserError: if two files have the same name, so that their results would as well, or if there
            are videos but no video reader.
    """
    files = [file for path in map(Path, paths) for file in _expanded(path, videos, apart_from)]
    by_name: dict[str, Path] = {}
    for name, path in files:
        if by_name.setdefault(name, path) is not path:
            raise UserError(
                f"{by_name[name]} and {path} have the same name: pass a folder that contains both, "
                "or use two output folders"
            )
    stems = Counter(_stem(name) for name in by_name)
    listed = [
        InputFile(name, path, _stem(name) if stems[_stem(name)] == 1 else name)
        for name, path in by_name.items()
    ]
    if any(file.is_video for file in listed):
        require_reader()
    return listed


def _expanded(path: Path, videos: bool, apart_from: Path | None) -> list[tuple[str, Path]]:
    """Names and paths of the files that a path refers to."""
    if path.is_dir():
        inside = sorted(_walk(path, videos, apart_from))
        if not inside and _is_input(path, videos):
            return [(path.name, path)]  # fails alone among other images
        if not inside:
            kinds = "image or video" if videos else "image"
            raise FileNotFoundError(f"{path}: no {kinds} in this folder")
        return [(file.relative_to(path).as_posix(), file) for file in inside]
    if path.exists() or not has_magic(str(path)):
        return [(path.name, path)]
    fixed = next(parent for parent in path.parents if not has_magic(str(parent)))
    found = matching(fixed, path.relative_to(fixed).as_posix())
    matches = sorted(
        file
        for file in found
        if _is_input(file, videos) and file.is_file() and not _is_in(file, apart_from)
    )
    if not matches:
        raise FileNotFoundError(f"{path}: no image matches this pattern")
    return [(file.relative_to(fixed).as_posix(), file) for file in matches]


def _walk(folder: Path, videos: bool, apart_from: Path | None) -> Iterator[Path]:
    skipped = None if apart_from is None else apart_from.resolve()
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        here = Path(parent)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != skipped
        ]
        yield from (here / name for name in names if _is_input(here / name, videos))
    for error in unreadable:
        if Path(error.filename) == folder:
            raise error
        yield Path(error.filename)  # fails alone when it is read


def _is_in(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder.resolve())


def _is_input(path: Path, videos: bool) -> bool:
    suffix = path.suffix.lower()
    known = suffix in _SUFFIXES or (videos and suffix in VIDEO_SUFFIXES)
    return known and not path.name.startswith(".")


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
