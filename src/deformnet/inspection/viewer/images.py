"""The images that the page offers, with their ground truth."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from deformnet._errors import UserError
from deformnet.data.files import read_image, read_size
from deformnet.tasks import find_images
from deformnet.tasks.annotations import AnnotatedImages, Annotation

LARGEST_FILE = 25 * 2**20
"""Maximum file size in bytes."""
MOST_PIXELS = 30_000_000
"""Maximum size of an image; a small file can declare far more pixels than fit in memory."""


class Sample(NamedTuple):
    """An image uint8 [3, H, W] and its ground truth, if known."""

    image: Tensor
    ground_truth: Annotation | None = None


def open_image(path: Path) -> Tensor:
    """Read an uploaded image: upright, RGB, uint8 [3, H, W].

    Raises:
        UserError, OSError: as `require_image`, and if it is damaged.
    """
    require_image(path)
    with _named(path):
        return read_image(path, orientation="upright")


def require_image(path: Path) -> None:
    """Check the size of an image file, in bytes and in pixels.

    Raises:
        UserError: one line that begins with the file name (not the folder, which may be temporary),
            if the file is too large, not an image, or has too many pixels.
        FileNotFoundError: if it is not a file.
        OSError: if the file cannot be read.
    """
    if not path.is_file():  # reading a pipe would block
        raise FileNotFoundError(f"{path.name}: no such file")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(
            f"{path.name}: expected a file of at most {LARGEST_FILE / 2**20:.0f} MB, but got "
            f"{size / 2**20:.0f} MB"
        )
    with _named(path):
        height, width = read_size(path)
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path.name}: expected an image of at most {MOST_PIXELS / 1e6:.0f} million pixels, "
            f"but got {width}x{height}"
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Removes the folder of an image from error messages."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


class Images:
    """Images to choose from: their names, and a function that reads one by its index.

    It raises UserError or OSError, one line that names the file, if the image cannot be read.
    """

    def __init__(self, names: Sequence[str], load: Callable[[int], Sample]) -> None:
        self.names, self.load = names, load


class ImageFiles(Images):
    """Image files, and the image files in folders.

    Raises:
        FileNotFoundError: if a file or folder is missing, or a folder holds no image.
        UserError: if two files have the same name, or a given file is not an image.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        files = find_images(paths)
        for path in paths:
            if not path.is_dir():  # files of a folder are checked when they are chosen
                require_image(path)
        names = [file.name for file in files]
        super().__init__(names, lambda index: Sample(open_image(files[index].path)))


class DataSetImages(Images):
    """Images of a data set with ground truth."""

    def __init__(self, images: AnnotatedImages) -> None:
        super().__init__(images.names, lambda index: Sample(*images[index]))
