"""Finding the sets in a folder: their lists of images, and the files that each list wants."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deformnet.data import coco, voc
from deformnet.data.base import IGNORE
from deformnet.data.cityscapes import CITYSCAPES_IDS, cityscapes_splits
from deformnet.data.files import Folder, read_lines
from deformnet.data.check.items import (
    BoxesItem,
    Fault,
    ImageItem,
    Item,
    LabelsItem,
    has_area,
    reason,
)
from deformnet.data.check.official import CITYSCAPES_CITIES, official_count

# Of a folder for each class, as `deformnet.data.image_folder` reads them.
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_SYNSET = re.compile(r"n\d{8}")  # ImageNet's classes


class Missing(NamedTuple):
    """A file that a list wants and that is not there."""

    kind: str
    """Images, annotations or label maps."""
    folder: str
    name: str


@dataclass
class ImageList:
    """A list of images, and what can be said of it without opening the images.

    Attributes:
        name: such as VOC2007/Main/trainval; official lists are known by it.
        source: the file or folder that makes the list.
        entries: how many images it has.
        official: how many the official list of this name has; None if there is none.
        items: what is to be looked at.
        missing: what is not there.
        faults: of the list itself.
        place: the folder below the one that is checked in which the set lies; empty if none.
    """

    name: str
    source: Path
    entries: int = 0
    official: int | None = None
    items: list[Item] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    place: str = ""

    @property
    def title(self) -> str:
        """The name and where it lies."""
        return f"{self.place}/{self.name}" if self.place else self.name

    def fault(self, text: str, *, left_out: bool = False) -> None:
        self.faults.append(Fault(str(self.source), text, left_out))


def _excuse_hidden_labels(one: ImageList) -> None:
    """Takes a test list without any labels as what it is: its server alone has them."""
    absent = [missing for missing in one.missing if missing.kind != "images"]
    if one.name.rpartition("/")[2] == "test" and len(absent) == one.entries > 0:
        one.missing = [missing for missing in one.missing if missing.kind == "images"]
        one.fault(f"has no {absent[0].kind}: test images, to be scored by a server", left_out=True)


def find_lists(root: Path, *, own: bool) -> list[ImageList]:
    """The lists of all sets in a folder, or in the folders in it.

    Args:
        own: they are nobody's official sets, whatever they are called.
    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    found = []
    for place in _places(root):
        for one in _lists_in(place):
            one.place = "" if place == root else str(place.relative_to(root))
            if own:
                one.official = None
            elif one.official is not None and one.entries != one.official:
                one.fault(
                    f"lists {one.entries} images, the official {one.name} has {one.official} "
                    "(a set of your own? check it as such: --own)"
                )
            found.append(one)
    if not found:
        raise FileNotFoundError(
            f"{root}: no data set found, here or one folder below; looked for "
            "VOCdevkit/VOC*/ImageSets/*/*.txt (VOC), annotations/instances_*.json or "
            "image_info_*.json (COCO), leftImg8bit/<split>/<city>/ (Cityscapes) and "
            "train/<class>/*.jpg or *.png (image folder)"
        )
    return found


def _places(root: Path) -> list[Path]:
    """Where sets may lie: in `root`, and in its folders unless all of them belong to one set."""
    if _is_coco(root) or _is_cityscapes(root) or _is_folder(root) or (root / "ImageSets").is_dir():
        return [root]
    years = _years(root)
    known = {*years, *(year.parent for year in years)}
    below = [
        path
        for path in sorted(root.iterdir())
        if path.is_dir()
        and path not in known
        and not path.name.startswith(".")
        and os.access(path, os.R_OK | os.X_OK)  # a disk's lost+found is not
    ]
    return [root, *below]


def _years(place: Path) -> list[Path]:
    """VOC's folders of years; there may be none."""
    try:
        return voc.find_years(place)
    except FileNotFoundError:
        return []


