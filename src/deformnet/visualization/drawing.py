"""Label maps and boxes as pictures: overlays, tags and legends."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_segmentation_masks

from deformnet.visualization.colors import distinct_colors, legible_on, palette

__all__ = [
    "captioned",
    "distinct_colors",
    "draw_boxes",
    "label_image",
    "legible_on",
    "overlay",
    "palette",
]

_OPACITY = 0.55
_SMALLEST = 480  # pixels; a smaller picture is enlarged, so that its legend is legible

_Color = tuple[int, int, int]


def label_image(labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """A palette image with the labels as pixel values.

    Args:
        labels: uint8 [H, W].
        classes: names of the labels.
    """
    image = Image.fromarray(labels.numpy())
    image.putpalette(palette(classes).tobytes())
    return image


def overlay(image: Tensor, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """An image tinted by class, with outlined regions and a legend of its classes below.

    Args:
        image: uint8 [3, H, W], RGB.
        labels: uint8 [H, W].
        classes: names of the labels; `background`, if first, is not tinted, and neither are labels
            without a class, such as void.
    """
    first = int(classes[0] == "background")
    visible: list[int] = [k for k in labels.unique().tolist() if first <= k < len(classes)]
    colors = _colors(classes)
    tinted = F.to_dtype(image, torch.float32, scale=True)
    if visible:
        masks = torch.stack([labels == k for k in visible])
        of_masks: list[str | _Color] = [colors[k] for k in visible]
        tinted = draw_segmentation_masks(tinted, masks, alpha=_OPACITY, colors=of_masks)
        outlines = masks & _outline(labels)
        tinted = draw_segmentation_masks(tinted, outlines, alpha=1.0, colors=of_masks)
    picture = Image.fromarray((255 * tinted).round().byte().permute(1, 2, 0).numpy())
    return _with_legend(_enlarged(picture)[0], [(classes[k], colors[k]) for k in visible])


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
) -> Image.Image:
    """An image with boxes around its objects, each with a tag, and a legend of the classes below.

    A tag shows class and score, or only the score on a small box. Boxes with higher scores are
    drawn over those with lower ones (without scores, earlier over later ones).

    Args:
        image: uint8 [3, H, W], RGB.
        boxes: [n, 4], x1, y1, x2, y2 in pixels of the image.
        labels: int [n], indices into `classes`.
        classes: names of the labels.
        scores: [n], 0 to 1; None for ground truth.
    """
    # torchvision's draw_bounding_boxes has neither an outline, which separates a box from a
    # background of its color, nor tags that avoid one another, and it refuses inverted boxes.
    picture, scale = _enlarged(Image.fromarray(image.permute(1, 2, 0).numpy()))
    draw = ImageDraw.Draw(picture)
    colors = _colors(classes)
    kinds: list[int] = labels.tolist()
    edges = (scale * boxes).round().int().tolist()
    order = list(range(len(boxes)))
    if scores is not None:
        order = scores.argsort(descending=True, stable=True).tolist()
    line = max(2, picture.width // 320)
    for k in reversed(order):
        x1, y1, x2, y2 = edges[k]
        # PIL includes the last pixel; a box without pixels is drawn as a point.
        rectangle = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        outside = (rectangle[0] - 1, rectangle[1] - 1, rectangle[2] + 1, rectangle[3] + 1)
        draw.rectangle(outside, outline="black", width=line + 2)
        draw.rectangle(rectangle, outline=colors[kinds[k]], width=line)
    tags: list[_Rectangle] = []
    drawn: list[tuple[_Rectangle, str, _Color]] = []
    font = ImageFont.load_default(size=max(11, picture.width // 60))
    for k in order:
        score = "" if scores is None else f"{scores[k]:.2f}"
        text, size = _tag_text(f"{classes[kinds[k]]}  {score}".strip(), score, edges[k], font)
        if text:
            tags.append(_tag_place(edges[k], size, picture.size, tags))
            drawn.append((tags[-1], text, colors[kinds[k]]))
    for (x1, y1, x2, y2), text, color in reversed(drawn):
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color, outline="black")
        center = ((x1 + x2) / 2, (y1 + y2) / 2)
        draw.text(center, text, fill=legible_on(color), font=font, anchor="mm")
    return _with_legend(picture, [(classes[k], colors[k]) for k in sorted(set(kinds))])


def captioned(image: Tensor, lines: Sequence[str]) -> Image.Image:
    """Adds lines of text below an image, uint8 [3, H, W]."""
    picture, _ = _enlarged(Image.fromarray(image.permute(1, 2, 0).numpy()))
    text = max(14, picture.width // 50)
    font, row = ImageFont.load_default(size=text), round(1.5 * text)
    height = picture.height + row * len(lines) + text // 2
    joined = Image.new("RGB", (picture.width, height), "white")
    joined.paste(picture, (0, 0))
    draw = ImageDraw.Draw(joined)
    for number, line in enumerate(lines):
        middle = picture.height + text // 4 + row * (number + 0.5)
        draw.text((text // 2, middle), line, fill="black", font=font, anchor="lm")
    return joined


_Rectangle = tuple[int, int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _tag_text(
    text: str, short: str, box: Sequence[int], font: _Font
) -> tuple[str, tuple[int, int]]:
    """The longer text that fits a box of this width, and its size with a margin."""
    size = (0, 0)
    for candidate in (text, short):
        left, top, right, bottom = font.getbbox(candidate)
        size = (math.ceil(right - left) + 6, math.ceil(bottom - top) + 6)
        if size[0] <= max(box[2] - box[0], 4 * size[1]):
            return candidate, size
    return short, size


def _tag_place(
    box: Sequence[int], size: tuple[int, int], picture: tuple[int, int], taken: Sequence[_Rectangle]
) -> _Rectangle:
    """The place of a box's tag that hides least of other tags: at a corner, outside or inside."""
    width, height = size
    x1, y1, x2, y2 = box
    best, least = (0, 0, width, height), math.inf
    for left in (x1, x2 - width):
        for top in (y1 - height, y1, y2, y2 - height):
            x = max(0, min(left, picture[0] - width))
            y = max(0, min(top, picture[1] - height))
            place = (x, y, x + width, y + height)
            hidden = sum(_intersection(place, other) for other in taken)
            if hidden < least:
                best, least = place, hidden
    return best


