"""Label maps as pictures: colours that can be told apart, overlays, legends."""

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
def distinct_colours(count: int) -> np.ndarray:
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
        return np.concatenate([black, distinct_colours(len(classes) - 1)])
    return distinct_colours(len(classes))


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
        classes: names of the labels; `background`, if first, is not tinted.
    """
    colours = palette(classes)
    truth = labels.numpy()
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    opacity = np.full(truth.shape, _OPACITY, dtype=np.float32)
    opacity[_outline(truth)] = 1.0
    if classes[0] == "background":
        opacity[truth == 0] = 0.0
    tinted = pixels + opacity[..., None] * (colours[truth] - pixels)
    picture = Image.fromarray(tinted.round().astype(np.uint8))
    if picture.width < _SMALLEST:
        scale = math.ceil(_SMALLEST / picture.width)
        size = (scale * picture.width, scale * picture.height)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    shown = [k for k in np.unique(truth) if classes[k] != "background"]
    return _with_legend(picture, [(str(classes[k]), colours[k]) for k in shown])


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
