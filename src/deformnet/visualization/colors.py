"""Colors that can be told apart, by the color-blind too."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import ImageColor

# The palette of Okabe and Ito, distinguishable with any color vision.
VERMILLION = "#d55e00"
BLUE = "#0072b2"
YELLOW = "#f0e442"
GREEN = "#009e73"
PURPLE = "#cc79a7"
SKY = "#56b4e9"
ORANGE = "#e69f00"
BLACK = "#000000"
WHITE = "#ffffff"

# Ordered so that neighbors differ most; black is the background's.
_DISTINCT = (VERMILLION, BLUE, YELLOW, GREEN, PURPLE, SKY, ORANGE)


def rgb(color: str) -> tuple[int, int, int]:
    """RGB values, 0 to 255, of a color such as "#d55e00"."""
    red, green, blue = ImageColor.getrgb(color)[:3]
    return red, green, blue


@functools.cache
def distinct_colors(count: int) -> np.ndarray:
    """Colors that are easy to tell apart, each the farthest from all before it in CIELAB.

    The first seven are those of Okabe and Ito. The others exclude grays and very dark or light
    colors, which would not stand out on a photograph.

    Returns:
        uint8 [count, 3], RGB; the first ones do not depend on the count.
    """
    levels = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    candidates = candidates.reshape(-1, 3)
    lab = _lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 35) & (lab[:, 0] < 90) & (chroma > 35)
    candidates, lab = candidates[usable], lab[usable]
    colors = [np.array(rgb(color), dtype=float) for color in _DISTINCT]
    distance = np.full(len(candidates), np.inf)
    for color in colors[:-1]:
        distance = np.minimum(distance, np.linalg.norm(lab - _lab(color[None]), axis=1))
    while len(colors) < count:
        distance = np.minimum(distance, np.linalg.norm(lab - _lab(colors[-1][None]), axis=1))
        colors.append(candidates[distance.argmax()])
    return np.array(colors[:count], dtype=np.uint8)


def palette(classes: Sequence[str]) -> np.ndarray:
    """Color of each class, uint8 [len(classes), 3], RGB; `background`, if first, is black."""
    if classes[0] == "background":
        black = np.zeros((1, 3), dtype=np.uint8)
        return np.concatenate([black, distinct_colors(len(classes) - 1)])
    return distinct_colors(len(classes))


def legible_on(color: tuple[int, int, int]) -> str:
    """Black or white, whichever contrasts more as text on this color (always above 4.5)."""
    # At this lightness both contrast equally, by the formula of WCAG 2.
    return "black" if _lab(np.array([color]))[0, 0] > 49.4 else "white"


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
