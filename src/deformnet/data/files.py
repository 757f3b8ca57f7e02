"""Reading of a single image or label map, with errors that name the file; file names."""

import errno
import io
import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import BoundedReader, fitting, naming, require_file

_log = logging.getLogger("deformnet.data")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of image files, in lower case."""

Size = tuple[int, int]
"""Height and width."""

Orientation = Literal["auto", "stored", "upright"]
"""How the EXIF orientation of an image is used: `upright` applies it, `stored` ignores it, and
`auto` selects what matches the annotated size; it applies it if both match or no size is known."""

MAX_PIXELS = 178_956_970
"""Images with more pixels raise an error: a small file can expand to gigabytes."""

# Supported formats, regardless of file names: Pillow would run Ghostscript for others.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
_FORMATS_TEXT = "JPEG, PNG, BMP, TIFF, WebP, GIF or PPM"

_ENDS_EARLY = "not a readable image (the data of the last rows is missing)"

_DAMAGED = "not a readable image (checksum mismatch in its data)"

# What Pillow raises on broken bytes, found by truncating and flipping bytes of JPEG and PNG files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error)

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
_SWAPS_SIDES = (5, 6, 7, 8)


def read_image(
    path: str | Path, *, orientation: Orientation = "stored", annotated: Size | None = None
) -> Tensor:
    """Reads an image as RGB: the first of several frames, the upper 8 bits of 16-bit images.

    Args:
        path: a file in the format JPEG, PNG, BMP, TIFF, WebP, GIF or PPM.
        orientation: use of the EXIF orientation.
        annotated: annotated height and width, used by `auto`.
    Returns:
        uint8 [3, H, W]
    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the file is not an image, truncated or corrupt, or larger than `MAX_PIXELS`.
    """
    with _opened(path) as (file, image):
        turn = _turn(image, orientation, annotated)
        _load(file, image)
        image = to_rgb(image)
        pixels = np.array(image if turn is None else image.transpose(turn))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class StoredMask(NamedTuple):
    """A mask as stored."""

    mode: str
    """Pillow's mode."""
    pixels: np.ndarray
    """uint8 [H, W] of ids, or uint8 [H, W, 3] of colors."""
    palette: np.ndarray
    """uint8 [256, 3], colors of the ids."""

    def ids(self) -> np.ndarray | None:
        """uint8 [H, W] of ids, or None if there are colors other than grays."""
        if self.pixels.ndim == 2:
            return self.pixels
        is_gray = (self.pixels == self.pixels[..., :1]).all()
        return self.pixels[..., 0] if is_gray else None

    def codes(self) -> np.ndarray:
        """int32 [H, W], one number for each color: 0xRRGGBB."""
        if self.pixels.ndim == 2:
            return _codes(self.palette)[self.pixels]
        return _codes(self.pixels)


def read_stored_mask(path: str | Path) -> StoredMask:
    """Reads a mask: palette, grayscale of 1 or 8 bits, or RGB. The EXIF orientation is ignored, and
    transparent pixels are black.

    Raises:
        FileNotFoundError, UserError: see `read_image`; also for a file of another mode.
    """
    with _opened(path) as (file, image):
        _load(file, image)
        palette = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
        if image.mode in ("LA", "PA", "RGBA"):
            pixels = np.array(image.convert("RGBA"))
            pixels = pixels[..., :3] * (pixels[..., 3:] > 0)
        elif image.mode in ("1", "L", "P", "RGB"):
            pixels = np.array(image).astype(np.uint8)
        else:
            raise UserError(
                f"expected class ids (palette, or 8-bit grayscale) or RGB colors, "
                f"but got mode {image.mode}"
            )
        if image.mode == "1":
            palette[1] = 255
        if image.mode == "P":
            colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(colors)] = colors
        return StoredMask(image.mode, pixels, palette)


def read_labels(path: str | Path) -> Tensor:
    """Reads a mask of class ids: palette, or grayscale of 1 or 8 bits, also stored as RGB.

    Returns:
        uint8 [H, W]
    Raises:
        FileNotFoundError, UserError: see `read_stored_mask`; also for a file with colors.
    """
    stored = read_stored_mask(path)
    ids = stored.ids()
    if ids is None:
        raise UserError(
            f"{path}: expected class ids (mode P, palette, or L, 8-bit grayscale), "
            f"but got mode {stored.mode}"
        )
    return torch.from_numpy(ids)


def read_size(
    path: str | Path, *, orientation: Orientation = "stored", annotated: Size | None = None
) -> Size:
    """Height and width of an image as returned by `read_image`, from its header."""
    with _opened(path) as (_, image):
        turns = _turn(image, orientation, annotated) is not None
        swaps = turns and _exif_orientation(image) in _SWAPS_SIDES
        return (image.width, image.height) if swaps else (image.height, image.width)


def is_rotated(path: str | Path) -> bool:
    """Whether the EXIF orientation rotates or flips the pixels; see `read_image` for errors."""
    with _opened(path) as (_, image):
        return _exif_orientation(image) in _TURNS


def read_png(content: bytes, place: str) -> np.ndarray:
    """Reads a PNG embedded in another file, as grayscale: uint8 [H, W].

    Args:
        content: bytes of the PNG.
        place: where it is, for error messages.
    Raises:
        UserError: see `read_image`.
    """
    with _decoding(io.BytesIO(content), place, ("PNG",)) as image:
        _load(io.BytesIO(content), image)
        return np.array(image.convert("L"))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; of 16-bit images, the upper 8 bits."""
    if image.mode.startswith("I;16"):
        # Pillow would turn every value above 255 into white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def size_error(path: Path, size: Size, annotated: Size) -> str:
    """Message about a wrong image size, with the EXIF orientation if that is the cause."""
    text = f"expected the annotated size {size_text(*annotated)}, but got {size_text(*size)}"
    if size == annotated[::-1] and is_rotated(path):
        text += " because of its EXIF orientation; orientation='auto' selects what matches"
    return text


@lru_cache(maxsize=64)
def log_once(level: int, text: str) -> None:
    """Logs a message about a data set, once however often the data set is opened."""
    _log.log(level, text)


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


def first_repeated(names: Sequence[str]) -> str | None:
    """The first name, in alphabetical order, that occurs more than once."""
    return min((name for name, count in Counter(names).items() if count > 1), default=None)


def is_image(name: str) -> bool:
    """Whether a file name is that of a visible image file."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def walk_files(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, list[str]]]:
    """The folder and its subfolders in path order, each with the sorted names of matching files.

    Symbolic links are followed; hidden folders are skipped.

    Raises:
        UserError: if a link points to a folder that contains it.
    """
    yield from sorted(_walk_files(folder, wanted, frozenset()))


