"""Bins of deformable RoI pooling and where offsets move them (Dai et al. 2017, Figure 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from deformnet.visualization import canvas
from deformnet.visualization.colors import VERMILLION, WHITE, YELLOW


class _Line(NamedTuple):
    label: str
    color: str
    width: float
    style: Literal["solid", ":"] = "solid"


# The colors of the paper, as close as those of Okabe and Ito come.
_BOX = _Line("detection", YELLOW, 2.2)
_REGULAR = _Line("its bins", WHITE, 0.8, ":")
_MOVED = _Line("moved by their offsets", VERMILLION, 1.6)
_AROUND = 2.5  # side of the shown part of the image, in sides of the box


@dataclass(frozen=True)
class DetectionBins:
    """A detection with its bins.

    Attributes:
        image: uint8 [3, H, W].
        title: class and score.
        box: [4], x1, y1, x2, y2 in pixels of the image.
        regular, moved: its bins [ph, pw, 4], before and after they are moved.
    Raises:
        ValueError: if one of them has another shape.
    """

    image: Tensor
    title: str
    box: Tensor
    regular: Tensor
    moved: Tensor

    def __post_init__(self) -> None:
        canvas.require_image(self.image)
        if list(self.box.shape) != [4]:
            raise ValueError(f"expected box to have shape [4], but got {list(self.box.shape)}")
        for name, bins in (("regular", self.regular), ("moved", self.moved)):
            if bins.ndim != 3 or bins.shape[2] != 4:
                raise ValueError(
                    f"expected {name} to have shape [ph, pw, 4], but got {list(bins.shape)}"
                )


def bins_figure(detections: Sequence[DetectionBins]) -> Figure:
    """Figure 7: detections, three to a row, with their regular and moved bins.

    Raises:
        ValueError: if there are none.
    """
    canvas.require_some("detections", detections)
    rows = -(-len(detections) // 3)
    columns = min(3, len(detections))
    panel = 8 / columns * canvas.aspect(detection.image for detection in detections) + 0.3
    figure = canvas.blank(width=8, height=panel * rows + 0.4)
    axes = canvas.grid(figure, rows, columns, used=len(detections))
    for one, detection in zip(axes.flat, detections, strict=False):
        draw_bins(one, detection)
        one.set_title(detection.title, fontsize=canvas.TEXT)
    handles = [
        Line2D(
            *([], []),
            label=line.label,
            color="#808080" if line is _REGULAR else line.color,  # white is invisible on the page
            linestyle=line.style,
            linewidth=line.width,
        )
        for line in (_BOX, _REGULAR, _MOVED)
    ]
    canvas.legend(figure, handles)
    return figure


def draw_bins(axes: Axes, detection: DetectionBins) -> None:
    """A detection's box and bins over its dimmed image."""
    height, width = detection.image.shape[1:]
    # The edges of boxes are those of pixels.
    axes.imshow(canvas.dimmed(detection.image), extent=(0, width, height, 0))
    axes.set_facecolor(canvas.OUTSIDE)
    # The thin lines last: bins that hardly move would hide them.
    for bins, line in ((detection.moved, _MOVED), (detection.regular, _REGULAR)):
        for box in bins.reshape(-1, 4):
            axes.add_patch(_rectangle(box, line))
    axes.add_patch(_rectangle(detection.box, _BOX))
    _zoom(axes, detection)


def _zoom(axes: Axes, detection: DetectionBins) -> None:
    """Limits the axes to the surroundings of the box, in the image's proportions."""
    height, width = detection.image.shape[1:]
    x1, y1, x2, y2 = detection.box.tolist()
    fraction = min(1, _AROUND * max((x2 - x1) / width, (y2 - y1) / height))
    left, top = (
        min(max((low + high - fraction * side) / 2, 0), (1 - fraction) * side)
        for low, high, side in ((x1, x2, width), (y1, y2, height))
    )
    axes.set_xlim(left, left + fraction * width)
    axes.set_ylim(top + fraction * height, top)


def _rectangle(box: Tensor, line: _Line) -> Rectangle:
    x1, y1, x2, y2 = box.tolist()
    return Rectangle(
        (x1, y1),
        x2 - x1,
        y2 - y1,
        facecolor="none",
        edgecolor=line.color,
        linewidth=line.width,
        linestyle=line.style,
    )
