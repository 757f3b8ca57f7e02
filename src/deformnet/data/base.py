"""What the segmentation sets share once their files are found."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet.data.files import read_image, read_labels

IGNORE = 255
"""The label of pixels that belong to no class: neither trained on nor scored."""


class Sample(NamedTuple):
    """One labelled image on disk."""

    name: str
    image: Path
    labels: Path


class SegmentationDataset(VisionDataset):
    """Pairs of an image and its label map. Abstract: a subclass finds the files.

    What is cheap is checked at construction (lists, that every file is there), the content of a
    file when it is read: its size, that it decodes, and that its labels are classes.

    Attributes:
        classes: names of the classes; their places are the labels that come out.
        samples: where the images and label maps are.
        transforms: called with (image, mask); None for no change.
    """

    def __init__(
        self,
        root: Path,
        samples: Sequence[Sample],
        classes: tuple[str, ...],
        transforms: Callable | None,
        *,
        label_map: Tensor | None = None,
    ) -> None:
        """
        Args:
            root: the folder that the user gave, for `repr`.
            label_map: uint8 [256], class (or IGNORE) of every stored label; None if they agree.
                Another value from `len(classes)` on marks a stored label that must not occur.
        """
        super().__init__(root, transforms=transforms)
        self.samples = tuple(samples)
        self.classes = classes
        self._label_map = label_map

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The image's id in the set: good as a file name."""
        return self.samples[index].name

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """
        Returns:
            image uint8 [3, H, W] and mask uint8 [H, W] of labels below `len(classes)` or IGNORE,
            or what `transforms` makes of them.
        Raises:
            ValueError: one line that names the file, for an unreadable image or label map, for a
                label map of another size than its image and for labels that are no class.
        """
        sample = self.samples[index]
        image, labels = read_image(sample.image), read_labels(sample.labels)
        if labels.shape != image.shape[1:]:
            raise ValueError(
                f"{sample.labels}: {_size(labels)} label map for the {_size(image)} image "
                f"{sample.image.name}"
            )
        mask = self._to_classes(labels, sample.labels)
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        return pair if self.transforms is None else self.transforms(*pair)

    def _to_classes(self, labels: Tensor, path: Path) -> Tensor:
        mapped = labels if self._label_map is None else self._label_map[labels.int()]
        wrong = (mapped >= len(self.classes)) & (mapped != IGNORE)
        if wrong.any():
            raise ValueError(self._wrong_label(path, int(labels[wrong].max())))
        return mapped

    def _wrong_label(self, path: Path, label: int) -> str:
        return (
            f"{path}: label {label}, but the set has {len(self.classes)} classes "
            f"(0 to {len(self.classes) - 1}; {IGNORE} is void)"
        )


def _size(pixels: Tensor) -> str:
    height, width = pixels.shape[-2:]
    return f"{width}x{height}"


def require_folder(path: Path) -> Path:
    """Returns `path`, or raises an error that says what is in the way."""
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path}: is a file, wanted a folder")
    raise FileNotFoundError(f"{path}: no such folder")


def every_label(default: int) -> Tensor:
    """A label map uint8 [256] that sends every stored label to `default`."""
    return torch.full((256,), default, dtype=torch.uint8)
