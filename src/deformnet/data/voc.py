"""PASCAL VOC's layout for semantic segmentation (Everingham et al. 2010)."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import final

import numpy as np

from deformnet.data.base import IGNORE, Sample, SegmentationDataset, require_folder
from deformnet.data.files import read_labels, read_lines

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# Masks looked at to see whether a classes.txt leaves out the background (see `_read_classes`).
_MASKS_SAMPLED = 100


@final
class VOCSegmentation(SegmentationDataset):
    """Images and label maps in the VOC layout, of VOC itself or of any set written in it.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Segmentation/<split>.txt            one image id a line
      JPEGImages/<id>.jpg (or .png)
      SegmentationClass/<id>.png                    class ids, mode P or L; 255 is void
      SegmentationClassAug/<id>.png                 optional, for `train_aug`
    ```

    `root` may be the folder that holds VOCdevkit, VOCdevkit itself or one year's folder. With
    several years the last is taken, as VOC2012 holds the segmentations of the years before.

    A split is any list file: train, val, trainval, test, an own one. The list `train_aug` (10,582
    images) is the union of VOC's 1,464 training masks and of the masks of SBD (Hariharan et al.
    2011) less VOC's val images. Its masks are therefore looked for in SegmentationClassAug, image
    by image, and in SegmentationClass where that folder lacks one: archives differ in whether they
    copied VOC's own masks into it. Its lines may be ids or pairs of paths
    (`/JPEGImages/x.jpg /SegmentationClassAug/x.png`), both forms being in circulation.

    `classes.txt` names the classes in the order of their ids, one a line, from id 0. Lists that
    name objects alone, as detection sets have them, leave out `background`; it is put first when
    the list is VOC's 20 objects, or when a mask has an id one beyond the list. Without
    `classes.txt` the classes are VOC's 21.
    """

    def __init__(self, root: Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or mask.
            ValueError: for an empty or malformed list or classes.txt.
        """
        root = Path(root).expanduser()
        folder = find_voc(root)
        samples = list(_read_list(folder, split))
        super().__init__(root, samples, _read_classes(folder), transforms)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"

    def _wrong_label(self, path: Path, label: int) -> str:
        message = super()._wrong_label(path, label)
        if label == len(self.classes) and self.classes[0] != "background":
            message += (
                "; if id 0 is the background, make 'background' the first line of classes.txt"
            )
        return message


def voc_splits(folder: Path) -> list[str]:
    """The segmentation splits that a year's folder has lists for."""
    return sorted(path.stem for path in (folder / "ImageSets/Segmentation").glob("*.txt"))


def find_voc(root: Path) -> Path:
    """Finds the folder of one year (VOC2012) from `root`, which may lie up to two folders above.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    require_folder(root)
    if (root / "ImageSets").is_dir():
        return root
    for devkit in (root, root / "VOCdevkit"):
        years = sorted(path.parent for path in devkit.glob("VOC*/ImageSets"))
        if years:
            return years[-1]
    raise FileNotFoundError(
        f"{root}: no VOC layout here; looked for ImageSets/, VOC*/ImageSets/ and "
        "VOCdevkit/VOC*/ImageSets/"
    )


def colour_map() -> np.ndarray:
    """VOC's colours: uint8 [256, 3], the RGB of each label, made of the label's bits."""
    labels = np.arange(256, dtype=np.uint8)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (labels >> channel & 1) << (7 - bit)
        labels = labels >> 3
    return colours


def _read_list(folder: Path, split: str) -> Iterator[Sample]:
    path = folder / "ImageSets/Segmentation" / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(voc_splits(folder)) or "none"
        raise FileNotFoundError(f"{path}: no such list; the splits here are: {known}")
    lines = [line.split() for line in read_lines(path)]
    if not lines:
        raise ValueError(f"{path}: the list is empty")

    images = _Folder(folder / "JPEGImages")
    masks = [_Folder(folder / "SegmentationClass")]
    if split == "train_aug":
        masks.insert(0, _Folder(folder / "SegmentationClassAug"))

    for fields in lines:
        if len(fields) == 1:
            name = fields[0]
            image = images.find(f"{name}.jpg", f"{name}.png")
            mask = next(filter(None, (place.find(f"{name}.png") for place in masks)), None)
        elif len(fields) == 2:
            image, mask = (_existing(folder / field.lstrip("/")) for field in fields)
            name = Path(fields[0]).stem
        else:
            raise ValueError(f"{path}: wanted an id or two paths a line, got {' '.join(fields)!r}")
        if image is None:
            raise FileNotFoundError(f"{path}: lists {fields[0]}, which is not in {images.path}")
        if mask is None:
            places = " or ".join(str(place.path) for place in masks)
            raise FileNotFoundError(f"{path}: lists {fields[-1]}, which has no mask in {places}")
        yield Sample(name, image, mask)


class _Folder:
    """The names in a folder, read once: asking for 10,582 files is slow on network disks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = {file.name for file in path.iterdir()} if path.is_dir() else set()

    def find(self, *names: str) -> Path | None:
        """The first of `names` that is here."""
        return next((self.path / name for name in names if name in self._names), None)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _read_classes(folder: Path) -> tuple[str, ...]:
    places = [folder]
    if folder.parent.name == "VOCdevkit":
        places += [folder.parent, folder.parent.parent]
    path = next((p / "classes.txt" for p in places if (p / "classes.txt").is_file()), None)
    if path is None:
        return VOC_CLASSES
    names = tuple(read_lines(path))
    if not names:
        raise ValueError(f"{path}: names no class")
    if len(names) > IGNORE:
        raise ValueError(f"{path}: names {len(names)} classes; 8-bit masks hold at most {IGNORE}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: names {repeated[0]!r} more than once")
    if names[0] == "background":
        return names
    if names == VOC_CLASSES[1:] or _has_label(folder / "SegmentationClass", len(names)):
        return ("background", *names)
    return names


def _has_label(folder: Path, label: int) -> bool:
    """Whether one of the first masks has `label`: in name order, so the same for every split."""
    for path in islice(sorted(folder.glob("*.png")), _MASKS_SAMPLED):
        try:
            labels = read_labels(path)
        except ValueError:
            continue  # reported when the sample itself is read
        if (labels == label).any():
            return True
    return False
