"""Data sets in a folder: their lists of images, and the files that each list needs."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deformnet._files import read_lines
from deformnet.data import coco
from deformnet.data import voc_files as voc
from deformnet.data.base import IGNORE
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
from deformnet.data.cityscapes import CITYSCAPES_IDS, CITYSCAPES_MASKS, cityscapes_splits
from deformnet.data.files import Folder
from deformnet.data.image_folder import is_image

_SYNSET = re.compile(r"n\d{8}")  # ImageNet's classes


class Missing(NamedTuple):
    """A file that a list needs and that does not exist."""

    kind: str
    """Images, annotations or label maps."""
    folder: str
    name: str


@dataclass
class ImageList:
    """A list of images, and what can be said about it without opening the images.

    Attributes:
        name: such as VOC2007/Main/trainval, by which official lists are known.
        source: file or folder that makes the list.
        entries: number of its images.
        official: number of images in the official list of this name; None if there is none.
        items: files to check.
        missing: files that do not exist.
        faults: faults of the list itself.
        place: folder of the data set relative to the checked folder; empty for that folder.
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
        """Name with place."""
        return f"{self.place}/{self.name}" if self.place else self.name

    def fault(self, text: str, *, is_remark: bool = False) -> None:
        self.faults.append(Fault(str(self.source), text, is_remark))

    def add(
        self,
        image: Path | None,
        annotation: Path | None,
        missing: tuple[Missing, Missing],
        item: Callable[[str, str], Item],
    ) -> None:
        """Adds an image with its annotation; None for missing files, which `missing` describes."""
        self.entries += 1
        files = zip((image, annotation), missing, strict=True)
        self.missing += [described for file, described in files if file is None]
        if image and annotation:
            self.items.append(item(str(image), str(annotation)))
        elif image:
            self.items.append(ImageItem(str(image), None))

    def require_official_count(self) -> None:
        if self.official is not None and self.entries != self.official:
            self.fault(
                f"expected the {self.official} images of the official {self.name}, but got "
                f"{self.entries}; check a custom data set with --custom"
            )

    def excuse_hidden_labels(self) -> None:
        """Accepts a test list without any labels: only its evaluation server has them."""
        absent = [missing for missing in self.missing if missing.kind != "images"]
        if self.name.rpartition("/")[2] == "test" and len(absent) == self.entries > 0:
            self.missing = [missing for missing in self.missing if missing.kind == "images"]
            text = f"has no {absent[0].kind}: test images, scored by an evaluation server"
            self.fault(text, is_remark=True)


