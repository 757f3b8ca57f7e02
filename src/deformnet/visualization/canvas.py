"""What all figures share: sizes, colours, axes with nothing around, legends, files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from deformnet._files import replacing

TEXT = 11  # points
# Okabe and Ito's colours, which the colour-blind tell apart. Of those that lie on images together,
# each is lighter or darker than the others, too, so that they differ in grey.
WHITE, YELLOW, SKY, GREEN, VERMILLION, BLUE, BLACK = (
    *("#ffffff", "#f0e442", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#000000"),
)
OUTSIDE = "#e4e4e4"
"""Around an image."""

_DOTS_PER_INCH = 130
_FORMATS = {".png": "png", ".svg": "svg"}


def blank(*, width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def grid(figure: FigureBase, rows: int, columns: int) -> np.ndarray:
    """Axes [rows, columns] without ticks and frames."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
    return axes


def tallness(images: Iterable[Tensor]) -> float:
    """Height by width of the tallest image [3, H, W], for the height of a row."""
    return max(image.shape[1] / image.shape[2] for image in images)


def legend(figure: FigureBase, handles: Sequence[Artist]) -> None:
    """A legend in one line below everything."""
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=len(handles), frameon=False
    )


def pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] uint8 as [H, W, 3], 0 to 1."""
    return image.permute(1, 2, 0).cpu().numpy() / 255


def dulled(image: Tensor) -> np.ndarray:
    """The same with less contrast, to draw on."""
    return 0.15 + 0.65 * pixels(image)


def require_image(image: Tensor) -> None:
    """
    Raises:
        ValueError: if it is not uint8 [3, H, W].
    """
    if image.dtype.is_floating_point or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: wanted uint8 [3, H, W], got {image.dtype} {list(image.shape)}")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as a whole, as PNG or SVG after the suffix of its path.

    The text of an SVG stays text, and clouds of many points are pictures in it. The same figure
    gives the same file.

    Raises:
        ValueError: if the suffix is another one.
    """
    path = Path(path)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: wanted a name that ends in .png or .svg")
    metadata = {"Date": None} if kind == "svg" else {}
    # Letters and not their outlines; names of parts that do not change from time to time.
    style = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deformnet"})
    with style, replacing(path) as file:
        figure.savefig(file, format=kind, facecolor="white", metadata=metadata)
