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
from deformnet.data.splits import Part, require_union, split_parts

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

# Masks looked at to see whether a classes.txt leaves out the background (see `read_classes`).
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

    `root` may be the folder that holds VOCdevkit, VOCdevkit itself or one year's folder.

    A split is any list file: train, val, trainval, test, an own one; with the year's folder before
    it (`VOC2012/train`) or of the last year, as VOC2012 holds the segmentations of the years
    before. Several are joined by `+`. The list `train_aug` (10,582
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
            ValueError: for an empty or malformed list or classes.txt, and for parts of a sum that
                differ in their classes or share an image.
        """
        root = Path(root).expanduser()
        samples: list[Sample] = []
        parts = []
        for folder, name in _find_lists(root, split):
            path = folder / "ImageSets/Segmentation" / f"{name}.txt"
            added = list(_read_list(folder, path, voc_splits(root)))
            parts.append(Part(str(path), read_classes(folder), [sample.name for sample in added]))
            samples += added
        require_union(parts)
        super().__init__(root, samples, parts[0].classes, transforms)
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

    `root` and splits as for `VOCSegmentation`, so the paper's training set is
    `VOC2007/trainval+VOC2012/trainval`. Lists of one class (`cat_train`) have
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
            ValueError: for an empty or malformed list or classes.txt, for an XML file that is
                broken or has an object of no class, and for parts of a sum that differ in their
                classes or share an image.
        """
        root = Path(root).expanduser()
        photos: list[Photo] = []
        objects = Objects([], [], [], [])
        parts = []
        lists = _find_lists(root, split)
        for folder, name in lists:
            path = folder / "ImageSets/Main" / f"{name}.txt"
            classes = read_object_classes(folder)
            added, of_added = _read_annotations(folder, path, classes, voc_detection_splits(root))
            parts.append(Part(str(path), classes, [photo.name for photo in added]))
            objects.extend(of_added, len(photos))
            photos += added
        require_union(parts)
        years = lists[0][0].parent  # all lie in one folder
        super().__init__(root, years, photos, objects, parts[0].classes, transforms)
        self.split = split

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def voc_detection_splits(root: Path) -> list[str]:
    """The detection splits that there are lists for, without those of one class.

    Those of the last year; with several years also those of every year, as `VOC2007/trainval`.

    Raises:
        FileNotFoundError: if `root` is not in the VOC layout.
    """
    return _with_years(find_years(root), object_lists)


def voc_splits(root: Path) -> list[str]:
    """The segmentation splits that there are lists for; years as for detection.

    Raises:
        FileNotFoundError: if `root` is not in the VOC layout.
    """
    return _with_years(find_years(root), mask_lists)


def object_lists(folder: Path) -> list[str]:
    """Names of the lists of images with boxes in a year's folder, without those of one class."""
    names = sorted(path.stem for path in (folder / "ImageSets/Main").glob("*.txt"))
    # Not all that begins with a class is such a list: VOC has a class `train`.
    of_one_class = {f"{label}_{name}" for label in read_object_classes(folder) for name in names}
    return [name for name in names if name not in of_one_class]


def mask_lists(folder: Path) -> list[str]:
    """Names of the lists of images with masks in a year's folder."""
    return sorted(path.stem for path in (folder / "ImageSets/Segmentation").glob("*.txt"))


def find_years(root: Path) -> list[Path]:
    """The folders of years (VOC2007, VOC2012), in order; `root` may be one or hold VOCdevkit.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    require_folder(root)
    if (root / "ImageSets").is_dir():
        return [root]
    for devkit in (root, root / "VOCdevkit"):
        years = sorted(path.parent for path in devkit.glob("VOC*/ImageSets"))
        if years:
            return years
    raise FileNotFoundError(
        f"{root}: no VOC layout here; looked for ImageSets/, VOC*/ImageSets/ and "
        "VOCdevkit/VOC*/ImageSets/"
    )


def color_map() -> np.ndarray:
    """VOC's colours: uint8 [256, 3], the RGB of each label, made of the label's bits."""
    labels = np.arange(256, dtype=np.uint8)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (labels >> channel & 1) << (7 - bit)
        labels = labels >> 3
    return colours


def _with_years(years: list[Path], lists: Callable[[Path], list[str]]) -> list[str]:
    """The names of the last year's lists, and of all lists with their year if there are several."""
    names = lists(years[-1])
    if len(years) > 1:
        names += [f"{year.name}/{name}" for year in years for name in lists(year)]
    return names


def _find_lists(root: Path, split: str) -> list[tuple[Path, str]]:
    """The year's folder and the name of each list in a sum.

    Raises:
        FileNotFoundError: if there is no such year.
        ValueError: if a list comes twice.
    """
    years = find_years(root)
    # A year's folder that was given as "." knows its name only when it is made absolute.
    by_name = {year.absolute().name: year for year in years}
    lists = []
    for part in split_parts(split):
        year, slash, name = part.rpartition("/")
        if slash and year not in by_name:
            raise FileNotFoundError(
                f"{root}: no year {year!r} for split {part}; those here are: {', '.join(by_name)}"
            )
        found = (by_name[year] if slash else years[-1], name)
        if found in lists:  # once with its year and once without
            raise ValueError(f"split {split!r}: names {name} of {found[0].name} more than once")
        lists.append(found)
    return lists


def _read_list(folder: Path, path: Path, known: list[str]) -> Iterator[Sample]:
    find = MaskFinder(folder, path.stem)
    for fields in _lines(path, known):
        if len(fields) > 2:
            raise ValueError(f"{path}: wanted an id or two paths a line, got {' '.join(fields)!r}")
        name, image, mask = find(fields)
        if image is None:
            raise FileNotFoundError(
                f"{path}: lists {fields[0]}, which is not in {find.images.path}"
            )
        if mask is None:
            places = " or ".join(str(place.path) for place in find.masks)
            raise FileNotFoundError(f"{path}: lists {fields[-1]}, which has no mask in {places}")
        yield Sample(name, image, mask)


class MaskFinder:
    """Finds the files of an entry in a list of images with masks."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.images = Folder(folder / "JPEGImages")
        self.masks = [Folder(folder / "SegmentationClass")]
        if split == "train_aug":
            self.masks.insert(0, Folder(folder / "SegmentationClassAug"))

    def __call__(self, fields: list[str]) -> tuple[str, Path | None, Path | None]:
        """The name, image and mask of a line with an id or two paths; None for what is absent."""
        if len(fields) == 2:
            image, mask = (_existing(self.folder / field.lstrip("/")) for field in fields)
            return Path(fields[0]).stem, image, mask
        name = fields[0]
        image = self.images.find(f"{name}.jpg", f"{name}.png")
        mask = next(filter(None, (place.find(f"{name}.png") for place in self.masks)), None)
        return name, image, mask


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


def read_classes(folder: Path) -> tuple[str, ...]:
    """The classes of the masks in a year's folder."""
    path = classes_file(folder)
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


def classes_file(folder: Path) -> Path | None:
    """The classes.txt of a year's folder, in it or beside VOCdevkit; VOC itself has none."""
    folder = folder.absolute()  # "." has no parents
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


def read_object_classes(folder: Path) -> tuple[str, ...]:
    """The classes of the boxes in a year's folder."""
    path = classes_file(folder)
    if path is None:
        return VOC_CLASSES[1:]
    names = _read_names(path)
    names = names[1:] if names[0] == "background" else names
    if not names:
        raise ValueError(f"{path}: names no class but the background")
    return names


def _read_annotations(
    folder: Path, path: Path, classes: tuple[str, ...], known: list[str]
) -> tuple[list[Photo], Objects]:
    """The images of a list, whose paths begin above the year's folder, and their objects."""
    images, annotations = Folder(folder / "JPEGImages"), Folder(folder / "Annotations")
    labels = {name: label for label, name in enumerate(classes)}
    photos: dict[str, Photo] = {}
    objects = Objects([], [], [], [])
    for fields in _lines(path, known):
        name = fields[0]
        if not is_object_line(fields):
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
        content = parse_annotation(xml)
        for item in content.iterfind("object"):
            box, label, ignored = read_object(xml, item, labels)
            objects.photos.append(len(photos))
            objects.boxes.append(box)
            objects.labels.append(label)
            objects.ignored.append(ignored)
        size = annotated_size(content) or read_size(image)
        # A folder that was given as "." has no name, and is its own parent.
        photos[name] = Photo(name, str(Path(folder.name, "JPEGImages", image.name)), size)
    return list(photos.values()), objects


def is_object_line(fields: list[str]) -> bool:
    """Whether a line of a list of images with boxes is well formed."""
    return len(fields) <= 2 and fields[1:] in ([], ["1"], ["0"], ["-1"])


def parse_annotation(path: Path) -> Element:
    """The <annotation> of an XML file.

    Raises:
        ValueError: if it is no XML, or something else.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (SyntaxError, ValueError, LookupError) as error:  # the last two: of its encoding
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as XML ({reason})") from error
    if root.tag != "annotation":
        raise ValueError(f"{path}: wanted <annotation> at the top, got <{root.tag}>")
    return root


def annotated_size(content: Element) -> tuple[int, int] | None:
    """Height and width; None where the file does not say, as zeros do not."""
    texts = [content.findtext(f"size/{tag}", "").strip() for tag in ("height", "width")]
    height, width = (int(text) if text.isdecimal() else 0 for text in texts)
    return (height, width) if height and width else None


def read_object(
    path: Path, item: Element, labels: dict[str, int]
) -> tuple[tuple[float, float, float, float], int, bool]:
    """The box (edges), the label and whether it is to be ignored, of one <object> in `path`.

    Raises:
        ValueError: if one of them is malformed, or the class is unknown.
    """
    return _read_box(path, item), _read_label(path, item, labels), _is_difficult(path, item)


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
