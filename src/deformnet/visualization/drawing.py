"""Label maps and boxes as pictures: colours that can be told apart, overlays, legends."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_OPACITY = 0.55
_SMALLEST = 480  # pixels; a smaller picture is enlarged, so that its legend can be read

# Ordered so that neighbours differ most; their black is the background's.
_OKABE_ITO = (
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)


@functools.cache
def distinct_colors(count: int) -> np.ndarray:
    """Colours as far apart as the eye can tell: each next one is the farthest from all before.

    The first seven are those of Okabe and Ito, which the colour-blind can tell apart too. Distances
    are those of CIELAB. Neither very dark nor very light ones, which would not show on a
    photograph, nor greys.

    Returns:
        uint8 [count, 3], RGB; the first ones do not depend on the count.
    """
    levels = np.linspace(0, 255, 16).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 35) & (lab[:, 0] < 90) & (chroma > 35)
    rgb, lab = rgb[usable], lab[usable]
    chosen = [np.array(colour, dtype=float) for colour in _OKABE_ITO]
    distance = np.full(len(rgb), np.inf)
    for colour in chosen[:-1]:
        distance = np.minimum(distance, np.linalg.norm(lab - _lab(colour[None]), axis=1))
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(lab - _lab(chosen[-1][None]), axis=1))
        chosen.append(rgb[distance.argmax()])
    return np.array(chosen[:count], dtype=np.uint8)


def palette(classes: Sequence[str]) -> np.ndarray:
    """The colour of each class, uint8 [len(classes), 3], RGB; `background`, if first, is black."""
    if classes[0] == "background":
        black = np.zeros((1, 3), dtype=np.uint8)
        return np.concatenate([black, distinct_colors(len(classes) - 1)])
    return distinct_colors(len(classes))


def label_image(labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """A palette image whose pixel values are the labels.

    Args:
        labels: uint8 [H, W].
        classes: names of the labels.
    """
    image = Image.fromarray(labels.numpy())
    image.putpalette(palette(classes).tobytes())
    return image


def overlay(image: Tensor, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """An image tinted by class, regions outlined, with a legend of the classes in it below.

    Args:
        image: uint8 [3, H, W], RGB.
        labels: uint8 [H, W].
        classes: names of the labels; `background`, if first, is not tinted, and neither is what is
            no class, as the void of a data set.
    """
    truth = labels.numpy()
    void = truth >= len(classes)
    # The last colour, which does not show.
    colours = np.concatenate([palette(classes), np.zeros((1, 3), dtype=np.uint8)])
    truth = np.where(void, len(classes), truth)
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    opacity = np.full(truth.shape, _OPACITY, dtype=np.float32)
    opacity[_outline(truth)] = 1.0
    if classes[0] == "background":
        opacity[truth == 0] = 0.0
    opacity[void] = 0.0
    tinted = pixels + opacity[..., None] * (colours[truth] - pixels)
    picture, _ = _enlarged(Image.fromarray(tinted.round().astype(np.uint8)))
    shown = [k for k in np.unique(truth[~void]) if classes[k] != "background"]
    return _with_legend(picture, [(str(classes[k]), colours[k]) for k in shown])


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
) -> Image.Image:
    """An image with boxes around its objects, each with a tag, and a legend of the classes below.

    A tag says class and score, or what has room on a small box. Where boxes overlap, those with
    higher scores lie on top (without scores, the earlier ones).

    Args:
        image: uint8 [3, H, W], RGB.
        boxes: [n, 4], x1, y1, x2, y2 in pixels of the image.
        labels: int [n], places in `classes`.
        classes: names of the labels.
        scores: [n], 0 to 1; None for objects that are known, as in a data set.
    """
    picture, scale = _enlarged(Image.fromarray(image.permute(1, 2, 0).numpy()))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(11, picture.width // 60))
    line = max(2, picture.width // 320)
    colours = [(int(r), int(g), int(b)) for r, g, b in palette(classes)]
    kinds: list[int] = labels.tolist()
    order = list(range(len(boxes)))
    if scores is not None:
        order = scores.argsort(descending=True, stable=True).tolist()
    edges = (scale * boxes).round().int().tolist()
    for k in reversed(order):
        x1, y1, x2, y2 = edges[k]
        # PIL counts the last pixel in; a box without pixels is drawn as a point.
        place = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        dark = (place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1)
        draw.rectangle(dark, outline="black", width=line + 2)
        draw.rectangle(place, outline=colours[kinds[k]], width=line)

    tags: list[tuple[int, _Place]] = []
    texts: dict[int, str] = {}
    for k in order:
        name = classes[kinds[k]]
        score = "" if scores is None else f"{scores[k]:.2f}"
        for text in (f"{name}  {score}".strip(), score):
            left, top, right, bottom = font.getbbox(text)
            size = (math.ceil(right - left) + 6, math.ceil(bottom - top) + 6)
            if size[0] <= max(edges[k][2] - edges[k][0], 4 * size[1]):
                break
        if not text:
            continue
        texts[k] = text
        tags.append((k, _tag_place(edges[k], size, picture.size, [place for _, place in tags])))
    for k, (x1, y1, x2, y2) in reversed(tags):
        colour = colours[kinds[k]]
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour, outline="black")
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        draw.text(middle, texts[k], fill=legible_on(colour), font=font, anchor="mm")
    return _with_legend(picture, [(classes[k], palette(classes)[k]) for k in sorted(set(kinds))])


_Place = tuple[int, int, int, int]


def _tag_place(
    box: Sequence[int], size: tuple[int, int], picture: tuple[int, int], taken: Sequence[_Place]
) -> _Place:
    """Where the tag of a box hides the fewest others: at a corner, outside it or inside."""
    width, height = size
    x1, y1, x2, y2 = box
    best, least = (0, 0, width, height), math.inf
    for left in (x1, x2 - width):
        for top in (y1 - height, y1, y2, y2 - height):
            x = max(0, min(left, picture[0] - width))
            y = max(0, min(top, picture[1] - height))
            place = (x, y, x + width, y + height)
            hidden = sum(_shared(place, other) for other in taken)
            if hidden < least:
                best, least = place, hidden
    return best


def _shared(a: _Place, b: _Place) -> int:
    """Pixels that two rectangles have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def legible_on(colour: tuple[int, int, int]) -> str:
    """Black or white: the one in which text on this colour has more contrast, always above 4.5."""
    # At this lightness both have the same, by the formula of WCAG 2.
    return "black" if _lab(np.array([colour]))[0, 0] > 49.4 else "white"


