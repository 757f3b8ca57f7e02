"""Data sets in any known layout."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.cityscapes import CITYSCAPES_MASKS
from deformnet.data.coco import COCO_BOXES
from deformnet.data.coco_masks import COCO_MASKS
from deformnet.data.files import listing, require_folder
from deformnet.data.image_folder import IMAGE_FOLDER
from deformnet.data.labelme import LABELME_BOXES, LABELME_MASKS
from deformnet.data.layouts import Layout
from deformnet.data.masks import FOLDER_MASKS
from deformnet.data.voc import VOC_BOXES, VOC_MASKS
from deformnet.data.yolo import YOLO_BOXES, YOLO_MASKS

_Dataset = TypeVar("_Dataset")

# Of each kind, the first that recognizes a folder reads it.
_BOXES: tuple[Layout[DetectionDataset], ...] = (
    COCO_BOXES,
    VOC_BOXES,
    YOLO_BOXES,
    LABELME_BOXES,
)
_MASKS: tuple[Layout[SegmentationDataset], ...] = (
    CITYSCAPES_MASKS,
    VOC_MASKS,
    COCO_MASKS,
    YOLO_MASKS,
    FOLDER_MASKS,
    LABELME_MASKS,
)
LAYOUTS: tuple[Layout, ...] = (*_BOXES, *_MASKS, IMAGE_FOLDER)
"""All layouts. The folders of classes come last: only a folder of no other layout is read so."""


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
    return _find(Path(root).expanduser(), _BOXES).open(root, split, transforms)


def open_segmentation(
    root: str | Path, split: str, transforms: Callable | None = None
) -> SegmentationDataset:
    """Opens a segmentation data set; its layout, VOC or Cityscapes, is recognized.

    Args:
        root: folder with `VOCdevkit` (or that folder itself, or one year of it), or with
            `leftImg8bit` and `gtFine`.
        split: name of a list file (VOC) or of a folder (Cityscapes), or several joined by `+`; of
            the VOC layout as in `open_detection`, such as `VOC2012/train_aug`.
        transforms: called with (image, mask), such as `segmentation_training_transforms`.
    Raises:
        FileNotFoundError, UserError: as `open_detection`.
    """
    return _find(Path(root).expanduser(), _MASKS).open(root, split, transforms)


def detection_splits(root: str | Path) -> list[str]:
    """Splits that `open_detection` takes, without unions and VOC's lists of one class.

    In the VOC layout, the splits of the last year; with several years also those of every year,
    with its folder.

    Raises:
        FileNotFoundError: if `root` has no known layout.
    """
    root = Path(root).expanduser()
    return _find(root, _BOXES).splits(root)


def segmentation_splits(root: str | Path) -> list[str]:
    """Splits that `open_segmentation` takes, as `detection_splits`."""
    root = Path(root).expanduser()
    return _find(root, _MASKS).splits(root)


def _find(root: Path, layouts: Sequence[Layout[_Dataset]]) -> Layout[_Dataset]:
    require_folder(root)
    for layout in layouts:
        if layout.recognizes(root):
            return layout
    expected = " or ".join(f"{layout.files} ({layout.name})" for layout in layouts)
    raise FileNotFoundError(
        f"{root}: expected a data set with {expected}, but the folder holds "
        f"{listing(sorted(path.name for path in root.iterdir()), 5)}"
    )
