"""Opening a segmentation set without saying how it is laid out."""

from collections.abc import Callable
from pathlib import Path

from deformnet.data.base import require_folder
from deformnet.data.cityscapes import CityscapesSegmentation, cityscapes_splits
from deformnet.data.voc import VOCSegmentation, find_years, voc_splits


def open_segmentation(
    root: Path, split: str, transforms: Callable | None = None
) -> VOCSegmentation | CityscapesSegmentation:
    """Opens a folder in the VOC or the Cityscapes layout, whichever it is.

    Args:
        root: the folder that holds `VOCdevkit` (or is it, or one year of it), or that holds
            `leftImg8bit` and `gtFine`.
        split: which part: the name of a list file (VOC) or of a folder (Cityscapes), or several
            joined by `+`. In the VOC layout a name may begin with a year's folder:
            `VOC2012/train_aug`.
        transforms: called with (image, mask), as those of `deformnet.data.transforms`.
    Raises:
        FileNotFoundError: if `root` is in neither layout, or has no such split; the message says
            what was looked for, or which splits there are.
        ValueError: if the split is empty, or is a sum of what does not fit together.
    """
    root = Path(root).expanduser()
    require_folder(root)
    if (root / "leftImg8bit").is_dir():
        return CityscapesSegmentation(root, split, transforms)
    try:
        find_years(root)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{root}: neither layout found; looked for VOCdevkit/VOC*/ImageSets/, VOC*/ImageSets/ "
            "and ImageSets/ (VOC), and for leftImg8bit/ and gtFine/ (Cityscapes)"
        ) from None
    return VOCSegmentation(root, split, transforms)


def segmentation_splits(root: Path) -> list[str]:
    """The names that `open_segmentation` takes as split, sums apart.

    Those of the last year of a folder in the VOC layout; with several years also those of every
    year, with its folder.

    Raises:
        FileNotFoundError: if `root` is in neither layout.
    """
    root = Path(root).expanduser()
    return cityscapes_splits(root) if (root / "leftImg8bit").is_dir() else voc_splits(root)
