"""The picture to click: an image with a margin, sampling locations and bins.

Each click needs a new picture, so it is drawn with Pillow, which is faster than matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deformnet.inspection.viewer.recording import Point, UnitSamples
from deformnet.visualization import colors

_LONG_SIDE = 840  # of an image in its picture, in pixels
_MARGIN = 100  # around it, for samples outside the image
_DULL, _LIGHT = 0.65, 38  # less contrast, so that dots stand out
_OUTSIDE = (226, 226, 226)
_EDGE = (0, 0, 0)
_FAINT = 0.3  # opacity of samples outside the map

Color = tuple[int, int, int]


class Level(NamedTuple):
    """Style of the samples in one map."""

    color: Color
    radius: int


# The map below the unit first; sizes differ, too.
LEVELS = (
    Level(colors.rgb(colors.WHITE), 6),
    Level(colors.rgb(colors.YELLOW), 4),
    Level(colors.rgb(colors.ORANGE), 3),
    Level(colors.rgb(colors.VERMILLION), 2),
    Level(colors.rgb(colors.PURPLE), 2),
    Level(colors.rgb(colors.GREEN), 2),
)
UNIT, BOX = colors.rgb(colors.SKY), colors.rgb(colors.YELLOW)
REGULAR_BIN, MOVED_BIN = colors.rgb(colors.WHITE), colors.rgb(colors.VERMILLION)


@dataclass(frozen=True)
class Frame:
    """Position of an image in its picture: resized, with a margin on all sides.

    Attributes:
        size: height and width of the image.
        inner: height and width of the image in the picture.
        margin: in pixels of the picture.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    margin: int

    @classmethod
    def around(cls, size: tuple[int, int]) -> "Frame":
        """Return the frame of an image of (height, width) `size`."""
        scale = _LONG_SIDE / max(size)
        height, width = (max(1, round(scale * side)) for side in size)
        return cls(size, (height, width), _MARGIN)

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the picture per pixel of the image, vertically and horizontally."""
        return self.inner[0] / self.size[0], self.inner[1] / self.size[1]

    def to_picture(self, points: Tensor) -> Tensor:
        """Return the pixels, int64 [..., 2] (y, x), that contain points of the image."""
        # Centers of pixels are half a pixel from their edges.
        edges = (points.double() + 0.5) * torch.tensor(self.scale).double() + self.margin
        return edges.floor().long()

    def to_image(self, pixel: tuple[int, int]) -> Point:
        """Return the point of the image at the center of a pixel (y, x) of the picture."""
        y, x = (
            (place + 0.5 - self.margin) / scale - 0.5
            for place, scale in zip(pixel, self.scale, strict=True)
        )
        return y, x

    def edges(self, boxes: Tensor) -> Tensor:
        """Return boxes [..., 4] of the image (x1, y1, x2, y2) in pixels of the picture, int64."""
        scale = torch.tensor([*reversed(self.scale)] * 2)
        return (boxes * scale + self.margin).round().long()


def shrink(image: Tensor, frame: Frame) -> Image.Image:
    """Resize an image uint8 [3, H, W] to its size in the picture."""
    height, width = frame.inner
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def backdrop(inner: Image.Image, frame: Frame) -> Image.Image:
    """Return the image with its margin, at less contrast."""
    height, width = frame.picture
    picture = Image.new("RGB", (width, height), _OUTSIDE)
    dull = inner.point([round(_LIGHT + _DULL * value) for value in range(256)] * 3)
    picture.paste(dull, (frame.margin, frame.margin))
    return picture


def draw_samples(picture: Image.Image, frame: Frame, samples: UnitSamples) -> Image.Image:
    """Draw a unit as a cross, and its samples; those outside the map are faint."""
    faint = picture.copy()
    dots = [
        (level, frame.to_picture(points), inside)
        for level, (points, inside) in zip(LEVELS, samples.levels, strict=False)
    ]
    # The lowest map first: on a regular grid, whose points coincide, the upper maps stay visible.
    for level, pixels, inside in reversed(dots):
        _dots(faint, pixels[~inside], level)
    picture = Image.blend(picture, faint, _FAINT)
    for level, pixels, inside in reversed(dots):
        _dots(picture, pixels[inside], level)
    _cross(picture, frame.to_picture(torch.tensor(samples.center)).tolist())
    return picture


def draw_boxes_around(picture: Image.Image, frame: Frame, boxes: Tensor) -> Image.Image:
    """Draw thin boxes, to click on."""
    picture = picture.copy()
    for box in frame.edges(boxes).tolist():
        _rectangle(picture, box, BOX, width=1)
    return picture


def draw_bins(
    picture: Image.Image, frame: Frame, box: Tensor, caption: str, regular: Tensor, moved: Tensor
) -> Image.Image:
    """Draw a detection with its regular bins, dotted, and its moved bins.

    Args:
        box: [4]; regular, moved: [ph, pw, 4]; all in pixels of the image.
        caption: class and score.
    """
    picture = picture.copy()
    edges = frame.edges(box).tolist()
    for bin in frame.edges(regular).reshape(-1, 4).tolist():
        _dotted(picture, bin, REGULAR_BIN)
    _rectangle(picture, edges, BOX, width=3)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=18)
    left, top, right, bottom = draw.textbbox((edges[0], edges[1] - 4), caption, font, anchor="lb")
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill=BOX, outline=_EDGE)
    draw.text((edges[0], edges[1] - 4), caption, _EDGE, font, anchor="lb")
    # All dark edges before all lines: the edge of a bin must not hide the lines of its neighbors.
    bins = frame.edges(moved).reshape(-1, 4).tolist()
    for x1, y1, x2, y2 in bins:
        draw.rectangle((x1 - 1, y1 - 1, max(x1, x2) + 1, max(y1, y2) + 1), outline=_EDGE, width=4)
    for x1, y1, x2, y2 in bins:
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=MOVED_BIN, width=2)
    return picture


def draw_seen(picture: Image.Image, frame: Frame, seen: Sequence[float]) -> Image.Image:
    """Draw a dotted line around the part of an image that the network sees."""
    picture = picture.copy()
    _dotted(picture, frame.edges(torch.tensor(seen)).tolist(), UNIT)
    return picture


def outside(frame: Frame, samples: UnitSamples) -> int:
    """Return the number of samples in the lowest map that lie beyond the margin."""
    pixels = frame.to_picture(samples.levels[-1].points)
    return int(((pixels < 0) | (pixels >= torch.tensor(frame.picture))).any(-1).sum())


def _dots(picture: Image.Image, pixels: Tensor, level: Level) -> None:
    """Draw discs with a dark edge, one for all samples in a pixel."""
    draw, r = ImageDraw.Draw(picture), level.radius
    for y, x in torch.unique(pixels, dim=0).tolist():
        draw.ellipse((x - r, y - r, x + r, y + r), fill=level.color, outline=_EDGE)


def _cross(picture: Image.Image, pixel: Sequence[int]) -> None:
    y, x = pixel
    draw = ImageDraw.Draw(picture)
    for width, length, color in ((5, 12, _EDGE), (3, 11, UNIT)):
        draw.line((x - length, y, x + length, y), color, width)
        draw.line((x, y - length, x, y + length), color, width)


def _rectangle(picture: Image.Image, box: Sequence[int], color: Color, width: int) -> None:
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(picture)
    place = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    dark = (place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1)
    draw.rectangle(dark, outline=_EDGE, width=width + 2)
    draw.rectangle(place, outline=color, width=width)


def _dotted(picture: Image.Image, box: Sequence[int], color: Color) -> None:
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(picture)
    places = [(x, y) for x in range(x1, x2 + 1, 7) for y in (y1, y2)]
    places += [(x, y) for y in range(y1, y2 + 1, 7) for x in (x1, x2)]
    for x, y in places:
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill=_EDGE)
    for x, y in places:
        draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=color)
