"""Base class of the segmentation data sets."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet._errors import UserError
from deformnet.data.files import (
    Orientation,
    Size,
    is_rotated,
    read_image,
    read_size,
    size_error,
    size_text,
)
from deformnet.data.flat import StringList

IGNORE = 255
"""Label of pixels without a class (void), which are neither trained on nor scored."""


class LabeledImage(NamedTuple):
    """Files of one image and its label map."""

    name: str
    image: Path
    labels: Path


class _Samples(Sequence[LabeledImage]):
    """Files of many images, in flat tensors."""

    def __init__(self, samples: Sequence[LabeledImage]) -> None:
        self._names = StringList(sample.name for sample in samples)
        self._images = StringList(str(sample.image) for sample in samples)
        self._labels = StringList(str(sample.labels) for sample in samples)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> LabeledImage:  # pyright: ignore[reportIncompatibleMethodOverride]
        image, labels = self._images[index], self._labels[index]
        return LabeledImage(self._names[index], Path(image), Path(labels))


class LabelReader(Protocol):
    """Reads files of label maps."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def void_advice(self) -> str:
        """Advice for a data set in which all pixels are void, for messages."""
        ...

    def read(self, path: Path) -> Tensor:
        """Labels below `len(classes)` or IGNORE, uint8 [H, W]; UserError for others."""
        ...


class SegmentationDataset(VisionDataset, ABC):
    """Abstract base class of images with label maps; a subclass finds the files and reads labels.

    Lists and the existence of every file are checked at construction. The content of a file (its
    format, size and labels) is checked when it is read.

    Attributes:
        classes: class names; their indices are the labels.
        samples: files of the images and label maps.
        orientation: use of the EXIF orientation of images; `auto` selects what matches the mask.
        transforms: called with (image, mask); None for no transforms.
        void_advice: advice for a data set in which all pixels are void, for messages.
    """

    @property
    def void_advice(self) -> str:
        return "correct the annotations, or leave out the split"

    def __init__(
        self,
        root: Path,
        split: str,
        samples: Sequence[LabeledImage],
        classes: tuple[str, ...],
        transforms: Callable | None,
        orientation: Orientation,
    ) -> None:
        """
        Args:
            root, split: folder of the data set and its split, for `repr`.
        """
        super().__init__(root, transforms=transforms)
        self.split = split
        self.samples: Sequence[LabeledImage] = _Samples(samples)
        self.classes = classes
        self.orientation: Orientation = orientation

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, indices: Sequence[int], split: str) -> Self:
        """A subset of the data set."""
        part = copy.copy(self)
        part.split = split
        part.samples = _Samples([self.samples[index] for index in indices])
        return part

    def name(self, index: int) -> str:
        """Id of the image in the data set, usable as a file name."""
        return self.samples[index].name

    def image_path(self, index: int) -> Path:
        """File of the image."""
        return self.samples[index].image

    def annotated_size(self, index: int) -> Size | None:
        """Annotated height and width; None if there are none."""
        return None

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """
        Returns:
            image uint8 [3, H, W] and mask uint8 [H, W] of labels below `len(classes)` or IGNORE,
            or what `transforms` makes of them.
        Raises:
            UserError: one line that names the file, for an unreadable image or label map, a label
                map of another size than its image, and labels without a class.
        """
        image = self.image(index)
        mask = self.labels(index, (image.shape[1], image.shape[2]))
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        return pair if self.transforms is None else self.transforms(*pair)

    def image(self, index: int) -> Tensor:
        """The image alone, uint8 [3, H, W], before any transforms."""
        return read_image(
            self.image_path(index),
            orientation=self.orientation,
            annotated=self.annotated_size(index),
        )

    def mask(self, index: int) -> tv_tensors.Mask:
        """The mask alone, uint8 [H, W], before any transforms, without reading the image."""
        annotated = self.annotated_size(index)
        size = annotated or read_size(self.image_path(index), orientation=self.orientation)
        return tv_tensors.Mask(self.labels(index, size))

    @abstractmethod
    def labels(self, index: int, size: Size) -> Tensor:
        """Label map of an image with height and width `size`: uint8 [H, W], before any transforms.

        Raises:
            UserError: see `__getitem__`.
        """

    def _require_size(self, index: int, size: Size, annotated: Size | None) -> None:
        """Raises UserError if an image does not have its annotated size."""
        if annotated not in (None, size):
            path = self.image_path(index)
            raise UserError(f"{path}: {size_error(path, size, annotated)}")

    def require_labels(self) -> None:
        """Reads label maps until one has a labeled pixel, usually the first one.

        Raises:
            UserError: if all pixels are void.
        """
        for index in range(len(self)):
            try:
                labels = self.mask(index)
            except (ValueError, OSError):
                return  # reported when the sample itself is read
            if (labels != IGNORE).any():
                return
        raise UserError(
            f"{self.root}: expected labeled pixels in split {self.split}, but all pixels of "
            f"its {len(self)} label maps are void ({IGNORE}); {self.void_advice}"
        )


class MaskFileDataset(SegmentationDataset):
    """Abstract base class of images with label maps in image files."""

    def __init__(
        self,
        root: Path,
        split: str,
        samples: Sequence[LabeledImage],
        reader: LabelReader,
        transforms: Callable | None,
        orientation: Orientation,
    ) -> None:
        """
        Args:
            root, split, samples, transforms, orientation: see `SegmentationDataset`.
            reader: reads label maps.
        """
        super().__init__(root, split, samples, reader.classes, transforms, orientation)
        self._reader = reader

    @property
    def void_advice(self) -> str:
        return self._reader.void_advice

    def annotated_size(self, index: int) -> Size | None:
        return read_size(self.samples[index].labels)

    def labels(self, index: int, size: Size) -> Tensor:
        sample = self.samples[index]
        labels = self._reader.read(sample.labels)
        height, width = labels.shape
        if (height, width) != size:
            raise UserError(
                f"{sample.labels}: {wrong_mask_size(sample.image, size, (height, width))}"
            )
        return labels


def wrong_mask_size(image: Path, size: Size, mask: Size) -> str:
    """Message about a mask whose size differs from its image."""
    text = (
        f"expected the size of its image {image.name}, {size_text(*size)}, "
        f"but got {size_text(*mask)}"
    )
    if mask == size[::-1] and is_rotated(image):
        text += " (the image has an EXIF orientation; orientation='auto' selects what matches)"
    return text
