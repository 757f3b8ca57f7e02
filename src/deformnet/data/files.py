"""Reading one image, label map or list, with an error that names the file."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# What Pillow raises on broken bytes, found by truncating and flipping bytes of JPEG and PNG files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error)


def read_image(path: Path, *, upright: bool = False) -> Tensor:
    """Reads a JPEG or PNG file as RGB; of 16 bits the upper 8.

    Args:
        path: the file.
        upright: turn it as its EXIF orientation says. Images of a data set come as stored, because
            their label maps and boxes are drawn on the stored pixels.
    Returns:
        uint8 [3, H, W]
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no image, is truncated or is corrupt.
    """
    pixels = np.array(_decode(path, convert="RGB", upright=upright))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_labels(path: Path) -> Tensor:
    """Reads a PNG whose pixels are class ids: palette (mode P) or grey (mode L), 8 bits.

    Returns:
        uint8 [H, W]
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no image, is truncated or corrupt, or holds colours and not ids.
    """
    image = _decode(path, convert=None)
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"{path}: wanted class ids (palette P or 8-bit grey L), got mode {image.mode}"
        )
    return torch.from_numpy(np.array(image))


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as stored, from the beginning of its file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no image.
    """
    with _readable(path), Image.open(path) as image:
        return image.height, image.width


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without the blanks around them.

    Raises:
        ValueError: if the file is no UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    return [stripped for line in text.splitlines() if (stripped := line.strip())]


class Folder:
    """The names in a folder, read once: asking for 10,582 files is slow on network disks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = {file.name for file in path.iterdir()} if path.is_dir() else set()

    def find(self, *names: str) -> Path | None:
        """The first of `names` that is here."""
        return next((self.path / name for name in names if name in self._names), None)


def _decode(path: Path, convert: str | None, upright: bool = False) -> Image.Image:
    with _readable(path), Image.open(path) as image:
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image.copy()
        if convert is not None and turned.mode.startswith("I;16"):
            # Pillow would take every value above 255 for white.
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return turned if convert is None else turned.convert(convert)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the file in whatever Pillow raises inside."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a readable image (empty, or no known format)") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # missing file, no permission, failing disk: the system's message names the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
