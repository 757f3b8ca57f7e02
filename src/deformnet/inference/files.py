"""Image files to predict: which they are, and what is in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from deformnet.data.files import read_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The given files, and in the place of a folder its image files in the order of their names.

    Raises:
        FileNotFoundError: if a folder holds no image.
        ValueError: if two files have the same name (their results would, too).
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"{path}: no image in this folder")
        files += inside
    seen: dict[str, Path] = {}
    for path in files:
        if path.stem in seen:
            raise ValueError(
                f"{seen[path.stem]} and {path} have the same name: predict them into two folders"
            )
        seen[path.stem] = path
    return files


def read_images(paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor | str]]:
    """Each file in turn, with its image as it is meant to be seen, or with what is wrong with it.

    Returns:
        uint8 [3, H, W], turned as the photograph's EXIF orientation says; or one line that names
        the file.
    """
    for path in paths:
        try:
            yield path, read_image(path, upright=True)
        except OSError as error:
            yield path, f"{path}: {error.strerror or error}"
        except ValueError as error:
            yield path, str(error)
