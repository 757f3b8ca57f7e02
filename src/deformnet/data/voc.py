"""PASCAL VOC's layout for semantic segmentation and detection (Everingham et al. 2010)."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import final
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from deformnet.data.base import IGNORE, Sample, SegmentationDataset, require_folder
from deformnet.data.boxes import DetectionDataset, Objects, Photo
from deformnet.data.files import Folder, read_labels, read_lines, read_size

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

# What the tag <difficult> holds in files of VOC and of tools that write its format.
_DIFFICULT = {"1": True, "true": True, "0": False, "false": False, "": False, "unspecified": False}


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


@final
class VOCDetection(DetectionDataset):
    """Images and boxes in the VOC layout, of VOC itself or of any set written in it.

    ```
    classes.txt                                     optional
    VOCdevkit/VOC2012/
      ImageSets/Main/<split>.txt                    one image id a line
      JPEGImages/<id>.jpg (or .png)
      Annotations/<id>.xml
    ```

    `root` as for `VOCSegmentation`. A split is any list file. Lists of one class (`cat_train`) have
    a second field, 1, 0 or -1, that says whether the class is in the image: it is passed over, and
    all images of the list are taken with the objects of all classes.

    Objects marked as difficult are ignored, truncated ones are like any other. The files name
    the first and the last pixel of a box, counted from 1. A box of one single pixel is what a click
    leaves behind: it has no area here.

    `classes.txt` names the classes, one a line, in the order of the labels; a `background` in the
    first line is passed over. Without it the classes are VOC's 20.
    """

    def __init__(self, root: Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, list (the message says which splits exist),
                image or XML file.
            ValueError: for an empty or malformed list or classes.txt, and for an XML file that is
                broken or has an object of no class.
        """
        root = Path(root).expanduser()
        folder = find_voc(root)
        classes = _read_objects(folder)
        photos, objects = _read_annotations(folder, split, classes)
        super().__init__(root, folder, photos, objects, classes, transforms)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def voc_detection_splits(folder: Path) -> list[str]:
    """The detection splits that a year's folder has lists for, without those of one class."""
    names = sorted(path.stem for path in (folder / "ImageSets/Main").glob("*.txt"))
    # Not all that begins with a class is such a list: VOC has a class `train`.
    of_one_class = {f"{label}_{name}" for label in _read_objects(folder) for name in names}
    return [name for name in names if name not in of_one_class]


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
    lines = _lines(path, voc_splits(folder))
    images = Folder(folder / "JPEGImages")
    masks = [Folder(folder / "SegmentationClass")]
    if split == "train_aug":
        masks.insert(0, Folder(folder / "SegmentationClassAug"))

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


def _lines(path: Path, known: list[str]) -> list[list[str]]:
    """The fields of every line of a list."""
    if not path.is_file():
        splits = ", ".join(known) or "none"
        raise FileNotFoundError(f"{path}: no such list; the splits here are: {splits}")
    lines = [line.split() for line in read_lines(path)]
    if not lines:
        raise ValueError(f"{path}: the list is empty")
    return lines


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _read_classes(folder: Path) -> tuple[str, ...]:
    path = _classes_file(folder)
    if path is None:
        return VOC_CLASSES
    names = _read_names(path)
    if len(names) > IGNORE:
        raise ValueError(f"{path}: names {len(names)} classes; 8-bit masks hold at most {IGNORE}")
    if names[0] == "background":
        return names
    if names == VOC_CLASSES[1:] or _has_label(folder / "SegmentationClass", len(names)):
        return ("background", *names)
    return names


def _classes_file(folder: Path) -> Path | None:
    places = [folder]
    if folder.parent.name == "VOCdevkit":
        places += [folder.parent, folder.parent.parent]
    return next((p / "classes.txt" for p in places if (p / "classes.txt").is_file()), None)


def _read_names(path: Path) -> tuple[str, ...]:
    names = tuple(read_lines(path))
    if not names:
        raise ValueError(f"{path}: names no class")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: names {repeated[0]!r} more than once")
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