def find_lists(root: Path, *, custom: bool) -> list[ImageList]:
    """Lists of all data sets in a folder, or in its subfolders.

    Args:
        custom: skip the check against official image counts.
    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    lists = []
    for place in _places(root):
        for images in _lists_in(place):
            images.place = "" if place == root else str(place.relative_to(root))
            if custom:
                images.official = None
            images.require_official_count()
            lists.append(images)
    if not lists:
        expected = ", ".join(f"{layout.files} ({layout.name})" for layout in _LAYOUTS)
        raise FileNotFoundError(
            f"{root}: expected a data set here or in a subfolder, but found none of {expected}"
        )
    return lists


def _places(root: Path) -> list[Path]:
    """Folders that may hold data sets: `root`, and its folders unless all belong to one set."""
    years = voc.voc_years(root)
    if years == [root] or any(layout.recognizes(root) for layout in _LAYOUTS[1:]):
        return [root]
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


def _lists_in(place: Path) -> Iterator[ImageList]:
    *with_files, by_class = _LAYOUTS
    recognized = [layout for layout in with_files if layout.recognizes(place)]
    for layout in recognized or [by_class] * by_class.recognizes(place):
        yield from layout.lists(place)


# VOC.


def _voc_lists(root: Path) -> Iterator[ImageList]:
    for year in voc.voc_years(root):
        for kind, names, add in (
            ("Main", _box_lists(year), _add_boxes),
            ("Segmentation", voc.mask_lists(year), _add_masks),
        ):
            for name in names:
                yield _voc_list(year, kind, name, add)


def _voc_list(
    year: Path, kind: str, name: str, add: Callable[[ImageList, list[list[str]], Path], None]
) -> ImageList:
    path = year / f"ImageSets/{kind}/{name}.txt"
    images = ImageList(f"{year.absolute().name}/{kind}/{name}", path)
    try:
        # A data set with class names of its own is not the official one.
        if voc.read_class_list(year).is_default:
            images.official = official_count(images.name)
        add(images, [line.split() for line in read_lines(path)], year)
        images.excuse_hidden_labels()
    except (ValueError, OSError) as error:  # the list, or classes.txt
        images.fault(reason(error, path))
    if not images.entries:
        images.fault("is empty")
    return images


def _box_lists(year: Path) -> list[str]:
    try:
        return voc.box_lists(year)
    except ValueError:  # a bad classes.txt, reported for every list
        return voc.list_names(year, "Main")


def _add_boxes(images: ImageList, lines: Sequence[list[str]], year: Path) -> None:
    find, annotations = voc.ImageFinder(year), Folder(year / "Annotations")
    classes = voc.read_box_classes(year)
    seen: set[str] = set()
    for fields in lines:
        name = fields[0]
        if not voc.BOX_LINE.fits(fields):
            images.fault(voc.BOX_LINE.error(fields))
            continue
        if name in seen:
            images.fault(f"lists {name} more than once")
            continue
        seen.add(name)
        missing = (
            Missing("images", str(find.folder.path), f"{name}.jpg"),
            Missing("annotations", str(annotations.path), f"{name}.xml"),
        )
        images.add(
            find(name),
            annotations.find(f"{name}.xml"),
            missing,
            lambda image, annotation: BoxesItem(image, annotation, classes),
        )


def _add_masks(images: ImageList, lines: Sequence[list[str]], year: Path) -> None:
    find = voc.MaskFinder(year, images.source.stem)
    allowed = bytes([*range(len(voc.read_mask_classes(year).names)), IGNORE])
    for fields in lines:
        if not voc.MASK_LINE.fits(fields):
            images.fault(voc.MASK_LINE.error(fields))
            continue
        name, image, mask = find(fields)
        missing = (
            Missing("images", str(find.images.folder.path), f"{name}.jpg"),
            Missing("label maps", str(find.masks[0].path), f"{name}.png"),
        )
        images.add(image, mask, missing, lambda image, mask: LabelsItem(image, mask, allowed))


# COCO.


def _coco_lists(root: Path) -> Iterator[ImageList]:
    for split in coco.coco_splits(root):
        path = coco.annotation_file(root, split)
        images = ImageList(path.stem, path, official=official_count(path.stem))
        try:
            _add_coco(images, coco.COCOFile(path), root, split)
        except (ValueError, OSError) as error:
            images.fault(reason(error, path))
        yield images


def _add_coco(images: ImageList, content: coco.COCOFile, root: Path, split: str) -> None:
    images.entries = len(content.files)
    files = [Path(file) for file in content.files.values()]
    # The folder with most of them: the first image, by which the reader decides, may be missing.
    absent = {
        folder: coco.missing_images(folder, files) for folder in coco.image_folders(root, split)
    }
    folder = min(absent, key=lambda place: len(absent[place]))
    missing = set(absent[folder])
    images.missing += [Missing("images", str(folder), str(file)) for file in absent[folder]]
    images.items += [
        ImageItem(str(folder / file), size)
        for file, size in zip(files, content.sizes, strict=True)
        if file not in missing
    ]
    for entry in content.annotations:
        try:
            place, box, _, _ = content.parse(entry)
        except ValueError as error:
            images.fault(reason(error, content.path))
            continue
        if not has_area(box, content.sizes[place]):
            text = f"annotation {entry.get('id')}: box {entry.get('bbox')} has no area inside its"
            images.fault(f"{text} image; readers drop it", is_remark=True)


# Cityscapes.


def _is_cityscapes(root: Path) -> bool:
    return (root / "leftImg8bit").is_dir() or (root / "gtFine").is_dir()


def _cityscapes_lists(root: Path) -> Iterator[ImageList]:
    images, labels = root / "leftImg8bit", root / "gtFine"
    splits = {*cityscapes_splits(root), *(path.name for path in labels.glob("*") if path.is_dir())}
    for split in sorted(splits):
        yield _cityscapes_list(images / split, labels / split)


def _cityscapes_list(images: Path, labels: Path) -> ImageList:
    allowed = bytes([*CITYSCAPES_IDS, IGNORE])
    existing = _cityscapes_files(images, "_leftImg8bit.png")
    labeled = _cityscapes_files(labels, "_gtFine_labelIds.png")
    listed = ImageList(f"gtFine/{images.name}", images)
    if {path.parent.name for path in existing.values()} & CITYSCAPES_CITIES:
        listed.official = official_count(listed.name)
    for key in sorted(existing.keys() | labeled.keys()):
        name = "/".join(key)
        missing = (
            Missing("images", str(images), f"{name}_leftImg8bit.png"),
            Missing("label maps", str(labels), f"{name}_gtFine_labelIds.png"),
        )
        listed.add(
            existing.get(key),
            labeled.get(key),
            missing,
            lambda image, mask: LabelsItem(image, mask, allowed),
        )
    if not listed.entries:
        listed.fault("has no <city>/*_leftImg8bit.png")
    return listed


def _cityscapes_files(folder: Path, ending: str) -> dict[tuple[str, str], Path]:
    """Files by city and name."""
    return {
        (path.parent.name, path.name.removesuffix(ending)): path
        for path in folder.glob(f"*/*{ending}")
    }


# A folder for each class, as ImageNet.


def _is_image_folder(root: Path) -> bool:
    return any(is_image(path) and path.is_file() for path in (root / "train").glob("*/*"))


def _image_folder_lists(root: Path) -> Iterator[ImageList]:
    known: set[str] | None = None
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            continue
        images = ImageList(split, folder)
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        for path in classes:
            files = [file for file in sorted(path.iterdir()) if is_image(file)]
            images.items += [ImageItem(str(file), None) for file in files]
            if not files:
                images.faults.append(Fault(str(path), "has no image"))
        images.entries = len(images.items)
        if not classes:
            images.fault("has no folders of classes")
        names = {path.name for path in classes}
        if any(_SYNSET.fullmatch(name) for name in names):
            images.official = official_count(split)
        known = names if known is None else known
        for name in sorted(names - known):
            images.faults.append(Fault(str(folder / name), "is a class that train/ does not have"))
        yield images


class _Layout(NamedTuple):
    """A layout whose lists of images can be checked."""

    name: str
    files: str
    """Files by which it is recognized, for messages."""
    recognizes: Callable[[Path], bool]
    lists: Callable[[Path], Iterator[ImageList]]


# VOC comes first, as other data sets may lie beside its years, and the folders of classes last, as
# only a folder of no other layout is read that way.
_LAYOUTS = (
    _Layout("VOC", voc.YEARS, lambda root: bool(voc.voc_years(root)), _voc_lists),
    _Layout("COCO", coco.COCO_BOXES.files, coco.COCO_BOXES.recognizes, _coco_lists),
    _Layout("Cityscapes", CITYSCAPES_MASKS.files, _is_cityscapes, _cityscapes_lists),
    _Layout("image folder", "train/<class>/*.jpg", _is_image_folder, _image_folder_lists),
)
