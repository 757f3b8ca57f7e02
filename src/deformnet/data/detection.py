"""Detection data sets in any known layout."""

from collections.abc import Callable
from pathlib import Path

from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCO_BOXES
from deformnet.data.layouts import Layout, find_layout
from deformnet.data.voc import VOC_BOXES

LAYOUTS: tuple[Layout[DetectionDataset], ...] = (COCO_BOXES, VOC_BOXES)
"""Layouts of boxes; the first that recognizes a folder reads it."""


def open_detection(
    root: str | Path, split: str, transforms: Callable | None = None
) -> DetectionDataset:
    """Opens a detection data set; its layout, VOC or COCO, is recognized.

    Args:
        root: folder with `VOCdevkit` (or that folder itself, or one year of it), or with
            `annotations/instances_*.json` (or `image_info_*.json` of images without published
            annotations).
        split: name of a list file (VOC) or of what follows `instances_` (COCO), or several joined
            by `+`. A name of the VOC layout may begin with the folder of a year, as in
            `VOC2007/trainval+VOC2012/trainval`; the default is the last year.
        transforms: called with (image, annotations), such as `detection_transforms`.
    Raises:
        FileNotFoundError: if `root` has no known layout or no such split; the message says what was
            looked for, or which splits exist.
        UserError: if the split is empty, an annotation is malformed, or the parts of a union do not
            fit together.
    """
    root = Path(root).expanduser()
    return find_layout(root, LAYOUTS).open(root, split, transforms)


def detection_splits(root: str | Path) -> list[str]:
    """Splits that `open_detection` takes, without unions and VOC's lists of one class.

    In the VOC layout, the splits of the last year; with several years also those of every year,
    with its folder.

    Raises:
        FileNotFoundError: if `root` has no known layout.
    """
    root = Path(root).expanduser()
    return find_layout(root, LAYOUTS).splits(root)
