"""Images that users pass in: files, folders, and pixels in any common form."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet.data.files import read_image

ImageInput = str | Path | Image.Image | np.ndarray | Tensor
"""Path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W], in RGB."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def as_image(image: ImageInput) -> Tensor:
    """Converts an image in any supported form to uint8 [3, H, W].

    Raises:
        TypeError: for an object of another kind.
        ValueError: for an array or a tensor of another dtype or shape, or without pixels.
        OSError: if a file cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image).expanduser(), orientation="upright")
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
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


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Lists the given files, and instead of a folder its image files, sorted by name.

    Raises:
        FileNotFoundError: if a folder holds no image.
        UserError: if two files have the same name (their results would, too).
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"{path}: no image in this folder")
        files += inside
    by_name: dict[str, Path] = {}
    for path in files:
        if path.stem in by_name:
            raise UserError(
                f"{by_name[path.stem]} and {path} have the same name: use two output folders"
            )
        by_name[path.stem] = path
    return files


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a picture as JPEG of high quality, as a whole or not at all."""
    with replacing(path) as file:
        picture.save(file, format="JPEG", quality=92, subsampling=0)
