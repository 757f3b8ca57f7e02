"""Base class of the segmentation data sets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet._errors import UserError
from deformnet.data.files import read_image, read_labels, size_text
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


class SegmentationDataset(VisionDataset):
    """Images with label maps. Abstract: a subclass finds the files.

    Lists, and that every file exists, are checked at construction; the content of a file when it
    is read: that it decodes, its size, and that its labels are classes.

    Attributes:
        classes: class names; their indices are the labels.
        samples: files of the images and label maps.
        transforms: called with (image, mask); None for no change.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        samples: Sequence[LabeledImage],
        classes: tuple[str, ...],
        transforms: Callable | None,
        *,
        label_map: Tensor | None = None,
        classes_from: str = "",
    ) -> None:
        """
        Args:
            root, split: folder of the data set and its split, for `repr`.
            label_map: uint8 [256], class (or IGNORE) of every stored label; None for the identity.
                Other values from `len(classes)` on mark stored labels that are errors.
            classes_from: origin of the classes, for messages.
        """
        super().__init__(root, transforms=transforms)
        self.split = split
        self.samples: Sequence[LabeledImage] = _Samples(samples)
        self.classes = classes
        self._label_map = label_map
        self._classes_from = classes_from

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Id of the image in the data set, usable as a file name."""
        return self.samples[index].name

    def image_path(self, index: int) -> Path:
        """File of the image."""
        return self.samples[index].image

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """
        Returns:
            image uint8 [3, H, W] and mask uint8 [H, W] of labels below `len(classes)` or IGNORE,
            or what `transforms` makes of them.
        Raises:
            UserError: one line that names the file, for an unreadable image or label map, a label
                map of another size than its image, and labels without a class.
        """
        image = read_image(self.samples[index].image)
        mask = self.labels(index, (image.shape[1], image.shape[2]))
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        return pair if self.transforms is None else self.transforms(*pair)

    def labels(self, index: int, size: tuple[int, int]) -> Tensor:
        """Label map of an image whose height and width are `size`: uint8 [H, W], as the mask of a
        sample before its transforms.

        Raises:
            UserError: as `__getitem__`.
        """
        sample = self.samples[index]
        labels = read_labels(sample.labels)
        if labels.shape != size:
            raise UserError(
                f"{sample.labels}: expected the size of its image {sample.image.name}, "
                f"{size_text(*size)}, but got {size_text(*labels.shape)}"
            )
        return self._to_classes(labels, sample.labels)

    def _to_classes(self, labels: Tensor, path: Path) -> Tensor:
        mapped = labels if self._label_map is None else self._label_map[labels.int()]
        wrong = (mapped >= len(self.classes)) & (mapped != IGNORE)
        if wrong.any():
            raise UserError(self._wrong_label(path, int(labels[wrong].max())))
        return mapped

    def _wrong_label(self, path: Path, label: int) -> str:
        count = len(self.classes)
        return (
            f"{path}: expected labels of the {count} classes{self._classes_from} "
            f"(0 to {count - 1}; {IGNORE} is void), but got label {label}"
        )
