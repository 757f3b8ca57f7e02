"""Opening a detection set without saying how it is laid out."""

from collections.abc import Callable
from pathlib import Path

from deformnet.data.base import require_folder
from deformnet.data.coco import COCODetection, coco_splits
from deformnet.data.voc import VOCDetection, find_years, voc_detection_splits


def open_detection(
    root: Path, split: str, transforms: Callable | None = None
) -> VOCDetection | COCODetection:
    """Opens a folder in the VOC or the COCO layout, whichever it is.

    Args:
        root: the folder that holds `VOCdevkit` (or is it, or one year of it), or that holds
            `annotations/instances_*.json` (or `image_info_*.json`, of images whose objects are
            not published).
        split: which part: the name of a list file (VOC) or what follows `instances_` (COCO), or
            several joined by `+`. In the VOC layout a name may begin with a year's folder, as in
            `VOC2007/trainval+VOC2012/trainval`; without it is the last year's.
        transforms: called with (image, annotations), as those of `deformnet.data.transforms`.
    Raises:
        FileNotFoundError: if `root` is in neither layout, or has no such split; the message says
            what was looked for, or which splits there are.
        ValueError: if the split is empty, an annotation is malformed, or the parts of a sum do not
            fit together.
    """
    root = Path(root).expanduser()
    if _is_coco(root):
        return COCODetection(root, split, transforms)
    return VOCDetection(root, split, transforms)


def detection_splits(root: Path) -> list[str]:
    """The names that `open_detection` takes as split, sums and VOC's lists of one class left out.

    Those of the last year of a folder in the VOC layout; with several years also those of every
    year, with its folder.

    Raises:
        FileNotFoundError: if `root` is in neither layout.
    """
    root = Path(root).expanduser()
    return coco_splits(root) if _is_coco(root) else voc_detection_splits(root)


def _is_coco(root: Path) -> bool:
    """Whether it is in the COCO layout; if not, it is in VOC's."""
    require_folder(root)
    if coco_splits(root):
        return True
    try:
        find_years(root)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root}: neither layout found; looked for VOCdevkit/VOC*/ImageSets/, VOC*/ImageSets/ "
            "and ImageSets/ (VOC), and for annotations/instances_*.json or image_info_*.json (COCO)"
        ) from None
    return False
