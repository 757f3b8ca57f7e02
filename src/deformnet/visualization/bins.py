"""Where bins of deformable RoI pooling have moved (Dai et al. 2017, Figure 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from deformnet.visualization.canvas import (
    OUTSIDE,
    TEXT,
    VERMILLION,
    WHITE,
    YELLOW,
    blank,
    dulled,
    grid,
    legend,
    require_image,
    tallness,
)

# The colours of the paper, as near as Okabe and Ito's come.
_BOX: dict[str, Any] = {"edgecolor": YELLOW, "linewidth": 2.2}
_PLAIN_BIN: dict[str, Any] = {"edgecolor": WHITE, "linewidth": 0.8, "linestyle": ":"}
_MOVED_BIN: dict[str, Any] = {"edgecolor": VERMILLION, "linewidth": 1.6}
_AROUND = 2.5  # times a box's side are shown of the image


@dataclass(frozen=True)
class DetectionBins:
    """A detection with its bins.

    Attributes:
        image: uint8 [3, H, W].
        what: its class and score.
        box: [4], x1, y1, x2, y2 in pixels of the image.
        plain, moved: its bins [ph, pw, 4], before and after they are moved.
    Raises:
        ValueError: if one of them has another shape.
    """

    image: Tensor
    what: str
    box: Tensor
    plain: Tensor
    moved: Tensor

    def __post_init__(self) -> None:
        require_image(self.image)
        if list(self.box.shape) != [4]:
            raise ValueError(f"box: wanted [4], got {list(self.box.shape)}")
        for name, bins in (("plain", self.plain), ("moved", self.moved)):
            if bins.ndim != 3 or bins.shape[2] != 4:
                raise ValueError(f"{name}: wanted [ph, pw, 4], got {list(bins.shape)}")


def bins_figure(parts: Sequence[DetectionBins]) -> Figure:
    """Figure 7: detections, three to a row: the box, its regular bins and where they have moved.

    Raises:
        ValueError: if there are none.
    """
    if not parts:
        raise ValueError("parts: wanted at least one detection, got none")
    rows = -(-len(parts) // 3)
    columns = min(3, len(parts))
    panel = 8 / columns * tallness(found.image for found in parts) + 0.3
    figure = blank(width=8, height=panel * rows + 0.4)
    axes = grid(figure, rows, columns)
    for one in axes.flat[len(parts) :]:
        one.set_visible(False)
    for one, found in zip(axes.flat, parts, strict=False):
        draw_bins(one, found)
        one.set_title(found.what, fontsize=TEXT)
    kinds = (("detection", _BOX), ("its bins", _PLAIN_BIN), ("moved by their offsets", _MOVED_BIN))
    # White would not show on the page.
    lines = [
        Line2D(
            *([], []),
            label=name,
            color="#808080" if style is _PLAIN_BIN else style["edgecolor"],
            linestyle=style.get("linestyle", "-"),
            linewidth=style["linewidth"],
        )
        for name, style in kinds
    ]
    legend(figure, lines)
    return figure


def draw_bins(axes: Axes, parts: DetectionBins) -> None:
    """A detection's box and bins over its dulled image."""
    height, width = parts.image.shape[1:]
    # The edges of boxes are those of pixels.
    axes.imshow(dulled(parts.image), extent=(0, width, height, 0))
    axes.set_facecolor(OUTSIDE)
    # The thin lines last: bins that hardly move would hide where they were.
    for bins, style in ((parts.moved, _MOVED_BIN), (parts.plain, _PLAIN_BIN)):
        for box in bins.reshape(-1, 4):
            axes.add_patch(_rectangle(box, style))
    axes.add_patch(_rectangle(parts.box, _BOX))
    _look_closer(axes, parts)


def _look_closer(axes: Axes, parts: DetectionBins) -> None:
    """Shows the part of the image around the box, in the image's proportions."""
    height, width = parts.image.shape[1:]
    x1, y1, x2, y2 = parts.box.tolist()
    share = min(1, _AROUND * max((x2 - x1) / width, (y2 - y1) / height))
    left, top = (
        min(max((low + high - share * side) / 2, 0), (1 - share) * side)
        for low, high, side in ((x1, x2, width), (y1, y2, height))
    )
    axes.set_xlim(left, left + share * width)
    axes.set_ylim(top + share * height, top)


def _rectangle(box: Tensor, style: Mapping[str, Any]) -> Rectangle:
    x1, y1, x2, y2 = box.tolist()
    return Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor="none", **style)