def _lists_in(place: Path) -> Iterator[ImageList]:
    years = _years(place)
    for year in years:
        yield from _voc_lists(year)
    if _is_coco(place):
        for split in coco.coco_splits(place):
            yield _coco_list(place, split)
    if _is_cityscapes(place):
        yield from _cityscapes_lists(place)
    elif not years and not _is_coco(place) and _is_folder(place):
        yield from _folder_lists(place)


def _is_coco(place: Path) -> bool:
    return bool(coco.coco_splits(place))


def _is_cityscapes(place: Path) -> bool:
    return (place / "leftImg8bit").is_dir() or (place / "gtFine").is_dir()


def _is_folder(place: Path) -> bool:
    """Whether it has train/<class>/<image>."""
    return any(_is_image(path) and path.is_file() for path in (place / "train").glob("*/*"))


# VOC.


def _voc_lists(year: Path) -> Iterator[ImageList]:
    # VOC itself has no classes.txt: with one, it is a set of one's own in VOC's layout.
    is_official = voc.classes_file(year) is None
    year_name = year.absolute().name
    images, annotations = Folder(year / "JPEGImages"), Folder(year / "Annotations")
    for kind, names in (("Main", _object_lists(year)), ("Segmentation", voc.mask_lists(year))):
        for name in names:
            path = year / f"ImageSets/{kind}/{name}.txt"
            one = ImageList(f"{year_name}/{kind}/{name}", path)
            one.official = official_count(one.name) if is_official else None
            try:
                lines = [line.split() for line in read_lines(path)]
                if kind == "Main":
                    _add_boxes(one, lines, images, annotations, voc.read_object_classes(year))
                else:
                    finder = voc.MaskFinder(year, name)
                    _add_masks(one, lines, finder, len(voc.read_classes(year)))
                _excuse_hidden_labels(one)
            except (ValueError, OSError) as error:  # the list, or classes.txt
                one.fault(reason(error, path))
            if not one.entries:
                one.fault("is empty")
            yield one


def _object_lists(year: Path) -> list[str]:
    try:
        return voc.object_lists(year)
    except ValueError:  # a bad classes.txt, which every list says when it is read
        return sorted(path.stem for path in (year / "ImageSets/Main").glob("*.txt"))


def _add_boxes(
    one: ImageList,
    lines: Sequence[list[str]],
    images: Folder,
    annotations: Folder,
    classes: tuple[str, ...],
) -> None:
    seen: set[str] = set()
    for fields in lines:
        name = fields[0]
        if not voc.is_object_line(fields):
            one.fault(f"wanted an id, or an id and 1, 0 or -1 a line, got {' '.join(fields)!r}")
            continue
        if name in seen:
            one.fault(f"lists {name} more than once")
            continue
        seen.add(name)
        one.entries += 1
        image = images.find(f"{name}.jpg", f"{name}.png")
        annotation = annotations.find(f"{name}.xml")
        if image is None:
            one.missing.append(Missing("images", str(images.path), f"{name}.jpg"))
        if annotation is None:
            one.missing.append(Missing("annotations", str(annotations.path), f"{name}.xml"))
        if image and annotation:
            one.items.append(BoxesItem(str(image), str(annotation), classes))
        elif image:
            one.items.append(ImageItem(str(image), None))


def _add_masks(
    one: ImageList, lines: Sequence[list[str]], find: voc.MaskFinder, classes: int
) -> None:
    allowed = bytes([*range(classes), IGNORE])
    for fields in lines:
        if len(fields) > 2:
            one.fault(f"wanted an id or two paths a line, got {' '.join(fields)!r}")
            continue
        one.entries += 1
        name, image, mask = find(fields)
        if image is None:
            one.missing.append(Missing("images", str(find.images.path), f"{name}.jpg"))
        if mask is None:
            one.missing.append(Missing("label maps", str(find.masks[0].path), f"{name}.png"))
        if image and mask:
            one.items.append(LabelsItem(str(image), str(mask), allowed))
        elif image:
            one.items.append(ImageItem(str(image), None))


# COCO.


