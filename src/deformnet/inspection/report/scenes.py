"""Units to show: on the background, a small and a large object (Dai et al. 2017, Figure 6)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from deformnet.tasks.annotations import Contents, Thing
from deformnet.tasks.predictor import Prepared

SMALL, LARGE = 0.03, 0.1
"""Small objects cover a fraction of the image below the first, large ones above the second."""


@dataclass(frozen=True)
class Grid:
    """Centers of the units of a map in an image: (rows[i], columns[j]) for unit (i, j).

    In pixels of the image; whole numbers are centers of pixels.
    """

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def over(cls, prepared: Prepared, stride: int) -> "Grid":
        """Return the grid of a backbone whose unit (i, j) has its center at stride * (i, j)."""
        units = (torch.arange(0, side, stride, dtype=torch.float64) for side in prepared.size)
        rows, columns = units
        down = torch.stack([rows, torch.zeros_like(rows)], 1)
        across = torch.stack([torch.zeros_like(columns), columns], 1)
        return cls(prepared.to_image(down)[:, 0].numpy(), prepared.to_image(across)[:, 1].numpy())

    def places(self, units: np.ndarray) -> np.ndarray:
        """Return the centers [U, 2] of units [U, 2]."""
        return np.stack([self.rows[units[:, 0]], self.columns[units[:, 1]]], 1)

    def pixels(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and columns of the pixels at the centers of the units."""
        rows, columns = (
            places.round().astype(int).clip(0, side - 1)
            for places, side in zip((self.rows, self.columns), size, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Unit:
    """A unit of the top map.

    Attributes:
        kind: "background", "smallest object" or "largest object" of its image.
        name: class of the object, or "background".
        row, column: position in the map.
    """

    kind: str
    name: str
    row: int
    column: int

    @property
    def title(self) -> str:
        """The unit in words."""
        size = {"smallest object": "small ", "largest object": "large "}.get(self.kind, "")
        return f"{size}{self.name}"


@dataclass(frozen=True)
class Scene:
    """An image with units on the background, a small and a large object."""

    index: int
    units: tuple[Unit, ...]


def choose_scenes(
    images: Iterable[tuple[Contents, Grid]],
    count: int,
    *,
    small: float = SMALL,
    large: float = LARGE,
) -> list[Scene]:
    """Choose the first images with a small and a large object, then those with the largest ratio
    between the sizes of their objects.

    Args:
        images: images in order; no more of them are read than needed.
        count: maximum number of scenes; images without objects are not chosen.
        small, large: fractions of the image below and above which objects are small and large.
    """
    fitting: list[Scene] = []
    others: list[tuple[float, Scene]] = []
    for index, (contents, grid) in enumerate(images):
        objects = _seen(contents, grid)
        if not objects:
            continue
        scene = Scene(index, units_of(contents, grid))
        least, most = objects[0].area, objects[-1].area
        if least < small * contents.background.size and most > large * contents.background.size:
            fitting.append(scene)
        else:
            others.append((most / least, scene))
        if len(fitting) == count:
            break
    others.sort(key=lambda other: other[0], reverse=True)
    return [*fitting, *(scene for _, scene in others)][:count]


def units_of(contents: Contents, grid: Grid) -> tuple[Unit, ...]:
    """Return a unit on the background, and on the smallest and the largest object, if any.

    Objects without a unit inside count only if there are no others.
    """
    units = [Unit("background", "background", *_far_from_objects(contents, grid))]
    objects = _seen(contents, grid)
    if objects:
        for kind, thing in (("smallest object", objects[0]), ("largest object", objects[-1])):
            size = contents.background.shape
            units.append(Unit(kind, thing.name, *_in_middle_of(thing, grid, size)))
    return tuple(units)


def _seen(contents: Contents, grid: Grid) -> list[Thing]:
    """Return the objects with a unit inside, smallest first; all objects if none has one."""
    objects = sorted(contents.things, key=lambda thing: thing.area)
    pixels = grid.pixels(contents.background.shape)
    return [thing for thing in objects if thing.at(*pixels).any()] or objects


def _in_middle_of(thing: Thing, grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Return the unit nearest to the centroid of an object, among those inside if there are any."""
    seen = thing.at(*grid.pixels(size))
    units = np.argwhere(seen if seen.any() else ~seen)
    centroid = np.argwhere(thing.mask).mean(0) + thing.corner
    distance = np.linalg.norm(grid.places(units) - centroid, axis=1)
    row, column = units[distance.argmin()].tolist()
    return row, column


def _far_from_objects(contents: Contents, grid: Grid) -> tuple[int, int]:
    """Return the unit on the background farthest from all else, off the border if possible."""
    rows, columns = grid.pixels(contents.background.shape)
    free = contents.background[rows][:, columns]
    amid = np.zeros_like(free)
    inner = tuple(slice(max(1, side // 5), side - max(1, side // 5)) for side in free.shape)
    amid[inner] = free[inner]
    units = np.argwhere(amid if amid.any() else free if free.any() else ~free)
    edges = np.argwhere(_outline(~contents.background))
    if not len(edges):  # only background
        edges = np.array([[0, 0]])
    outline = torch.from_numpy(edges).float()
    distance = torch.cat(
        [
            torch.cdist(some, outline).amin(1)
            for some in torch.from_numpy(grid.places(units)).float().split(256)
        ]
    )
    row, column = units[int(distance.argmax())].tolist()
    return row, column


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask [H, W] with a neighbor outside of it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner
