"""What is in an image, predicted or known: drawn, listed and located alike for every task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deformnet._errors import UserError


class Thing(NamedTuple):
    """An object.

    Attributes:
        name: class name.
        box: x1, y1, x2, y2, edges in pixels of the image.
        mask: bool [h, w], pixels of the object among those that the box touches.
        corner: first of these pixels, (y, x).
    """

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    corner: tuple[int, int]

    @property
    def area(self) -> int:
        """Pixels of the image that it covers."""
        return int(np.count_nonzero(self.mask))

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether it covers the pixels where rows and columns cross: bool [rows, columns]."""
        height, width = self.mask.shape
        y, x = rows - self.corner[0], columns - self.corner[1]
        within = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
        return within & self.mask[y.clip(0, height - 1)][:, x.clip(0, width - 1)]


@dataclass(frozen=True)
class Contents:
    """Objects and background of an image of H x W pixels.

    Attributes:
        things: objects.
        background: bool [H, W], pixels of neither an object nor void.
    """

    things: Sequence[Thing]
    background: np.ndarray

    def boxes(self) -> Tensor:
        """The boxes of the objects, [M, 4]."""
        return torch.tensor([thing.box for thing in self.things]).reshape(-1, 4)


class Annotation(ABC):
    """Annotation of an image: a prediction, or ground truth.

    Attributes:
        boxes: float32 [D, 4] in pixels of the image; D is 0 if the task has no boxes.
        names: class names of the boxes, D.
        scores: [D] of predicted boxes, best first; None for ground truth.
        label: class of the whole image, if there is one.
        image: uint8 [3, H, W], the input image; None for ground truth.
    """

    boxes: Tensor = torch.zeros(0, 4)
    names: Sequence[str] = ()
    scores: Tensor | None = None
    label: str | None = None
    image: Tensor | None = None

    def plot(self, *, threshold: float = 0.5) -> Image.Image:
        """Draws the prediction on its image.

        Args:
            threshold: minimum score of the boxes to draw.
        Raises:
            ValueError: for ground truth, which has no image.
        """
        if self.image is None:
            raise ValueError("expected a prediction, which keeps its image, but got ground truth")
        return self.best(least_score=threshold)._plot(self.image)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The annotation as plain Python values, with class names."""

    @abstractmethod
    def _plot(self, image: Tensor) -> Image.Image:
        """Draws the annotation on the image; returns uint8 [3, H, W]."""

    @abstractmethod
    def draw(self, image: Tensor) -> Image.Image | None:
        """A picture of it over the image, uint8 [3, H, W] of any size; None if there is none."""

    def best(self, count: int | None = None, least_score: float = 0.0) -> Self:
        """The best predicted boxes alone: at most `count`, with at least `least_score`."""
        return self

    def captions(self) -> list[str]:
        """Class and score of each box."""
        if self.scores is None:
            return list(self.names)
        pairs = zip(self.names, self.scores.tolist(), strict=True)
        return [f"{name} {score:.2f}" for name, score in pairs]

    def ranking(self, count: int) -> list[tuple[str, float]]:
        """Most probable classes of the whole image; empty unless a classifier predicted it."""
        return []

    @abstractmethod
    def contents(self, objects: Collection[str]) -> Contents:
        """Objects of the classes with these names, all else as background; for ground truth."""


class Images(Protocol):
    """A data set whose images have names, and `classes` the names of its labels."""

    classes: tuple[str, ...]

    @property
    def root(self) -> str | Path:
        """Folder or name of the images, for messages."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in the set."""
        ...


def names_of(images: Images) -> list[str]:
    """The names of all images of a data set, in its order."""
    return [images.name(index) for index in range(len(images))]


@contextmanager
def about(images: Images, index: int) -> Iterator[None]:
    """Adds the name of an image to errors that occur while it is processed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{images.root}: image {images.name(index)}: {error}") from error


class AnnotatedImages:
    """Images with ground truth to look at.

    Args:
        images: the data set.
        load: reads the image of an index, uint8 [3, H, W], and its annotation.
        countable: names of the classes of single objects ("car"), not of stuff ("sky").
        objects_are: rule by which objects are found, a sentence to format with `classes`.
    """

    def __init__(
        self,
        images: Images,
        load: Callable[[int], tuple[Tensor, Annotation]],
        countable: tuple[str, ...] = (),
        objects_are: str = "",
    ) -> None:
        self.classes, self.names = images.classes, names_of(images)
        self.countable, self.objects_are = countable, objects_are
        self._load = load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Annotation]:
        return self._load(index)
