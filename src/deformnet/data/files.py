"""Reading of a single image, label map or list, with errors that name the file."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from deformnet._errors import UserError

# What Pillow raises on broken bytes, found by truncating and flipping bytes of JPEG and PNG files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error)


def read_image(path: str | Path, *, upright: bool = False) -> Tensor:
    """Reads a JPEG or PNG file as RGB; the upper 8 bits of 16-bit images.

    Args:
        path: the file.
        upright: apply the EXIF orientation. Images with boxes or label maps are read as stored,
            since these are drawn on the stored pixels.
    Returns:
        uint8 [3, H, W]
    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the file is not an image, truncated or corrupt.
    """
    pixels = np.array(_decode(Path(path), convert="RGB", upright=upright))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_labels(path: str | Path) -> Tensor:
    """Reads a PNG of class ids with 8 bits: palette (mode P) or grayscale (mode L).

    Returns:
        uint8 [H, W]
    Raises:
        FileNotFoundError, UserError: as `read_image`, and for a file that holds colors.
    """
    image = _decode(Path(path), convert=None)
    if image.mode not in ("P", "L"):
        raise UserError(
            f"{path}: expected class ids (mode P, palette, or L, 8-bit grayscale), "
            f"but got mode {image.mode}"
        )
    return torch.from_numpy(np.array(image))


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as stored, from its header; errors as `read_image`."""
    with _readable(path), Image.open(path) as image:
        return image.height, image.width


def size_text(height: int, width: int) -> str:
    """A size for messages."""
    return f"{width}x{height}"


def require_folder(path: Path) -> Path:
    """Returns `path` if it is a folder.

    Raises:
        FileNotFoundError: if it does not exist.
        NotADirectoryError: if it is a file.
    """
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path}: expected a folder, but got a file")
    raise FileNotFoundError(f"{path}: no such folder")


def listing(names: Sequence[str], limit: int = 30) -> str:
    """Names in one line, which stays readable for a thousand of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


class Folder:
    """File names in a folder, read once: 10,582 single queries are slow on network disks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = {file.name for file in path.iterdir()} if path.is_dir() else set()

    def find(self, *names: str) -> Path | None:
        """The first of `names` that exists."""
        return next((self.path / name for name in names if name in self._names), None)


def _decode(path: Path, convert: str | None, upright: bool = False) -> Image.Image:
    with _readable(path), Image.open(path) as image:
        image.load()
        decoded = ImageOps.exif_transpose(image) if upright else image.copy()
        if convert is not None and decoded.mode.startswith("I;16"):
            # Pillow would turn every value above 255 into white.
            decoded = Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8))
        return decoded if convert is None else decoded.convert(convert)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Adds the name of the file to whatever Pillow raises inside."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a readable image (empty or of unknown format)") from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # missing file, no permission, failing disk: the system's message names the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}") from error
