"""Base class of the detection data sets."""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet._errors import UserError
from deformnet.data.files import Orientation, log_once, read_image, size_error
from deformnet.data.flat import StringList, span
from deformnet.data.items import FAR


class BoxAnnotations(NamedTuple):
    """Objects of an image, possibly none."""

    boxes: Tensor
    """float32 [n, 4]: x1, y1, x2, y2 in pixels, measured at edges: the first pixel is
    [0, 0, 1, 1]. A `tv_tensors.BoundingBoxes` until transforms return plain tensors."""
    labels: Tensor
    """int64 [n], 0 to C - 1: indices into the data set's `classes`."""
    ignored: Tensor
    """bool [n]: neither trained on nor scored (VOC: difficult, COCO: a crowd)."""


class ImageFile(NamedTuple):
    """One image on disk."""

    name: str
    file: str
    """Path relative to the folder of the images."""
    size: tuple[int, int]
    """Height and width."""


class ObjectList(NamedTuple):
    """Objects of a whole data set, in any order."""

    images: list[int]
    """Index of the image of each object."""
    boxes: list[tuple[float, float, float, float]]
    """As in `BoxAnnotations`, and as stored: outside the image, empty, NaN."""
    labels: list[int]
    ignored: list[bool]

    def add(
        self, image: int, box: tuple[float, float, float, float], label: int, ignored: bool
    ) -> None:
        """Appends an object."""
        self.images.append(image)
        self.boxes.append(box)
        self.labels.append(label)
        self.ignored.append(ignored)


class DetectionDataset(VisionDataset):
    """Abstract base class of images with boxes; a subclass reads the annotation files.

    Construction reads all annotations and checks that every image exists. Annotations are kept in a
    few flat tensors instead of one object each (`deformnet.data.flat`; COCO: 118,000 images,
    860,000 boxes, in each worker).

    Boxes are clipped to their image. Boxes without area are then dropped and counted, with a
    warning. There is also a warning if boxes are far outside their images or all within 0 to 1.

    Attributes:
        classes: names of the object classes, without the background.
        dropped: number of boxes without area.
        has_ground_truth: False for images whose annotations are not published: they have no objects
            and can be neither trained on nor scored.
        orientation: use of the EXIF orientation of images; `auto` selects what matches their size.
        transforms: called with (image, annotations); None for no transforms.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        folder: Path,
        images: Sequence[ImageFile],
        objects: ObjectList,
        classes: tuple[str, ...],
        transforms: Callable | None,
        *,
        has_ground_truth: bool = True,
        orientation: Orientation = "auto",
    ) -> None:
        """
        Args:
            root, split: folder of the data set and its split, for `repr`.
            folder: folder to which the paths of the images are relative.
            images: the images; their names must be unique.
        """
        super().__init__(root, transforms=transforms)
        self.split = split
        self.folder = folder
        self.classes = classes
        self.has_ground_truth = has_ground_truth
        self.orientation: Orientation = orientation
        self._names = StringList(image.name for image in images)
        self._files = StringList(image.file for image in images)
        self._sizes = torch.tensor([image.size for image in images], dtype=torch.int64)
        kept = self._keep(objects)
        self.dropped = int((~kept).sum())
        if self.dropped:
            first = images[objects.images[int(kept.logical_not().nonzero()[0])]].name
            log_once(
                logging.WARNING,
                f"{root}: {self.dropped} of {len(kept)} boxes have no area inside their image and "
                f"are dropped, the first one in {first}",
            )

    def _keep(self, objects: ObjectList) -> Tensor:
        """Stores objects with area by image; returns which those are."""
        owners = torch.tensor(objects.images, dtype=torch.int64)
        edges = torch.tensor(objects.boxes, dtype=torch.float64).reshape(-1, 4)
        height, width = self._sizes[owners].unbind(1)
        bounds = torch.stack([width, height, width, height], dim=1)
        boxes = edges.clamp(min=0).minimum(bounds).float()
        kept = edges.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        self._warn(edges, bounds, kept, owners)
        kept_owners, order = owners[kept].sort(stable=True)
        self._boxes = boxes[kept][order]
        self._labels = torch.tensor(objects.labels, dtype=torch.int64)[kept][order]
        self._ignored = torch.tensor(objects.ignored, dtype=torch.bool)[kept][order]
        self._ends = torch.bincount(kept_owners, minlength=len(self._sizes)).cumsum(0)
        return kept

    def _warn(self, edges: Tensor, bounds: Tensor, kept: Tensor, owners: Tensor) -> None:
        """Warns about boxes that are probably not in pixels of their image."""
        if len(edges) and bounds.min() > 1 and edges[:, 2:].max() <= 1:
            log_once(
                logging.WARNING,
                f"{self.root}: expected boxes in pixels, but all {len(edges)} boxes are within 0 "
                "to 1; they seem to be fractions of the width and height",
            )
        beyond = torch.maximum(-edges, edges - bounds).amax(1)
        far = kept & (beyond > (FAR * bounds.amax(1)).clamp(min=2))
        if far.any():
            first = self._names[int(owners[far][0])]
            log_once(
                logging.WARNING,
                f"{self.root}: {int(far.sum())} of {len(edges)} boxes extend far outside their "
                f"image and are clipped; the first one is in {first}",
            )

    def subset(self, indices: Sequence[int], split: str) -> Self:
        """A subset of the data set; `dropped` still refers to all images."""
        part = copy.copy(self)
        part.split = split
        part._names = StringList(self._names[i] for i in indices)
        part._files = StringList(self._files[i] for i in indices)
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        part._sizes = self._sizes[chosen]
        counts = self._ends.diff(prepend=self._ends.new_zeros(1))[chosen]
        part._ends = counts.cumsum(0)
        # Index of each object: its index within the subset, shifted by the offset of its image.
        shift = (self._ends[chosen] - part._ends).repeat_interleave(counts)
        objects = torch.arange(len(shift)) + shift
        part._boxes = self._boxes[objects]
        part._labels = self._labels[objects]
        part._ignored = self._ignored[objects]
        return part

    def counts(self) -> Tensor:
        """Number of objects of each class, without ignored ones: int64 [C]."""
        return torch.bincount(self._labels[~self._ignored], minlength=len(self.classes))

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Id of the image in the data set, usable as a file name."""
        return self._names[index]

    def image_path(self, index: int) -> Path:
        """File of the image."""
        return self.folder / self._files[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image, without reading it."""
        height, width = self._sizes[index].tolist()
        return height, width

    def annotations(self, index: int) -> BoxAnnotations:
        """Objects of the image, without reading it."""
        objects = span(self._ends, index)
        boxes = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue] (it has a __new__)
            self._boxes[objects].clone(),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=self.size(index),
        )
        return BoxAnnotations(boxes, self._labels[objects].clone(), self._ignored[objects].clone())

    def all_annotations(self) -> tuple[BoxAnnotations, Tensor]:
        """Objects of all images together, as plain tensors, and their number in each image."""
        counts = self._ends.diff(prepend=self._ends.new_zeros(1))
        return BoxAnnotations(self._boxes, self._labels, self._ignored), counts

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, BoxAnnotations]:
        """
        Returns:
            image uint8 [3, H, W] and its objects, or what `transforms` makes of them.
        Raises:
            UserError: one line that names the file, for an image that is unreadable or of another
                size than annotated.
        """
        pair = tv_tensors.Image(self.image(index)), self.annotations(index)
        return pair if self.transforms is None else self.transforms(*pair)

    def image(self, index: int) -> Tensor:
        """The image alone, uint8 [3, H, W], before any transforms; errors of `__getitem__`."""
        path, size = self.image_path(index), self.size(index)
        image = read_image(path, orientation=self.orientation, annotated=size)
        height, width = image.shape[1:]
        if (height, width) != size:
            raise UserError(f"{path}: {size_error(path, (height, width), size)}")
        return image
