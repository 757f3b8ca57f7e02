"""The picture that is clicked: an image with a margin, sampling locations and bins on it.

Pictures are made for each click, so they are drawn pixel by pixel and not by matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from deformnet.inspection.viewer.networks import Point, Sampling

_LONG_SIDE = 840  # of an image in its picture, in pixels
_MARGIN = 100  # around it: samples outside the image lie here
_DULL, _LIGHT = 0.65, 38  # dots show better on a photograph with less contrast
_OUTSIDE = (226, 226, 226)
_EDGE = (0, 0, 0)
_FAINT = 0.3  # opacity of what the network cannot read

Colour = tuple[int, int, int]


class Level(NamedTuple):
    """How the samples in one map are drawn."""

    colour: Colour
    radius: int


# The map below the unit first. Okabe and Ito's, which the colour-blind can tell apart; the sizes
# differ as well.
LEVELS = (
    Level((255, 255, 255), 6),
    Level((240, 228, 66), 4),
    Level((230, 159, 0), 3),
    Level((213, 94, 0), 2),
    Level((204, 121, 167), 2),
    Level((0, 158, 115), 2),
)
UNIT: Colour = (86, 180, 233)
BOX: Colour = (240, 228, 66)
PLAIN_BIN: Colour = (255, 255, 255)
MOVED_BIN: Colour = (213, 94, 0)


@dataclass(frozen=True)
class Frame:
    """How an image lies in its picture: resized, with a margin on all sides.

    Attributes:
        size: height and width of the image.
        inner: the same in the picture.
        margin: pixels of the picture on each side.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    margin: int

    @classmethod
    def around(cls, size: tuple[int, int]) -> "Frame":
        """Of an image of this height and width."""
        scale = _LONG_SIDE / max(size)
        height, width = (max(1, round(scale * side)) for side in size)
        return cls(size, (height, width), _MARGIN)

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the picture to one of the image, down and across."""
        return self.inner[0] / self.size[0], self.inner[1] / self.size[1]

    def to_picture(self, points: Tensor) -> Tensor:
        """The pixels, int64 [..., 2] (y, x), in which points of the image lie."""
        # Pixels are as wide as they are: their centres are half a pixel from their edges.
        edges = (points.double() + 0.5) * torch.tensor(self.scale).double() + self.margin
        return edges.floor().long()

    def to_image(self, pixel: tuple[int, int]) -> Point:
        """The point of the image at the centre of a pixel (y, x) of the picture."""
        y, x = (
            (place + 0.5 - self.margin) / scale - 0.5
            for place, scale in zip(pixel, self.scale, strict=True)
        )
        return y, x

    def edges(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] of the image (x1 y1 x2 y2, edges) in the picture, int64."""
        scale = torch.tensor([*reversed(self.scale)] * 2)
        return (boxes * scale + self.margin).round().long()


def shrink(image: Tensor, frame: Frame) -> Image.Image:
    """An image uint8 [3, H, W] at the size that it has in the picture."""
    height, width = frame.inner
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def backdrop(inner: Image.Image, frame: Frame) -> Image.Image:
    """The image with its margin, dulled."""
    height, width = frame.picture
    picture = Image.new("RGB", (width, height), _OUTSIDE)
    dull = inner.point([round(_LIGHT + _DULL * value) for value in range(256)] * 3)
    picture.paste(dull, (frame.margin, frame.margin))
    return picture


def draw_sampling(picture: Image.Image, frame: Frame, sampling: Sampling) -> Image.Image:
    """The samples of a unit, which is a cross; faint where the network reads nothing."""
    faint = picture.copy()
    dots = [
        (level, frame.to_picture(points), inside)
        for level, (points, inside) in zip(LEVELS, sampling.levels, strict=False)
    ]
    # The lowest map first: of the points that coincide, as all of a plain grid do, the few show.
    for level, pixels, inside in reversed(dots):
        _dots(faint, pixels[~inside], level)
    picture = Image.blend(picture, faint, _FAINT)
    for level, pixels, inside in reversed(dots):
        _dots(picture, pixels[inside], level)
    _cross(picture, frame.to_picture(torch.tensor(sampling.centre)).tolist())
    return picture