def _read_objects(folder: Path) -> tuple[str, ...]:
    """The classes of objects."""
    path = _classes_file(folder)
    if path is None:
        return VOC_CLASSES[1:]
    names = _read_names(path)
    names = names[1:] if names[0] == "background" else names
    if not names:
        raise ValueError(f"{path}: names no class but the background")
    return names


def _read_annotations(
    folder: Path, split: str, classes: tuple[str, ...]
) -> tuple[list[Photo], Objects]:
    path = folder / "ImageSets/Main" / f"{split}.txt"
    lines = _lines(path, voc_detection_splits(folder))
    images, annotations = Folder(folder / "JPEGImages"), Folder(folder / "Annotations")
    labels = {name: label for label, name in enumerate(classes)}
    photos: dict[str, Photo] = {}
    objects = Objects([], [], [], [])
    for fields in lines:
        name = fields[0]
        if len(fields) > 2 or fields[1:] not in ([], ["1"], ["0"], ["-1"]):
            raise ValueError(
                f"{path}: wanted an id, or an id and 1, 0 or -1 a line, got {' '.join(fields)!r}"
            )
        if name in photos:
            raise ValueError(f"{path}: lists {name} more than once")
        image, annotation = images.find(f"{name}.jpg", f"{name}.png"), f"{name}.xml"
        if image is None:
            raise FileNotFoundError(f"{path}: lists {name}, which is not in {images.path}")
        xml = annotations.find(annotation)
        if xml is None:
            raise FileNotFoundError(
                f"{path}: lists {name}, which has no {annotation} in {annotations.path}"
            )
        content = _parse(xml)
        for item in content.iterfind("object"):
            objects.photos.append(len(photos))
            objects.boxes.append(_read_box(xml, item))
            objects.labels.append(_read_label(xml, item, labels))
            objects.ignored.append(_is_difficult(xml, item))
        size = _read_size(content) or read_size(image)
        photos[name] = Photo(name, f"JPEGImages/{image.name}", size)
    return list(photos.values()), objects


def _parse(path: Path) -> Element:
    try:
        root = ElementTree.parse(path).getroot()
    except (SyntaxError, ValueError, LookupError) as error:  # the last two: of its encoding
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as XML ({reason})") from error
    if root.tag != "annotation":
        raise ValueError(f"{path}: wanted <annotation> at the top, got <{root.tag}>")
    return root


def _read_size(content: Element) -> tuple[int, int] | None:
    """Height and width; None where the file does not say, as zeros do not."""
    texts = [content.findtext(f"size/{tag}", "").strip() for tag in ("height", "width")]
    height, width = (int(text) if text.isdecimal() else 0 for text in texts)
    return (height, width) if height and width else None


def _read_label(path: Path, item: Element, labels: dict[str, int]) -> int:
    name = item.findtext("name", "").strip()
    if name not in labels:
        known = ", ".join(labels)
        raise ValueError(f"{path}: object of class {name!r}, wanted one of: {known}")
    return labels[name]


def _read_box(path: Path, item: Element) -> tuple[float, float, float, float]:
    """The edges, from the first and last pixel counted from 1."""
    tags = ("xmin", "ymin", "xmax", "ymax")
    texts = [item.findtext(f"bndbox/{tag}", "").strip() for tag in tags]
    try:
        x1, y1, x2, y2 = map(float, texts)
    except ValueError as error:
        raise ValueError(
            f"{path}: bndbox: wanted numbers {', '.join(tags)}, got {texts}"
        ) from error
    if (x1, y1) == (x2, y2):
        return x1, y1, x1, y1
    return x1 - 1, y1 - 1, x2, y2


def _is_difficult(path: Path, item: Element) -> bool:
    text = item.findtext("difficult", "").strip().lower()
    if text not in _DIFFICULT:
        raise ValueError(f"{path}: difficult: wanted 0 or 1, got {text!r}")
    return _DIFFICULT[text]