def _intersection(a: _Rectangle, b: _Rectangle) -> int:
    """Area of the intersection of two rectangles."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def _enlarged(picture: Image.Image) -> tuple[Image.Image, int]:
    """A picture large enough for a legend, and the factor by which it was enlarged."""
    scale = math.ceil(_SMALLEST / picture.width)
    scale = min(scale, 4 * _SMALLEST // max(picture.size))  # a strip would become a huge picture
    if scale <= 1:
        return picture, 1
    size = (scale * picture.width, scale * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST), scale


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, _Color]]) -> Image.Image:
    """Adds a strip of colored squares and names below a picture, in as many rows as needed."""
    if not entries:
        return picture
    text = max(14, picture.width // 50)
    font = ImageFont.load_default(size=text)
    row, gap = round(1.7 * text), text // 2
    places, x, y = [], gap, 0
    for name, color in entries:
        width = text + gap + math.ceil(font.getlength(name)) + 2 * gap
        if x + width > picture.width and x > gap:
            x, y = gap, y + row
        places.append((x, y, name, color))
        x += width
    joined = Image.new("RGB", (picture.width, picture.height + y + row + gap), "white")
    joined.paste(picture, (0, 0))
    draw = ImageDraw.Draw(joined)
    for x, y, name, color in places:
        top = picture.height + y + (row - text + gap) // 2
        draw.rectangle((x, top, x + text, top + text), fill=color, outline="black")
        draw.text((x + text + gap, top + text / 2), name, fill="black", font=font, anchor="lm")
    return joined


def _colors(classes: Sequence[str]) -> list[_Color]:
    return [(int(r), int(g), int(b)) for r, g, b in palette(classes)]


def _outline(labels: Tensor) -> Tensor:
    """Pixels with a neighbor, right, left, above or below, of another label; bool [H, W]."""
    edge = torch.zeros_like(labels, dtype=torch.bool)
    for part, along in ((edge, labels), (edge.T, labels.T)):
        differs = along[1:] != along[:-1]
        part[1:] |= differs
        part[:-1] |= differs
    return edge
