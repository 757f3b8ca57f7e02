"""Files of the PASCAL VOC layout: years, lists of images, class names and annotations."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from deformnet._errors import UserError
from deformnet._files import (
    MAX_ANNOTATION_BYTES,
    fitting,
    matching,
    read_file,
    read_lines,
    require_file,
)
from deformnet.data.files import first_repeated, listing, require_folder
from deformnet.data.splits import split_parts

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)

YEARS = "VOCdevkit/VOC*/ImageSets/, VOC*/ImageSets/ or ImageSets/"
"""Folders by which the layout is recognized, for messages."""

# Content of the tag <difficult> in files of VOC and of tools that write its format.
_DIFFICULT = {"1": True, "true": True, "0": False, "false": False, "": False, "unspecified": False}

_LARGE = 1e38  # far beyond any image
_PEEKED = 4096  # characters of a list to recognize its kind

# Years.


def voc_years(root: Path) -> list[Path]:
    """Folders of years (VOC2007, VOC2012) in order, possibly none; `root` is one or holds some."""
    if (root / "ImageSets").is_dir():
        return [root]
    for devkit in (root, root / "VOCdevkit"):
        years = sorted(path.parent for path in matching(devkit, "VOC*/ImageSets"))
        if years:
            return years
    return []


def find_years(root: Path) -> list[Path]:
    """Folders of years, at least one.

    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    years = voc_years(require_folder(root))
    if not years:
        raise FileNotFoundError(f"{root}: expected a data set in the VOC layout with {YEARS}")
    return years


def splits_of_years(root: Path, lists: Callable[[Path], list[str]]) -> list[str]:
    """Names of the last year's lists, and of all lists with their year if there are several."""
    years = find_years(root)
    names = lists(years[-1])
    if len(years) > 1:
        names += [f"{year.name}/{name}" for year in years for name in lists(year)]
    return names


# Lists of images.


def box_lists(year: Path) -> list[str]:
    """Names of a year's lists of images with boxes, without lists of one class (`cat_train` next to
    `train`, with 1, 0 or -1 after each image)."""
    names = list_names(year, "Main")
    return [name for name in names if not _is_of_one_class(year, name, names)]


def _is_of_one_class(year: Path, name: str, names: Sequence[str]) -> bool:
    parts = name.split("_")
    ends = ("_".join(parts[i:]) for i in range(1, len(parts)))
    if not any(end in names for end in ends):
        return False
    path = year / f"ImageSets/Main/{name}.txt"
    try:
        require_file(path)
        with path.open(errors="replace") as file:
            lines = [line for line in file.read(_PEEKED).splitlines()[:3] if line.strip()]
    except (UserError, OSError):
        return False  # an error follows when the list is read
    return all(line.split()[-1] in ("1", "0", "-1") and " " in line.strip() for line in lines)


def list_names(year: Path, kind: str) -> list[str]:
    """Names of all lists in a folder of `ImageSets`."""
    return sorted(path.stem for path in matching(year / "ImageSets" / kind, "*.txt"))


def find_lists(root: Path, split: str) -> list[tuple[Path, str]]:
    """Folder of the year and name of each list in a union of splits.

    Raises:
        FileNotFoundError: if a year does not exist.
        UserError: if a list is repeated.
    """
    years = find_years(root)
    # The folder of a year given as "." knows its name only as an absolute path.
    by_name = {year.absolute().name: year for year in years}
    lists: list[tuple[Path, str]] = []
    for part in split_parts(split):
        year, slash, name = part.rpartition("/")
        if slash and year not in by_name:
            raise FileNotFoundError(
                f"{root}: no year {year!r} for split {part}; the years are: {', '.join(by_name)}"
            )
        entry = (by_name[year] if slash else years[-1], name)
        if entry in lists:  # once with its year and once without
            raise UserError(f"split {split!r}: {name} of {entry[0].name} is named more than once")
        lists.append(entry)
    return lists


# Class names.


class ClassList(NamedTuple):
    """Class names and their origin."""

    names: tuple[str, ...]
    file: Path
    """The classes.txt that names them; if there is none, where one would be read."""
    is_default: bool
    """Whether there is no classes.txt: the names are VOC's, or the names in all XML files."""

    @property
    def is_official(self) -> bool:
        """Whether the names are VOC's by default, without a class file."""
        return self.is_default and self.names == VOC_CLASSES[1:]

    @property
    def origin(self) -> str:
        """Where the names come from, for messages."""
        if self.is_default:
            return "of PASCAL VOC" if self.is_official else "in the XML files"
        return f"in {self.file}"

    @property
    def advice(self) -> str:
        """What to do about a missing class, for messages."""
        if self.is_default:
            return f"for other classes, write their names, one per line, to {self.file}"
        return "add the class to that file or correct the annotation"


def read_box_classes(year: Path) -> ClassList:
    """Classes of the boxes of a year: those in classes.txt; without it, VOC's if all objects of all
    years in the folder have them, otherwise the sorted names of the objects."""
    listed = read_class_file(class_folders(year))
    if listed is not None:
        return listed
    place = class_folders(year)[-1]
    beside = voc_years(year.absolute().parent)
    years = beside if year.absolute() in beside else [year]
    names = object_names(path for it in years for path in matching(it / "Annotations", "**/*.xml"))
    classes = VOC_CLASSES[1:]
    if not set(names) <= set(classes):
        classes = tuple(names)
    return ClassList(classes, place / "classes.txt", is_default=True)


