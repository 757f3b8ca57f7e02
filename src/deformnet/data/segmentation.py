"""Segmentation data sets in any known layout."""

from collections.abc import Callable
from pathlib import Path

from deformnet.data.base import SegmentationDataset
from deformnet.data.cityscapes import CITYSCAPES_MASKS
from deformnet.data.layouts import Layout, find_layout
from deformnet.data.voc import VOC_MASKS

LAYOUTS: tuple[Layout[SegmentationDataset], ...] = (CITYSCAPES_MASKS, VOC_MASKS)
"""Layouts of label maps; the first that recognizes a folder reads it."""


def open_segmentation(
    root: str | Path, split: str, transforms: Callable | None = None
) -> SegmentationDataset:
    """Opens a segmentation data set; its layout, VOC or Cityscapes, is recognized.

    Args:
        root: folder with `VOCdevkit` (or that folder itself, or one year of it), or with
            `leftImg8bit` and `gtFine`.
        split: name of a list file (VOC) or of a folder (Cityscapes), or several joined by `+`. A
            name of the VOC layout may begin with the folder of a year: `VOC2012/train_aug`.
        transforms: called with (image, mask), such as `segmentation_training_transforms`.
    Raises:
        FileNotFoundError: if `root` has no known layout or no such split; the message says what was
            looked for, or which splits exist.
        UserError: if the split is empty, or the parts of a union do not fit together.
    """
    root = Path(root).expanduser()
    return find_layout(root, LAYOUTS).open(root, split, transforms)


def segmentation_splits(root: str | Path) -> list[str]:
    """Splits that `open_segmentation` takes, without unions.

    In the VOC layout, the splits of the last year; with several years also those of every year,
    with its folder.

    Raises:
        FileNotFoundError: if `root` has no known layout.
    """
    root = Path(root).expanduser()
    return find_layout(root, LAYOUTS).splits(root)