def walk_images(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Same as `walk_files`, for images."""
    return walk_files(folder, is_image)


def _walk_files(
    folder: Path, wanted: Callable[[str], bool], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, list[str]]]:
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:
        raise UserError(f"{folder}: expected a folder, but got a link to a folder that contains it")
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    yield str(folder), sorted(entry.name for entry in visible if wanted(entry.name))
    for entry in visible:
        if entry.is_dir():
            yield from _walk_files(folder / entry.name, wanted, above | {here})


def has_images(folder: Path) -> bool:
    """Whether there is an image in a folder or its subfolders; links as in `walk_images`."""
    return any(names for _, names in _walk_files(folder, is_image, frozenset()))


def subfolders(folder: Path) -> list[Path]:
    """Visible folders in a folder, sorted."""
    with os.scandir(folder) as entries:
        names = [it.name for it in entries if not it.name.startswith(".") and it.is_dir()]
    return [folder / name for name in sorted(names)]


def find_images(folder: Path) -> list[Path]:
    """Images in a folder and its subfolders, sorted; links as in `walk_images`."""
    return sorted(Path(place, name) for place, names in walk_images(folder) for name in names)


def image_names(files: Sequence[Path]) -> list[str]:
    """Unique image names that are valid as file names, from relative paths: the stems or, if some
    are equal, the file names or, if some are equal, the paths with `__` as the separator."""
    for names in ([file.stem for file in files], [file.name for file in files]):
        if len(set(names)) == len(names):
            return names
    return ["__".join(file.parts) for file in files]


class Folder:
    """File names in a folder, read once: 10,582 single queries are slow on network disks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = {file.name for file in path.iterdir()} if path.is_dir() else set()
        self._folders: dict[str, Folder] = {}
        self._by_stem: dict[str, str] | None = None

    def find(self, *names: str) -> Path | None:
        """The first of `names` that exists."""
        return next((self.path / name for name in names if name in self._names), None)

    def inner(self, path: PurePath) -> "Folder":
        """A folder in this one, which may not exist; this folder for an empty path."""
        folder = self
        for name in path.parts:
            if name not in folder._folders:
                folder._folders[name] = Folder(folder.path / name)
            folder = folder._folders[name]
        return folder

    def find_image(self, name: str) -> Path | None:
        """The image with a name, which may omit the suffix and begin with subfolders.

        Raises:
            UserError: if the name refers to a path outside the folder.
        """
        *folders, last = inside(name).parts or ("",)
        if folders:
            return self.inner(PurePosixPath(*folders)).find_image(last)
        if self._by_stem is None:
            names = sorted(filter(is_image, self._names), key=_by_suffix, reverse=True)
            self._by_stem = {Path(file).stem: file for file in names}
        file = last if last in self._names and is_image(last) else self._by_stem.get(last)
        return None if file is None else self.path / file


def _by_suffix(name: str) -> tuple[int, str]:
    """Sort key of images with the same stem: JPEG before PNG, as in VOC."""
    return list(IMAGE_SUFFIXES).index(Path(name).suffix.lower()), name


def inside(name: str) -> PurePosixPath:
    """A path relative to a folder, as in lists and annotations.

    Raises:
        UserError: if the path is outside the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise UserError(f"expected a path inside the data folder, but got {name!r}")
    return path


def _codes(pixels: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """Opens an image and reads its header. Errors in the block get the name of the file."""
    path = Path(path)
    require_file(path)
    with (
        naming(path),
        BoundedReader(io.FileIO(path)) as file,
        _decoding(file, str(path), _FORMATS) as image,
    ):
        yield file, image


@contextmanager
def _decoding(file: IO[bytes], place: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    with fitting(place), _readable(place), Image.open(file, formats=formats) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"expected at most {MAX_PIXELS} pixels, but got {size_text(*image.size[::-1])}"
            )
        yield image


def _load(file: IO[bytes], image: Image.Image) -> None:
    """Decodes an image completely. If the compressed data ends early in an otherwise complete file,
    Pillow fills the missing rows with black (PNG) or gray (JPEG). If the last row has this color,
    the compressed data is checked."""
    try:
        image.load()
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        # A TIFF tag has a value of the wrong type.
        raise ValueError(error) from error
    last = np.asarray(image.crop((0, image.height - 1, *image.size)))[-1]
    if image.format == "PNG":
        _require_png_data(file, counted=bool(image.info.get("interlace")) or not last.any())
    if image.format == "JPEG" and (last[-1] == 128).all():
        _require_jpeg_rows(file, image)


def _require_jpeg_rows(file: IO[bytes], image: Image.Image) -> None:
    """Inserts data before the end marker: this changes the pixels only if data was missing."""
    file.seek(0)
    data, end, rest = file.read().rpartition(b"\xff\xd9")
    with Image.open(io.BytesIO(data + b"Z" * 64 + end + rest), formats=("JPEG",)) as longer:
        if longer.tobytes() != image.tobytes():
            raise UserError(_ENDS_EARLY)


def _require_png_data(file: IO[bytes], *, counted: bool) -> None:
    """Compares the checksums of the image data, which Pillow does not, and with `counted` also
    whether there is data for every row."""
    file.seek(8)
    expected, count = 0, 0
    inflate = zlib.decompressobj()
    while len(head := file.read(8)) == 8 and not head.endswith(b"IEND"):
        length, kind = struct.unpack(">I4s", head)
        if kind not in (b"IHDR", b"IDAT"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        data, checksum = file.read(length), file.read(4)
        if kind == b"IHDR":
            expected = _png_bytes(*struct.unpack(">IIBB2xB", data)) if counted else 0
        elif checksum != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
            raise UserError(_DAMAGED)
        else:
            while data and count < expected:
                count += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
    if count < expected:
        raise UserError(_ENDS_EARLY)


def _png_bytes(width: int, height: int, depth: int, color: int, interlaced: int) -> int:
    """Length of the uncompressed data of a PNG."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = [(0, 0, 1, 1)]  # first column and row, and their steps
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in passes]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns)


def _turn(
    image: Image.Image, orientation: Orientation, annotated: Size | None
) -> Image.Transpose | None:
    """The transposition that brings an image to its orientation; None if there is none."""
    number = _exif_orientation(image)
    stored = image.height, image.width
    upright = stored[::-1] if number in _SWAPS_SIDES else stored
    if orientation == "auto":
        fits_stored_only = annotated == stored and annotated != upright
        orientation = "stored" if fits_stored_only else "upright"
    return _TURNS.get(number) if orientation == "upright" else None


def _exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if absent or invalid. Pillow itself rotates TIFF images."""
    if image.format == "TIFF":
        return 1
    try:
        # Not PNG's own method, which decodes the image to look for data at the end of the file.
        number = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except (*_BROKEN, KeyError, TypeError):
        return 1
    return number if isinstance(number, int) else 1


@contextmanager
def _readable(place: str) -> Iterator[None]:
    """Adds the name of the file to whatever Pillow raises inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{place}: not a readable image (empty, or of a format other than {_FORMATS_TEXT})"
        ) from error
    except _BROKEN as error:
        # EINVAL: a damaged header led to a seek to a negative position.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # missing file, no permission, failing disk: the system's message names the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{place}: not a readable image ({reason})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{place}: {error}") from error
