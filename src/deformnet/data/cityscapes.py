"""Cityscapes' layout for semantic segmentation (Cordts et al. 2016)."""

from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torchvision.datasets import Cityscapes

from deformnet._errors import UserError
from deformnet.data.base import IGNORE, LabeledImage, SegmentationDataset
from deformnet.data.files import listing, require_folder
from deformnet.data.layouts import Layout
from deformnet.data.splits import Part, require_union, split_parts

# id -> train id of the 34 stored ids; license plates (-1) have no 8-bit id. From torchvision's copy
# of the official table.
_TRAIN_ID = {c.id: c.train_id for c in Cityscapes.classes if c.id >= 0}
CITYSCAPES_CLASSES = tuple(c.name for c in Cityscapes.classes if c.train_id not in (-1, IGNORE))
CITYSCAPES_IDS = tuple(_TRAIN_ID)
"""Labels that label files may hold."""

# Stored labels outside the table: neither class nor void, so reading one is an error.
_UNKNOWN = 254


@final
class CityscapesSegmentation(SegmentationDataset):
    """Images and fine labels in the Cityscapes layout.

    ```
    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png
    ```

    A split is a folder, or several joined by `+` (`train+val`).

    Only these two kinds of files are read. Of the 34 stored ids, 19 become the train ids and the
    others void. (torchvision's reader of this layout knows three fixed splits, takes files in the
    order of the disk, finds missing ones only when it reads them, and returns the stored ids.)
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, split (the message says which exist) or label
                file.
            UserError: if the split has no images, or two parts share the name of an image.
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
        label_map = torch.full((256,), _UNKNOWN, dtype=torch.uint8)
        for label, train_id in _TRAIN_ID.items():
            label_map[label] = train_id
        label_map[IGNORE] = IGNORE
        super().__init__(root, samples, CITYSCAPES_CLASSES, transforms, label_map=label_map)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def _wrong_label(self, path: Path, label: int) -> str:
        return (
            f"{path}: expected the ids of Cityscapes, 0 to {max(_TRAIN_ID)}, but got label {label}"
        )


def cityscapes_splits(root: Path) -> list[str]:
    """Splits with a folder of images."""
    return sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())


CITYSCAPES_MASKS = Layout[SegmentationDataset](
    name="Cityscapes",
    files="leftImg8bit/ and gtFine/",
    recognizes=lambda root: (root / "leftImg8bit").is_dir(),
    splits=cityscapes_splits,
    open=CityscapesSegmentation,
)


def _find_samples(root: Path, split: str) -> list[LabeledImage]:
    require_folder(root)
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if not images.is_dir():
        raise FileNotFoundError(
            f"{images}: no such folder; the splits in {root} are: "
            f"{listing(cityscapes_splits(root))}"
        )
    require_folder(labels)
    existing = set(labels.glob("*/*_gtFine_labelIds.png"))
    samples = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.removesuffix("_leftImg8bit.png")
        path = labels / image.parent.name / f"{name}_gtFine_labelIds.png"
        if path not in existing:
            raise FileNotFoundError(f"{path}: no such file, the label map of {image.name}")
        samples.append(LabeledImage(name, image, path))
    if not samples:
        raise UserError(f"{images}: expected images, but found no <city>/*_leftImg8bit.png")
    return samples