def _coco_list(root: Path, split: str) -> ImageList:
    path = coco.annotation_file(root, split)
    one = ImageList(path.stem, path, official=official_count(path.stem))
    try:
        content = coco.read_content(path)
        files = coco.unique(path, "images", content["images"], "file_name")
        names = coco.unique(path, "categories", content["categories"], "name")
    except (ValueError, OSError) as error:
        one.fault(reason(error, path))
        return one
    one.entries = len(files)
    listed = [Path(file) for file in files.values()]
    # Where most of them are: the reader's first one may be missing.
    absent = {
        folder: coco.missing_images(folder, listed) for folder in coco.image_folders(root, split)
    }
    folder = min(absent, key=lambda place: len(absent[place]))
    missing = set(absent[folder])
    one.missing += [Missing("images", str(folder), str(file)) for file in absent[folder]]
    sizes = [coco.image_size(entry) for entry in content["images"]]
    one.items += [
        ImageItem(str(folder / file), size)
        for file, size in zip(listed, sizes, strict=True)
        if file not in missing
    ]
    places = {number: place for place, number in enumerate(files)}
    labels = {number: label for label, number in enumerate(sorted(names))}
    for entry in content["annotations"]:
        try:
            place, box, _, _ = coco.read_object(path, entry, places, labels)
        except ValueError as error:
            one.fault(reason(error, path))
            continue
        if not has_area(box, sizes[place]):
            text = f"annotation {entry.get('id')}: box {entry['bbox']} has no area inside its image"
            one.fault(f"{text}; readers leave it out", left_out=True)
    return one


# Cityscapes.


def _cityscapes_lists(root: Path) -> Iterator[ImageList]:
    images, labels = root / "leftImg8bit", root / "gtFine"
    allowed = bytes([*CITYSCAPES_IDS, IGNORE])
    splits = {*cityscapes_splits(root), *(path.name for path in labels.glob("*") if path.is_dir())}
    for split in sorted(splits):
        there = _cityscapes_files(images / split, "_leftImg8bit.png")
        labelled = _cityscapes_files(labels / split, "_gtFine_labelIds.png")
        one = ImageList(f"gtFine/{split}", images / split)
        one.entries = len(there.keys() | labelled.keys())
        if {path.parent.name for path in there.values()} & CITYSCAPES_CITIES:
            one.official = official_count(one.name)
        for name in sorted(there.keys() | labelled.keys()):
            city, image, mask = name[0], there.get(name), labelled.get(name)
            if image and mask:
                one.items.append(LabelsItem(str(image), str(mask), allowed))
            elif image:
                file = f"{city}/{name[1]}_gtFine_labelIds.png"
                one.missing.append(Missing("label maps", str(labels / split), file))
                one.items.append(ImageItem(str(image), None))
            else:
                file = f"{city}/{name[1]}_leftImg8bit.png"
                one.missing.append(Missing("images", str(images / split), file))
        if not one.entries:
            one.fault("has no <city>/*_leftImg8bit.png")
        yield one


def _cityscapes_files(folder: Path, ending: str) -> dict[tuple[str, str], Path]:
    """Files by city and name."""
    return {
        (path.parent.name, path.name.removesuffix(ending)): path
        for path in folder.glob(f"*/*{ending}")
    }


# A folder for each class, as ImageNet.


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not path.name.startswith(".")


def _folder_lists(root: Path) -> Iterator[ImageList]:
    known: set[str] | None = None
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            continue
        one = ImageList(split, folder)
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        for path in classes:
            files = [file for file in sorted(path.iterdir()) if _is_image(file)]
            one.items += [ImageItem(str(file), None) for file in files]
            if not files:
                one.faults.append(Fault(str(path), "has no image"))
        one.entries = len(one.items)
        if not classes:
            one.fault("has no folders of classes")
        names = {path.name for path in classes}
        if any(_SYNSET.fullmatch(name) for name in names):
            one.official = official_count(split)
        known = names if known is None else known
        for name in sorted(names - known):
            one.faults.append(Fault(str(folder / name), "is a class that train/ does not have"))
        yield one