def _enlarged(picture: Image.Image) -> tuple[Image.Image, int]:
    """A picture that is large enough for a legend, and how many times as large it is now."""
    scale = math.ceil(_SMALLEST / picture.width)
    scale = min(scale, 4 * _SMALLEST // max(picture.size))  # a strip would become a huge picture
    if scale <= 1:
        return picture, 1
    size = (scale * picture.width, scale * picture.height)
    return picture.resize(size, Image.Resampling.NEAREST), scale


def _with_legend(picture: Image.Image, entries: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """Puts a strip of coloured squares and names under a picture, in as many rows as it takes."""
    if not entries:
        return picture
    text = max(14, picture.width // 50)
    font = ImageFont.load_default(size=text)
    row, gap = round(1.7 * text), text // 2
    places, x, y = [], gap, 0
    for name, colour in entries:
        width = text + gap + math.ceil(font.getlength(name)) + 2 * gap
        if x + width > picture.width and x > gap:
            x, y = gap, y + row
        places.append((x, y, name, colour))
        x += width
    legend = Image.new("RGB", (picture.width, y + row + gap), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, colour in places:
        top = y + (row - text + gap) // 2
        fill = tuple(int(c) for c in colour)
        draw.rectangle((x, top, x + text, top + text), fill=fill, outline="black")
        draw.text((x + text + gap, top + text / 2), name, fill="black", font=font, anchor="lm")
    joined = Image.new("RGB", (picture.width, picture.height + legend.height))
    joined.paste(picture, (0, 0))
    joined.paste(legend, (0, picture.height))
    return joined


def _outline(labels: np.ndarray) -> np.ndarray:
    """Where a region's right or lower neighbour, or left or upper one, has another label."""
    edge = np.zeros(labels.shape, dtype=bool)
    across = labels[:, 1:] != labels[:, :-1]
    down = labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (0 to 255, [N, 3]) as CIELAB under D65."""
    c = rgb / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )
