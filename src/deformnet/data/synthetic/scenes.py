"""Drawing of a scene of the synthetic data set: pixels, class of every pixel, objects.

Everything is drawn into arrays of the image's size. A shape is a function d(x, y) on the plane,
negative inside, in units of its radius; it is evaluated at the pixel centers, mapped back through
rotation, shear and warp. d < 0 gives the exact mask, and d / |grad d|, the distance to the outline
in pixels to first order, the antialiased coverage.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from deformnet._errors import UserError, require_at_least, require_at_most
from deformnet.data.base import IGNORE

Array = np.ndarray
Outline = Callable[[Array, Array], Array]


# Shapes. The farthest point of each is at a distance of about 1 from the origin.


def _star(x: Array, y: Array) -> Array:
    # Fold the plane onto half a point; its edge runs from the tip (1, 0) to the dent.
    half = math.pi / 5
    angle = abs((np.arctan2(y, x) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    dent_u, dent_v = 0.45 * math.cos(half), 0.45 * math.sin(half)
    length = math.hypot(1 - dent_u, dent_v)
    return ((u - 1) * dent_v + v * (1 - dent_u)) / length


def _trefoil(x: Array, y: Array) -> Array:
    radius = np.hypot(x, y)
    return radius - 0.64 - 0.36 * _from(0.25, radius) * np.cos(3 * np.arctan2(y, x))


def _gear(x: Array, y: Array) -> Array:
    radius = np.hypot(x, y)
    teeth = np.tanh(3 * np.cos(8 * np.arctan2(y, x)))
    return radius - 0.87 - 0.13 * _from(0.7, radius) * teeth


def _from(start: float, radius: Array) -> Array:
    """1 from `start` on, falling to 0 at the center, where the angle changes too fast.

    Without it |grad d| is unbounded there and the estimated distance vanishes: a dot in the middle
    would give the class away.
    """
    return np.minimum(radius / start, 1) ** 3


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.minimum(np.maximum(x, 4 * y), np.maximum(4 * x, y)) - 0.97


OBJECTS: dict[str, Outline] = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - math.sqrt(0.5),
    "star": _star,
    "trefoil": _trefoil,
    "ellipse": lambda x, y: np.hypot(x, 3.5 * y) - 1,
    "gear": _gear,
}
"""Outlines of the classes. Label 1 is the first; 0 is the background."""

_CLUTTER: dict[str, Outline] = {
    "bar": lambda x, y: np.maximum(abs(x), 9 * abs(y)) - 0.99,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.84) - 0.16,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.9 - np.hypot(x - 0.45, y)),
    "cross": _cross,
    "triangle": lambda x, y: np.maximum(-x, abs(y) * math.sqrt(0.75) + x / 2) - 0.5,
}

# The linear map of an object is rotation, shear, rotation. A disc sheared by 0.4 is an ellipse of
# ratio 1.5, an ellipse of ratio 3.5 keeps at least 2.3: the classes remain distinct.
_SHEAR = 0.4
# Waves of a warp, their wave numbers per radius, and the bound on the sum of amplitude * wave
# number at warp 1. Below 1 the warp is one-to-one: shapes bend but do not fold.
_WAVES = 3
_WAVE_NUMBER = (1.8, 3.2)
_STEEPNESS = 0.75

_SHADOW = 0.06  # softness, in radii
_TRIES = 20
_MIN_INSIDE = 0.7  # smallest fraction of an object's area inside the image
_MIN_VISIBLE = 0.6  # smallest fraction of an object's visible area that a later one may leave
_MUTED = np.float32(0.25)  # gray (0 to 1) into which `mute` blends everything behind the objects
_MIN_CONTRAST = 0.22  # distance of the mean RGB colors (0 to 1) of a shape and of its background


@dataclass(frozen=True)
class Shapes:
    """Options of a synthetic data set."""

    train: int = 2500
    """Number of images in the training split."""
    val: int = 300
    """Number of images in the validation split."""
    height: int = 160
    """Image height, in pixels."""
    width: int = 160
    """Image width, in pixels."""
    warp: float = 0.5
    """Strength of the smooth non-rigid deformation, 0 (none) to 1."""
    seed: int = 0
    """Random seed; the same options give the same bytes (with the same versions of NumPy and Pillow
    on the same kind of processor)."""
    objects: tuple[int, int] = (1, 3)
    """Minimum and maximum number of objects in an image."""
    radius: tuple[float, float] = (0.055, 0.45)
    """Minimum and maximum distance from an object's center to its farthest point before
    deformation, as a fraction of the shorter side; drawn log-uniformly."""
    clutter: int = 3
    """Maximum number of unlabeled shapes behind the objects."""
    mute: float = 0.0
    """Fraction by which background and clutter are blended into dark gray: 0 leaves them as vivid
    as the objects, 1 makes them uniform."""
    void_border: int = 0
    """Width of the void border (label 255) along outlines, in pixels, as in VOC; 0 gives exact
    masks."""
    layout: Literal["voc", "image-folder"] = "voc"
    """VOC layout with label maps and boxes, or an image folder for classification: images of one
    object each (whatever `objects` says), in one folder per class."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "train", "val")
        require_at_least(self, 16, "height", "width")
        require_at_most(self, 1e7, "train", "val")
        require_at_most(self, 2**12, "height", "width", "clutter", "void_border")
        require_at_most(self, 2**63 - 1, "seed")
        require_at_least(self, 0, "seed", "clutter", "void_border")
        for name in ("warp", "mute"):
            require(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        fewest, most = self.objects
        require(1 <= fewest <= most <= 254, "objects", "1 <= fewest <= most <= 254", self.objects)
        smallest, largest = self.radius
        in_order = 0 < smallest <= largest <= 0.5
        require(in_order, "radius", "0 < smallest <= largest <= 0.5", self.radius)
        if self.layout == "image-folder":
            expected = f"at least {len(OBJECTS)} in an image folder, one per class"
            require(self.train >= len(OBJECTS), "train", expected, self.train)
        else:
            require(self.layout == "voc", "layout", "voc or image-folder", self.layout)


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Checks an option."""
    if not holds:
        raise UserError(f"expected {name} to be {expected}, but got {value}")


@dataclass(frozen=True)
class SceneObject:
    """A visible object of a scene.

    Attributes:
        label: class, from 1.
        area: number of visible pixels.
        full_area: number of pixels without the border of the image and the objects in front.
        box: (x1, y1, x2, y2) of the visible pixels: columns x1 to x2 - 1, rows y1 to y2 - 1.
    """

    label: int
    area: int
    full_area: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image with its ground truth.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        labels: uint8 [H, W], class of each pixel; 255 on void borders.
        instances: uint8 [H, W], 1 + index into `objects`; 0 is the background, 255 void.
        objects: visible objects, from back to front.
    """

    image: Array
    labels: Array
    instances: Array
    objects: tuple[SceneObject, ...]


def draw_scene(rng: Generator, options: Shapes, *, label: int | None = None) -> Scene:
    """Draws a scene; the same generator state gives the same scene.

    Args:
        label: class, from 1, of an image of one object; None draws one for each object.
    """
    height, width, radius = options.height, options.width, options.radius
    side = min(height, width)
    canvas = _background(rng, height, width)
    for _ in range(rng.integers(options.clutter, endpoint=True)):
        size = side * _log_uniform(rng, radius[0], max(radius[0], radius[1] / 2))
        outline = list(_CLUTTER.values())[rng.integers(len(_CLUTTER))]
        shape = _Shape(rng, outline, size, options.warp)
        place = shape.place(rng.uniform(0, width), rng.uniform(0, height), height, width)
        if place is not None:
            _paint(rng, canvas, place)
    canvas += options.mute * (_MUTED - canvas)

    instances = np.zeros((height, width), dtype=np.uint8)
    drawn: list[tuple[int, int]] = []  # label and full area
    # Large ones first: objects in front are smaller than those that they hide.
    fewest, most = options.objects if label is None else (1, 1)
    count = rng.integers(fewest, most, endpoint=True)
    for size in sorted((side * _log_uniform(rng, *radius) for _ in range(count)), reverse=True):
        number = int(rng.integers(len(OBJECTS))) + 1 if label is None else label
        shape = _Shape(rng, list(OBJECTS.values())[number - 1], size, options.warp)
        place = _find_place(rng, shape, instances)
        if place is None:
            continue
        _paint(rng, canvas, place)
        drawn.append((number, place.full_area))
        view = instances[place.window]
        view[place.distance < 0] = len(drawn)
        view[abs(place.distance) < options.void_border / 2] = IGNORE

    light = 1 + 0.2 * _noise(rng, height, width, side / rng.uniform(1, 2))
    canvas *= light[..., None]
    canvas += rng.normal(0, rng.uniform(0.01, 0.04), canvas.shape).astype(np.float32)
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return _finish(image, instances, drawn)


def _finish(image: Array, instances: Array, drawn: list[tuple[int, int]]) -> Scene:
    """Numbers the visible objects consecutively and measures them."""
    labels = np.where(instances == IGNORE, IGNORE, 0).astype(np.uint8)
    numbered = labels.copy()
    shown = []
    for number, (label, full_area) in enumerate(drawn, start=1):
        mask = instances == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size == 0:
            continue
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        shown.append(SceneObject(label, int(np.count_nonzero(mask)), full_area, box))
        labels[mask] = label
        numbered[mask] = len(shown)
    return Scene(image, labels, numbered, tuple(shown))


@dataclass(frozen=True)
class _Place:
    """A shape at a place, cropped to the image.

    Attributes:
        window: rows and columns in the image.
        distance: [h, w] of the window, signed distance to the outline in pixels, negative inside.
        radius: of the shape, in pixels.
        full_area: number of pixels of the whole shape, also outside the image.
    """

    window: tuple[slice, slice]
    distance: Array
    radius: float
    full_area: int


class _Shape:
    """An outline under a random rotation, shear and warp."""

    def __init__(self, rng: Generator, outline: Outline, radius: float, warp: float) -> None:
        self.radius = radius
        self._outline = outline
        shear = np.array([[1, rng.uniform(-_SHEAR, _SHEAR)], [0, 1]])
        linear = _rotation(rng) @ shear @ _rotation(rng)
        self._inverse = np.linalg.inv(linear)
        number = rng.uniform(*_WAVE_NUMBER, size=_WAVES)
        self._waves = number[:, None] * _directions(rng, _WAVES)
        self._shifts = (warp * _STEEPNESS / _WAVES / number)[:, None] * _directions(rng, _WAVES)
        self._phases = rng.uniform(0, 2 * np.pi, size=_WAVES)
        farthest = 1 + warp * _STEEPNESS / _WAVES * (1 / number).sum()
        self._reach = radius * np.linalg.norm(linear, 2) * farthest

    def place(self, x: float, y: float, height: int, width: int) -> _Place | None:
        """The shape with its origin at (x, y); None if it is outside the image."""
        # Two more pixels for the antialiasing, and the width of the shadow.
        reach = self._reach + 2 + 3 * _SHADOW * self.radius
        columns = np.arange(math.floor(x - reach), math.ceil(x + reach) + 1)
        rows = np.arange(math.floor(y - reach), math.ceil(y + reach) + 1)
        keep_columns, keep_rows = (columns >= 0) & (columns < width), (rows >= 0) & (rows < height)
        if not keep_columns.any() or not keep_rows.any():
            return None

        u = ((columns - x) / self.radius).astype(np.float32)[None, :]
        v = ((rows - y) / self.radius).astype(np.float32)[:, None]
        (a, b), (c, d) = self._inverse.astype(np.float32)
        u, v = a * u + b * v, c * u + d * v
        wave_u, wave_v = np.zeros_like(u), np.zeros_like(v)
        for wave, shift, phase in zip(self._waves, self._shifts, self._phases, strict=True):
            swell = np.sin(np.float32(wave[0]) * u + np.float32(wave[1]) * v + np.float32(phase))
            wave_u += np.float32(shift[0]) * swell
            wave_v += np.float32(shift[1]) * swell
        value = self._outline(u + wave_u, v + wave_v)
        slope = np.hypot(*np.gradient(value))
        distance = (value / np.maximum(slope, 1e-6)).astype(np.float32)
        full_area = int(np.count_nonzero(distance < 0))
        window = _span(rows[keep_rows]), _span(columns[keep_columns])
        inside = distance[np.ix_(keep_rows, keep_columns)]
        return _Place(window, inside, self.radius, full_area)


def _find_place(rng: Generator, shape: _Shape, instances: Array) -> _Place | None:
    """A random place where enough of the shape, and of the objects behind it, is visible."""
    height, width = instances.shape
    before = np.bincount(instances.ravel(), minlength=256)
    margin = shape.radius / 2
    for _ in range(_TRIES):
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        place = shape.place(x, y, height, width)
        if place is None:
            continue
        inside = place.distance < 0
        if np.count_nonzero(inside) < max(1, _MIN_INSIDE * place.full_area):
            continue
        hidden = np.bincount(instances[place.window][inside], minlength=256)
        if (hidden[1:IGNORE] <= (1 - _MIN_VISIBLE) * before[1:IGNORE]).all():
            return place
    return None


def _paint(rng: Generator, canvas: Array, place: _Place) -> None:
    """Fills the shape with a texture that contrasts with its background."""
    view = canvas[place.window]
    inside = place.distance < 0
    if not inside.any():
        return
    behind = view[inside].mean(0)
    texture = _texture(rng, *inside.shape)
    for _ in range(_TRIES):
        if np.linalg.norm(texture[inside].mean(0) - behind) > _MIN_CONTRAST:
            break
        texture = _texture(rng, *inside.shape)
    coverage = (0.5 - place.distance).clip(0, 1)
    # A soft shadow around it. Nothing is shaded inside: no pixel far from the outline gives the
    # class away.
    blur = ImageFilter.GaussianBlur(_SHADOW * place.radius)
    shadow = np.asarray(Image.fromarray((255 * coverage).astype(np.uint8)).filter(blur))
    view *= 1 - 0.5 * shadow[..., None].astype(np.float32) / 255
    view += coverage[..., None] * (texture - view)


def _background(rng: Generator, height: int, width: int) -> Array:
    """One texture, or two with a soft border of arbitrary form between them."""
    canvas = _texture(rng, height, width)
    if rng.random() < 0.5:
        border = _noise(rng, height, width, min(height, width) / rng.uniform(1, 4))
        fraction = 1 / (1 + np.exp(-20 * border[..., None]))
        canvas += fraction * (_texture(rng, height, width) - canvas)
    return canvas


def _texture(rng: Generator, height: int, width: int) -> Array:
    """A surface: two colors mixed by clouds, stripes or spots; float32 [height, width, 3].

    For background, clutter and objects alike: no class has a color or pattern of its own.
    """
    hue = rng.uniform(-0.5, 0.5, 3)
    color = (rng.uniform(0.2, 0.8) + rng.uniform(0.3, 1) * (hue - hue.mean())).clip(0, 1)
    other = (color + rng.normal(0, 0.1, 3) + rng.normal(0, 0.15)).clip(0, 1)
    scale = _log_uniform(rng, 10, 60)
    clouds = _noise(rng, height, width, scale) + 0.5 * _noise(rng, height, width, scale / 3)
    kind = rng.integers(3)
    if kind == 0:
        mix = clouds
    elif kind == 1:
        period, angle, phase = _log_uniform(rng, 5, 20), *rng.uniform(0, 2 * np.pi, 2)
        across = np.arange(width) * math.cos(angle) + np.arange(height)[:, None] * math.sin(angle)
        mix = np.sin(2 * np.pi / period * across.astype(np.float32) + phase + 1.5 * clouds)
    else:
        mix = 4 * _noise(rng, height, width, _log_uniform(rng, 4, 10)) + clouds
    mix = 1 / (1 + np.exp(-2 * mix))
    tint = 0.06 * _noise(rng, height, width, scale)[..., None] * rng.normal(0, 1, 3)
    surface = color + mix[..., None] * (other - color) + tint
    return surface.astype(np.float32)


def _noise(rng: Generator, height: int, width: int, scale: float) -> Array:
    """Smooth, roughly normal noise, float32 [height, width]; `scale`: pixels between its knots."""
    rows, columns = math.ceil(height / scale) + 3, math.ceil(width / scale) + 3
    knots = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    left, top = rng.uniform(1, 2, 2)
    box = (left, top, left + width / scale, top + height / scale)
    return np.asarray(knots.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _span(places: Array) -> slice:
    """Slice of consecutive positions."""
    return slice(int(places[0]), int(places[-1]) + 1)


def _rotation(rng: Generator) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _directions(rng: Generator, count: int) -> Array:
    angles = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
