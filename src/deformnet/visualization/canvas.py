"""Common parts of all figures: sizes, axes without frames, legends, files."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import replacing

TEXT = 11  # points
OUTSIDE = "#e4e4e4"
"""Color around an image."""

_DOTS_PER_INCH = 130
_FORMATS = {".png": "png", ".svg": "svg"}


def blank(*, width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def grid(figure: FigureBase, rows: int, columns: int, *, used: int | None = None) -> np.ndarray:
    """Axes [rows, columns] without ticks and frames; only the first `used` are visible."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
    for one in axes.flat[used:] if used is not None else ():
        one.set_visible(False)
    return axes


def aspect(images: Iterable[Tensor]) -> float:
    """Largest ratio of height to width of images [3, H, W], for the height of a row; at most 8,
    since a figure of narrow strips would not fit in memory."""
    return min(8.0, max(image.shape[1] / image.shape[2] for image in images))


def legend(figure: FigureBase, handles: Sequence[Artist]) -> None:
    """A legend in one line below everything."""
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=len(handles), frameon=False
    )


def pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] uint8 as [H, W, 3], 0 to 1."""
    return image.permute(1, 2, 0).cpu().numpy() / 255


def dimmed(image: Tensor) -> np.ndarray:
    """Pixels with less contrast, to draw on."""
    return 0.15 + 0.65 * pixels(image)


def require_some(name: str, values: Sized) -> None:
    """
    Raises:
        ValueError: if there are none.
    """
    if not len(values):
        raise ValueError(f"expected {name} to hold at least one {name[:-1]}, but got none")


def require_image(image: Tensor) -> None:
    """
    Raises:
        ValueError: if it is not uint8 [3, H, W].
    """
    if image.dtype.is_floating_point or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected image to be uint8 [3, H, W], but got {image.dtype} {list(image.shape)}"
        )


def same_number(networks: Mapping[str, Sized]) -> int:
    """Number of units, at least one, of each network.

    Raises:
        ValueError: if the networks have different numbers of units, or none.
    """
    counts = {name: len(units) for name, units in networks.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"expected networks to have the same units each, but got {counts}")
    return next(iter(counts.values()))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as a whole, as PNG or SVG by the suffix of its path.

    The text of an SVG stays text, and clouds of many points are pictures in it. The same figure
    gives the same file.

    Raises:
        UserError: for another suffix.
    """
    path = Path(path)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: expected a file name that ends in .png or .svg")
    metadata = {"Date": None} if kind == "svg" else {}
    # Letters instead of their outlines, and names of elements that stay the same.
    style = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deformnet"})
    with style, replacing(path) as file:
        figure.savefig(file, format=kind, facecolor="white", metadata=metadata)
