"""Cityscapes' layout for semantic segmentation (Cordts et al. 2016)."""

from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torchvision.datasets import Cityscapes

from deformnet.data.base import IGNORE, Sample, SegmentationDataset, every_label, require_folder
from deformnet.data.files import read_labels
from deformnet.data.splits import Part, require_union, split_parts

# id -> train id of the 34 stored ids; licence plates (-1) have no 8-bit id. From torchvision's copy
# of the official table.
_TRAIN_ID = {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0}
CITYSCAPES_CLASSES = tuple(c.name for c in Cityscapes.classes if c.train_id not in (-1, IGNORE))
CITYSCAPES_IDS = tuple(_TRAIN_ID)
"""The labels that label files may hold."""

# Stored labels outside the table: no class and not void, so reading one is an error.
_UNKNOWN = 254


@final
class CityscapesSegmentation(SegmentationDataset):
    """Images and fine labels in the Cityscapes layout.

    ```
    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
    ```

    A split is a folder, or several joined by `+` (`train+val`).

    Only these two kinds of file are needed. The 34 stored ids become the 19 train ids; the others
    are void. (torchvision's reader of the same layout knows three fixed splits, takes the files in
    the order of the disk, finds out that one is missing only when it is read, and leaves the ids.)
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transforms: Callable | None = None,
        *,
        compact: bool = False,
    ) -> None:
        """
        Args:
            compact: number only those of the 19 classes that occur in the labels of any split, in
                the order of the train ids. Reads every label file: meant for small sets.
        Raises:
            FileNotFoundError: for a missing folder, split (the message says which exist) or label
                file.
            ValueError: if the split has no images, or an image of the same name in two parts.
        """
        root = Path(root).expanduser()
        by_part = {name: _find_samples(root, name) for name in split_parts(split)}
        require_union(
            [
                Part(str(root / "leftImg8bit" / name), (), [sample.name for sample in samples])
                for name, samples in by_part.items()
            ]
        )
        samples = [sample for samples in by_part.values() for sample in samples]
        label_map = every_label(_UNKNOWN)
        for label, train_id in _TRAIN_ID.items():
            label_map[label] = train_id
        label_map[IGNORE] = IGNORE
        classes = CITYSCAPES_CLASSES
        if compact:
            present = _present(root, label_map)
            renumber = every_label(IGNORE)
            renumber[_UNKNOWN] = _UNKNOWN
            renumber[present] = torch.arange(len(present), dtype=torch.uint8)
            label_map = renumber[label_map.int()]
            classes = tuple(CITYSCAPES_CLASSES[i] for i in present)
        super().__init__(root, samples, classes, transforms, label_map=label_map)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def _wrong_label(self, path: Path, label: int) -> str:
        return f"{path}: label {label} is not one of Cityscapes' ids (0 to {max(_TRAIN_ID)})"


def cityscapes_splits(root: Path) -> list[str]:
    """The splits that have a folder of images."""
    return sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())


def _find_samples(root: Path, split: str) -> list[Sample]:
    require_folder(root)
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if not images.is_dir():
        known = ", ".join(cityscapes_splits(root)) or "none"
        raise FileNotFoundError(f"{images}: no such folder; the splits here are: {known}")
    require_folder(labels)
    there = set(labels.glob("*/*_gtFine_labelIds.png"))
    samples = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.removesuffix("_leftImg8bit.png")
        path = labels / image.parent.name / f"{name}_gtFine_labelIds.png"
        if path not in there:
            raise FileNotFoundError(f"{path}: no such file, wanted for {image.name}")
        samples.append(Sample(name, image, path))
    if not samples:
        raise ValueError(f"{images}: no <city>/*_leftImg8bit.png in it")
    return samples


def _present(root: Path, label_map: Tensor) -> list[int]:
    """The train ids that occur in the label files of all splits."""
    seen = torch.zeros(256, dtype=torch.bool)
    for path in sorted((root / "gtFine").glob("*/*/*_gtFine_labelIds.png")):
        seen[label_map[read_labels(path).unique().int()].int()] = True
    return seen[: len(CITYSCAPES_CLASSES)].nonzero().flatten().tolist()