def draw_boxes_around(picture: Image.Image, frame: Frame, boxes: Tensor) -> Image.Image:
    """Thin boxes, to be clicked."""
    picture = picture.copy()
    for box in frame.edges(boxes).tolist():
        _rectangle(picture, box, BOX, width=1)
    return picture


def draw_bins(
    picture: Image.Image, frame: Frame, box: Tensor, what: str, plain: Tensor, moved: Tensor
) -> Image.Image:
    """A detection with its regular bins, dotted, and where its offsets have moved them.

    Args:
        box: [4]; plain, moved: [ph, pw, 4]; all in pixels of the image.
        what: class and score.
    """
    picture = picture.copy()
    edges = frame.edges(box).tolist()
    for bin in frame.edges(plain).reshape(-1, 4).tolist():
        _dotted(picture, bin, PLAIN_BIN)
    _rectangle(picture, edges, BOX, width=3)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=18)
    left, top, right, bottom = draw.textbbox((edges[0], edges[1] - 4), what, font, anchor="lb")
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill=BOX, outline=_EDGE)
    draw.text((edges[0], edges[1] - 4), what, _EDGE, font, anchor="lb")
    # A dark edge around each would hide its neighbours' lines: first all edges, then all lines.
    bins = frame.edges(moved).reshape(-1, 4).tolist()
    for x1, y1, x2, y2 in bins:
        draw.rectangle((x1 - 1, y1 - 1, max(x1, x2) + 1, max(y1, y2) + 1), outline=_EDGE, width=4)
    for x1, y1, x2, y2 in bins:
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=MOVED_BIN, width=2)
    return picture


def draw_seen(picture: Image.Image, frame: Frame, seen: Sequence[float]) -> Image.Image:
    """A dotted line around the part of an image that the network sees."""
    picture = picture.copy()
    _dotted(picture, frame.edges(torch.tensor(seen)).tolist(), UNIT)
    return picture


def outside(frame: Frame, sampling: Sampling) -> int:
    """How many of the lowest samples lie beyond the margin."""
    pixels = frame.to_picture(sampling.levels[-1].points)
    return int(((pixels < 0) | (pixels >= torch.tensor(frame.picture))).any(-1).sum())


def _dots(picture: Image.Image, pixels: Tensor, level: Level) -> None:
    """Discs with a dark edge; a pixel is drawn once, however many samples coincide there."""
    draw, r = ImageDraw.Draw(picture), level.radius
    for y, x in torch.unique(pixels, dim=0).tolist():
        draw.ellipse((x - r, y - r, x + r, y + r), fill=level.colour, outline=_EDGE)


def _cross(picture: Image.Image, pixel: Sequence[int]) -> None:
    y, x = pixel
    draw = ImageDraw.Draw(picture)
    for width, length, colour in ((5, 12, _EDGE), (3, 11, UNIT)):
        draw.line((x - length, y, x + length, y), colour, width)
        draw.line((x, y - length, x, y + length), colour, width)


def _rectangle(picture: Image.Image, box: Sequence[int], colour: Colour, width: int) -> None:
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(picture)
    place = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    dark = (place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1)
    draw.rectangle(dark, outline=_EDGE, width=width + 2)
    draw.rectangle(place, outline=colour, width=width)


def _dotted(picture: Image.Image, box: Sequence[int], colour: Colour) -> None:
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(picture)
    places = [(x, y) for x in range(x1, x2 + 1, 7) for y in (y1, y2)]
    places += [(x, y) for y in range(y1, y2 + 1, 7) for x in (x1, x2)]
    for x, y in places:
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill=_EDGE)
    for x, y in places:
        draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=colour)
