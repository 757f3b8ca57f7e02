"""What the detection sets share once their files are found."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet.data.files import read_image

_log = logging.getLogger(__name__)


class BoxAnnotations(NamedTuple):
    """The objects of an image; there may be none."""

    boxes: Tensor
    """float32 [n, 4]: x1, y1, x2, y2 in pixels, edges: the first pixel is [0, 0, 1, 1]. A
    `tv_tensors.BoundingBoxes` until transforms have made it plain."""
    labels: Tensor
    """int64 [n], 0 to C - 1: places in the set's `classes`."""
    ignored: Tensor
    """bool [n]: neither trained on nor counted (VOC: difficult, COCO: a crowd)."""


class Photo(NamedTuple):
    """One image on disk."""

    name: str
    file: str
    """Path from the folder of the images."""
    size: tuple[int, int]
    """Height and width."""


class Objects(NamedTuple):
    """The objects of a whole set, in any order."""

    photos: list[int]
    """Which image each is in."""
    boxes: list[tuple[float, float, float, float]]
    """As those of `BoxAnnotations`, and as the files have them: outside the image, empty, NaN."""
    labels: list[int]
    ignored: list[bool]

    def extend(self, other: "Objects", offset: int) -> None:
        """Adds the objects of images that come `offset` places later than they say."""
        self.photos.extend(photo + offset for photo in other.photos)
        self.boxes.extend(other.boxes)
        self.labels.extend(other.labels)
        self.ignored.extend(other.ignored)


class DetectionDataset(VisionDataset):
    """Images with boxes. Abstract: a subclass reads the files that list them.

    All annotations are read at construction, where it is also checked that every image is there.
    They are kept in a few flat tensors and not as an object each: a worker of a `DataLoader` that
    is forked would copy every page with Python objects on it when it counts references to them
    (COCO: 118,000 images, 860,000 boxes, once per worker), and one that is spawned shares tensors.

    Boxes are clipped to their image. What has no area then is left out and counted, and a warning
    says so once.

    Attributes:
        classes: names of the classes of objects, without a background.
        dropped: boxes that were left out.
        has_ground_truth: False if nobody but a server knows the objects: there are none here, and nothing
            to train on or to score with.
        transforms: called with (image, annotations); None for no change.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        photos: Sequence[Photo],
        objects: Objects,
        classes: tuple[str, ...],
        transforms: Callable | None,
        *,
        has_ground_truth: bool = True,
    ) -> None:
        """
        Args:
            root: the folder that the user gave, for `repr`.
            folder: where the paths of the images begin.
            photos: the images; their names must be unique.
        """
        super().__init__(root, transforms=transforms)
        self.folder = folder
        self.classes = classes
        self.has_ground_truth = has_ground_truth
        self._names = _Texts(photo.name for photo in photos)
        self._files = _Texts(photo.file for photo in photos)
        self._sizes = torch.tensor([photo.size for photo in photos], dtype=torch.int64)

        owners = torch.tensor(objects.photos, dtype=torch.int64)
        edges = torch.tensor(objects.boxes, dtype=torch.float64).reshape(-1, 4)
        height, width = self._sizes[owners].unbind(1)
        bounds = torch.stack([width, height, width, height], dim=1)
        boxes = edges.clamp(min=0).minimum(bounds).float()
        kept = edges.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        kept_owners, order = owners[kept].sort(stable=True)
        self._boxes = boxes[kept][order]
        self._labels = torch.tensor(objects.labels, dtype=torch.int64)[kept][order]
        self._ignored = torch.tensor(objects.ignored, dtype=torch.bool)[kept][order]
        counts = torch.bincount(kept_owners, minlength=len(photos))
        self._ends = counts.cumsum(0)

        self.dropped = int((~kept).sum())
        if self.dropped:
            first = photos[int(owners[~kept][0])].name
            _log.warning(
                "%s: %d of %d boxes have no area inside their image and are left out, "
                "the first one in %s",
                root,
                self.dropped,
                len(kept),
                first,
            )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The image's id in the set: good as a file name."""
        return self._names[index]

    def image_path(self, index: int) -> Path:
        """Where the image is."""
        return self.folder / self._files[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image, without reading it."""
        height, width = self._sizes[index].tolist()
        return height, width

    def annotations(self, index: int) -> BoxAnnotations:
        """The objects of the image, without reading it."""
        span = _span(self._ends, index)
        boxes = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue] (it has a __new__)
            self._boxes[span].clone(),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=self.size(index),
        )
        return BoxAnnotations(boxes, self._labels[span].clone(), self._ignored[span].clone())

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, BoxAnnotations]:
        """
        Returns:
            image uint8 [3, H, W] and its objects, or what `transforms` makes of them.
        Raises:
            ValueError: one line that names the file, for an image that is unreadable or of another
                size than the annotations say.
        """
        image, size = read_image(self.image_path(index)), self.size(index)
        if image.shape[1:] != size:
            raise ValueError(
                f"{self.image_path(index)}: {image.shape[2]}x{image.shape[1]} image, but its "
                f"annotations are for {size[1]}x{size[0]}"
            )
        pair = tv_tensors.Image(image), self.annotations(index)
        return pair if self.transforms is None else self.transforms(*pair)


class _Texts:
    """A list of texts in two tensors."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))
        self._ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[_span(self._ends, index)].numpy().tobytes())


def _span(ends: Tensor, index: int) -> slice:
    """Where the entries of `index`, which may count from the end, are among those of all."""
    index = range(len(ends))[index]
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
