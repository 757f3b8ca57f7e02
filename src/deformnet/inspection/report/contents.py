"""What is where in an annotated image: its objects and its background."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations
from deformnet.metrics.segmentation import connected_regions, region_boxes

# Names of classes that are no single things: of Cityscapes its groups flat, construction, nature,
# sky and void; and what CamVid and VOC call the same.
_STUFF = frozenset(
    (
        *("background", "void", "unlabelled", "unlabeled", "ground", "static", "dynamic"),
        *("road", "sidewalk", "pavement", "parking", "rail track", "terrain"),
        *("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
        *("vegetation", "tree", "grass", "sky"),
    )
)


class Thing(NamedTuple):
    """An object.

    Attributes:
        name: of its class.
        box: x1, y1, x2, y2, edges in pixels of the image.
        mask: bool [h, w], the pixels that are its own, of those that the box touches.
        corner: the first of these pixels, (y, x).
    """

    name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray
    corner: tuple[int, int]

    @property
    def area(self) -> int:
        """In pixels of the image."""
        return int(np.count_nonzero(self.mask))

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether it is at the pixels that such rows and columns cross at: bool [rows, columns]."""
        height, width = self.mask.shape
        y, x = rows - self.corner[0], columns - self.corner[1]
        within = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
        return within & self.mask[y.clip(0, height - 1)][:, x.clip(0, width - 1)]


@dataclass(frozen=True)
class Contents:
    """What is where in an image of H x W pixels.

    Attributes:
        things: its objects.
        background: bool [H, W], what is neither an object nor void.
    """

    things: Sequence[Thing]
    background: np.ndarray

    def boxes(self) -> Tensor:
        """The boxes of the objects, [M, 4]."""
        return torch.tensor([thing.box for thing in self.things]).reshape(-1, 4)


def object_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Those classes of label maps that name single things, which have a size; not sky or road."""
    return tuple(name for name in classes if name.lower() not in _STUFF)


def of_label_map(labels: Tensor, classes: Sequence[str], objects: Collection[str]) -> Contents:
    """The contents by a label map: an object is a connected region of one class.

    Args:
        labels: [H, W].
        classes: names of the labels.
        objects: names of those classes whose regions are objects; all others are background.
    """
    truth = labels.cpu().numpy()
    regions = connected_regions(truth)
    things = []
    background = truth != IGNORE
    for region, (rows, columns) in enumerate(region_boxes(regions)):
        mask = regions[rows, columns] == region
        label = int(truth[rows, columns][mask][0])
        if label == IGNORE or classes[label] not in objects:
            continue
        background[rows, columns] &= ~mask
        box = (columns.start, rows.start, columns.stop, rows.stop)
        things.append(Thing(classes[label], box, mask, (rows.start, columns.start)))
    return Contents(things, background)


def of_boxes(
    annotations: BoxAnnotations, classes: Sequence[str], size: tuple[int, int]
) -> Contents:
    """The contents of an image of (height, width) by its boxes, which are all their objects'."""
    things = []
    background = np.ones(size, dtype=bool)
    boxes = annotations.boxes.as_subclass(Tensor)
    for box, label in zip(boxes.tolist(), annotations.labels.tolist(), strict=True):
        x1, y1 = (int(edge) for edge in box[:2])
        x2, y2 = (int(np.ceil(edge)) for edge in box[2:])
        background[y1:y2, x1:x2] = False
        mask = np.ones((y2 - y1, x2 - x1), dtype=bool)
        things.append(Thing(classes[int(label)], tuple(box), mask, (y1, x1)))
    return Contents(things, background)