def object_names(files: Iterable[Path]) -> list[str]:
    """Sorted names of the objects in XML files. Malformed files are skipped."""
    names: set[str] = set()
    for path in files:
        try:
            content = parse_annotation(path)
        except (ValueError, OSError):
            continue  # reported when it is read as the annotation of an image
        names |= {item.findtext("name", "").strip() for item in content.iterfind("object")}
    return sorted(names - {""})


def class_folders(year: Path) -> list[Path]:
    """Folders that may hold classes.txt, in this order; messages name the last."""
    year = year.absolute()  # "." has no parents
    if year.parent.name == "VOCdevkit":
        return [year, *year.parents[:2]]
    return [year, *(year.parents[:1] if year.name.startswith("VOC") else ())]


def read_class_file(places: Iterable[Path]) -> ClassList | None:
    """Classes in the first classes.txt in the given folders, without the background; None if there
    is no such file."""
    for path in (place / "classes.txt" for place in places):
        if path.is_file():
            names = _read_names(path)
            names = names[names[0] == "background" :]
            if not names:
                raise UserError(f"{path}: expected class names, but found only the background")
            return ClassList(names, path, is_default=False)
    return None


def _read_names(path: Path) -> tuple[str, ...]:
    names = tuple(read_lines(path))
    if not names:
        raise UserError(f"{path}: names no class; write one name per line")
    if repeated := first_repeated(names):
        raise UserError(f"{path}: expected unique class names, but got {repeated!r} more than once")
    return names


# Annotations.


def parse_annotation(path: Path) -> Element:
    """The <annotation> of an XML file.

    Raises:
        UserError: if the file is not XML, or another kind of XML; or if it has a DOCTYPE, in which
            a few bytes can declare gigabytes of text.
    """
    content = read_file(path, MAX_ANNOTATION_BYTES)
    # Zeros: of UTF-16, in which the letters are not next to each other.
    suspicious = b"<!DOCTYPE" in content or b"\0" in content
    try:
        parser = ElementTree.XMLParser(target=_Builder()) if suspicious else None
        with fitting(path):
            root = ElementTree.fromstring(content, parser)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (SyntaxError, ValueError, LookupError) as error:  # the last two: of its encoding
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as XML ({reason})") from error
    if root.tag != "annotation":
        raise UserError(f"{path}: expected <annotation> at the top, but got <{root.tag}>")
    return root


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("expected XML without DOCTYPE and entities, but found one; remove it")


def annotated_size(content: Element) -> tuple[int, int] | None:
    """Height and width; None if absent or zero."""
    texts = [content.findtext(f"size/{tag}", "").strip() for tag in ("height", "width")]
    height, width = (int(text) if text.isdecimal() and len(text) < 10 else 0 for text in texts)
    return (height, width) if height and width else None


def read_object(
    path: Path, item: Element, classes: ClassList
) -> tuple[tuple[float, float, float, float], int, bool]:
    """Box (edges), label, and whether to ignore it, of one <object> in `path`.

    Raises:
        UserError: if one of them is malformed, or the class is unknown.
    """
    box = _read_box(path, item)
    name = item.findtext("name", "").strip()
    if name not in classes.names:
        raise UserError(
            f"{path}: expected an object of one of the classes {classes.origin} "
            f"({listing(classes.names)}), but got class {name!r}; {classes.advice}"
        )
    difficult = item.findtext("difficult", "").strip().lower()
    if difficult not in _DIFFICULT:
        raise UserError(f"{path}: expected difficult to be 0 or 1, but got {difficult!r}")
    return box, classes.names.index(name), _DIFFICULT[difficult]


def _read_box(path: Path, item: Element) -> tuple[float, float, float, float]:
    """Edges, from the first and last pixel counted from 1."""
    tags = ("xmin", "ymin", "xmax", "ymax")
    texts = [item.findtext(f"bndbox/{tag}", "").strip() for tag in tags]
    try:
        x1, y1, x2, y2 = numbers = tuple(map(float, texts))
    except ValueError as error:
        raise UserError(
            f"{path}: expected numbers as {', '.join(tags)} of bndbox, but got {texts}"
        ) from error
    for number, text in zip(numbers, texts, strict=True):
        if abs(number) >= _LARGE and any(map(str.isdecimal, text)):
            shown = text if len(text) <= 20 else f"{text[:20]}... of {len(text)} characters"
            raise UserError(f"{path}: expected numbers in bndbox below 1e38, but got {shown}")
    if (x1, y1) == (x2, y2):
        return x1, y1, x1, y1
    return x1 - 1, y1 - 1, x2, y2


def color_map() -> np.ndarray:
    """VOC's colors: uint8 [256, 3], the RGB of each label, composed from the label's bits."""
    labels = np.arange(256, dtype=np.uint8)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (labels >> channel & 1) << (7 - bit)
        labels = labels >> 3
    return colors
