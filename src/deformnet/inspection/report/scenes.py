"""Which units to look at, and what they sample (Dai et al. 2017, Figure 6)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deformnet.analysis import SamplingLocations, SamplingStack
from deformnet.inference import Prepared
from deformnet.inspection.report.contents import Contents, Thing
from deformnet.visualization import SampledUnit

SMALL, LARGE = 0.03, 0.1
"""Small objects cover less than the first share of the image, large ones more than the second."""


@dataclass(frozen=True)
class Grid:
    """Where the units of a map lie in an image: (y, x) of unit (i, j) is (rows[i], columns[j]).

    In pixels of the image, whole at their centres.
    """

    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def over(cls, prepared: Prepared, stride: int) -> "Grid":
        """The grid of a backbone whose unit (i, j) is centred on pixel (stride*i, stride*j)."""
        units = (torch.arange(0, side, stride, dtype=torch.float64) for side in prepared.size)
        rows, columns = units
        down = torch.stack([rows, torch.zeros_like(rows)], 1)
        across = torch.stack([torch.zeros_like(columns), columns], 1)
        return cls(prepared.to_image(down)[:, 0].numpy(), prepared.to_image(across)[:, 1].numpy())

    def places(self, units: np.ndarray) -> np.ndarray:
        """Where units [U, 2] lie, [U, 2]."""
        return np.stack([self.rows[units[:, 0]], self.columns[units[:, 1]]], 1)

    def pixels(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows and columns of an image's pixels that the units are centred on."""
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
        name: of the object's class; "background" if it is none.
        row, column: its place in the map.
    """

    kind: str
    name: str
    row: int
    column: int

    @property
    def what(self) -> str:
        """What is there, in words."""
        size = {"smallest object": "small ", "largest object": "large "}.get(self.kind, "")
        return f"{size}{self.name}"


@dataclass(frozen=True)
class Scene:
    """An image with the units to look at: on the background, a small and a large object."""

    index: int
    units: tuple[Unit, ...]


def choose_scenes(
    images: Iterable[tuple[Contents, Grid]],
    count: int,
    *,
    small: float = SMALL,
    large: float = LARGE,
) -> list[Scene]:
    """The first images that show a small and a large object; if these are too few, others.

    The others are those with objects whose sizes are farthest apart.

    Args:
        images: in their order; no more of them are taken than needed.
        count: how many scenes; fewer are returned if fewer images show an object.
        small: objects that cover a smaller share of the image are small.
        large: objects that cover a larger share are large.
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
    """A unit on the background, and on the smallest and the largest object if there are any.

    Objects that hold no unit count only if all are such.
    """
    units = [Unit("background", "background", *_far_from_objects(contents, grid))]
    objects = _seen(contents, grid)
    if objects:
        for kind, thing in (("smallest object", objects[0]), ("largest object", objects[-1])):
            size = contents.background.shape
            units.append(Unit(kind, thing.name, *_in_middle_of(thing, grid, size)))
    return tuple(units)


def look(
    image: Tensor,
    prepared: Prepared,
    stack: SamplingStack,
    unit: Unit,
    *,
    what: str | None = None,
    at_rest: bool = False,
) -> SampledUnit:
    """What a unit samples in the map below it, in the next one, and so on down the stack.

    Args:
        image: uint8 [3, H, W].
        prepared: the image as the network saw it.
        stack: what the network did.
        what: what is there; None takes the unit's own words.
        at_rest: as in `SamplingStack.locations`.
    """
    place = (unit.row, unit.column)
    levels = []
    for depth in range(1, len(stack.names) + 1):
        points, inside = stack.locations(place, depth=depth, at_rest=at_rest)
        levels.append(SamplingLocations(prepared.to_image(points[0]).cpu(), inside[0].cpu()))
    y, x = prepared.to_image(torch.tensor(stack.centre(place), dtype=torch.float64)).tolist()
    return SampledUnit(image, what or unit.what, (y, x), levels)


def _seen(contents: Contents, grid: Grid) -> list[Thing]:
    """The objects that hold a unit, the smallest first; all if none does."""
    objects = sorted(contents.things, key=lambda thing: thing.area)
    pixels = grid.pixels(contents.background.shape)
    return [thing for thing in objects if thing.at(*pixels).any()] or objects


def _in_middle_of(thing: Thing, grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """The unit on an object that is nearest to its centroid; the nearest at all if none is."""
    seen = thing.at(*grid.pixels(size))
    units = np.argwhere(seen if seen.any() else ~seen)
    centroid = np.argwhere(thing.mask).mean(0) + thing.corner
    distance = np.linalg.norm(grid.places(units) - centroid, axis=1)
    row, column = units[distance.argmin()].tolist()
    return row, column


def _far_from_objects(contents: Contents, grid: Grid) -> tuple[int, int]:
    """The background's unit farthest from all else; not near the border, if it can be."""
    rows, columns = grid.pixels(contents.background.shape)
    free = contents.background[rows][:, columns]
    amid = np.zeros_like(free)
    inner = tuple(slice(max(1, side // 5), side - max(1, side // 5)) for side in free.shape)
    amid[inner] = free[inner]
    units = np.argwhere(amid if amid.any() else free if free.any() else ~free)
    edges = np.argwhere(_outline(~contents.background))
    if not len(edges):  # nothing but background
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
    """The pixels of a mask [H, W] with a neighbour that is not in it: the nearest from outside."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner
