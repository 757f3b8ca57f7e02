"""Folders of images and folders of masks, in common arrangements."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, final

from deformnet.data.base import LabeledImage, MaskFileDataset, SegmentationDataset
from deformnet.data.files import (
    Orientation,
    has_images,
    is_image,
    listing,
    subfolders,
    walk_images,
)
from deformnet.data.items import LabelsItem
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.mask_reader import MaskReader, choose_reader, note_void
from deformnet.data.palette import find_class_file
from deformnet.data.splits import USUAL_SPLITS, Part, require_union, resolve, split_parts
from deformnet.data.voc_files import voc_years

# In lower case, in order of preference.
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "photos", "rgb")
_MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annot"),
    *("segmentationclass", "segmentationclasspng", "segmentations", "segmentation"),
    *("groundtruth", "ground_truth", "gt", "targets", "target"),
)

# Parts of a name that distinguish a mask from its image: a_mask.png, mask-a.png, a_L.png.
_MASK_WORDS = "masks?|labels?|labelids|gt|seg|segmentation|annotations?|annot|groundtruth"
_MASK_SUFFIX = re.compile(rf"(?P<name>.+)[_.\- ](?:{_MASK_WORDS})", re.IGNORECASE)
_LETTER_SUFFIX = re.compile(r"(?P<name>.+)_L")
_MASK_PREFIX = re.compile(rf"(?:{_MASK_WORDS})(?:[_.\- ]|(?=\d))(?P<name>.+)", re.IGNORECASE)
_IMAGE_WORDS = "images?|imgs?|im|rgb|sat|photo"
_IMAGE_SUFFIX = re.compile(rf"(?P<name>.+)[_.\- ](?:{_IMAGE_WORDS})", re.IGNORECASE)
_IMAGE_PREFIX = re.compile(rf"(?:{_IMAGE_WORDS})(?:[_.\- ]|(?=\d))(?P<name>.+)", re.IGNORECASE)

_FILES = "images/ and masks/"


class MaskFolders(NamedTuple):
    """Folders of a split; they may be the same."""

    images: Path
    masks: Path


@final
class FolderSegmentation(MaskFileDataset):
    """Images and masks with the same names, in folders:

    ```
    images/, masks/                          one split, `train`
    images/<split>/, masks/<split>/
    <split>/images/, <split>/masks/
    <split>/, <split>_masks/
    <split>/                                 a.jpg and a_mask.png in one folder
    classes.txt                              or another file of `deformnet.data.palette`
    ```

    Mask folders may also be called labels, annotations, SegmentationClass and so on, and image
    folders JPEGImages, in lower or upper case. Names of masks may have a common suffix or prefix,
    such as `_mask` or `label-`, that the names of images lack. Subfolders are included.

    Masks contain class ids (255 is void), only 0 and 255, or the colors listed in the class file;
    see `deformnet.data.mask_reader.choose_reader`.
    """

    def __init__(
        self,
        root: Location,
        split: str,
        transforms: Callable | None = None,
        *,
        orientation: Orientation = "auto",
    ) -> None:
        """
        Raises:
            FileNotFoundError: if a folder, split (the message lists those that exist) or mask is
                missing.
            UserError: if a split has no images, the class file is malformed, masks contain ids or
                colors without a class, or the parts of a union share an image.
        """
        place = locate(root)
        root = place.annotations
        found, reader = _find(place)
        samples: list[LabeledImage] = []
        parts: list[Part] = []
        for name in split_parts(split):
            part = resolve(list(found), name)
            if part not in found:
                names = listing(list(found))
                raise FileNotFoundError(f"{root}: no split {name!r}; the splits are: {names}")
            images = _list(part, found[part], reader)
            images.require()
            folder = found[part].images
            names = [_sample_name(str(it.relative_to(folder))) for it, _ in images.pairs]
            samples += [
                LabeledImage(name, *files) for name, files in zip(names, images.pairs, strict=True)
            ]
            parts.append(Part(str(images.source), reader.classes, names))
        require_union(parts)
        super().__init__(root, split, samples, reader, transforms, orientation)


def _find(place: DataFiles) -> tuple[dict[str, MaskFolders], MaskReader]:
    """Folders of each split, and the reader of all their masks."""
    root = place.annotations
    if place.are_apart:  # the class file may be next to the masks
        folders = {"train": MaskFolders(place.images, root)}
        return folders, _reader(root.parent, folders)
    folders = find_folders(root)
    return folders, _reader(root, folders)


def find_folders(root: Path) -> dict[str, MaskFolders]:
    """Folders of each split, possibly none, in the first arrangement that fits.

    Folders in `root` are splits only if one has a common split name; they may also be data sets.
    """
    folders = {path.name.lower(): path for path in subfolders(root)}
    pair = _pair_of_folders(folders)
    if pair is not None:
        return _splits_inside(pair) or {"train": pair}
    beside = _named({name: _beside(name, folders) for name in folders})
    return (
        _splits({path.name: _pair_of_folders(_by_name(path)) for path in folders.values()})
        or _splits(beside)
        or ({"train": next(iter(beside.values()))} if len(beside) == 1 else {})
        or _splits({path.name: _single(path) for path in folders.values()})
        or _named({"train": _single(root)})
    )


def _by_name(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in subfolders(folder)}


def _named(splits: Mapping[str, MaskFolders | None]) -> dict[str, MaskFolders]:
    return {name: folders for name, folders in splits.items() if folders is not None}


def _splits(candidates: Mapping[str, MaskFolders | None]) -> dict[str, MaskFolders]:
    found = _named(candidates)
    return found if any(name.lower() in USUAL_SPLITS for name in found) else {}


def _pair_of_folders(folders: Mapping[str, Path]) -> MaskFolders | None:
    """A folder of images and a folder of masks, found by their names and contents."""
    images = next((folders[name] for name in _IMAGE_FOLDERS if name in folders), None)
    if images is None or not has_images(images):
        return None
    masks = (folders[name] for name in _MASK_FOLDERS if name in folders)
    return next((MaskFolders(images, path) for path in masks if has_images(path)), None)


def _splits_inside(pair: MaskFolders) -> dict[str, MaskFolders]:
    """Splits that are subfolders of the image and mask folders."""
    images, masks = map(_by_name, pair)
    names = [name for name in images if name in masks and name in USUAL_SPLITS]
    return {images[name].name: MaskFolders(images[name], masks[name]) for name in names}


def _beside(name: str, folders: Mapping[str, Path]) -> MaskFolders | None:
    """An image folder with a mask folder next to it: train and train_masks."""
    for separator in ("_", "-", ""):
        for kind in _MASK_FOLDERS:
            masks = folders.get(f"{name}{separator}{kind}")
            if masks is not None and has_images(masks) and has_images(folders[name]):
                return MaskFolders(folders[name], masks)
    return None


def _single(folder: Path) -> MaskFolders | None:
    """A folder that contains both images and masks."""
    stems = {path.stem for path in folder.iterdir() if is_image(path.name)}
    masks = (match["name"] for stem in stems if (match := _MASK_SUFFIX.fullmatch(stem)))
    return MaskFolders(folder, folder) if any(name in stems for name in masks) else None


def _reader(root: Path, splits: Mapping[str, MaskFolders]) -> MaskReader:
    """Reader of the masks, the same for all splits."""
    ordered = [splits[name] for name in sorted(splits, key=lambda name: name != "train")]
    inside = (path for folders in ordered for path in (*folders, *(p.parent for p in folders)))
    places = dict.fromkeys([root, *(path for path in inside if path.is_relative_to(root))])
    content = find_class_file(places)
    file = root / "classes.txt" if content is None else content.file
    masks = (folders.masks / mask for folders in ordered for mask in _masks(folders))
    return choose_reader(masks, content, file=file)


def _files(folder: Path) -> list[str]:
    """Paths of images relative to a folder."""
    found: list[str] = []
    for place, names in walk_images(folder):
        inner = os.path.relpath(place, folder)
        prefix = "" if inner == os.curdir else f"{Path(inner).as_posix()}/"
        found += [prefix + name for name in names]
    return found


def _masks(folders: MaskFolders) -> list[str]:
    files = _files(folders.masks)
    if folders.images != folders.masks:
        return files
    return [file for file in files if _MASK_SUFFIX.fullmatch(_name(_stem(file)))]


def _list(name: str, folders: MaskFolders, reader: MaskReader) -> ImageList:
    """The images of a split with their masks."""
    result = ImageList(f"{name} (masks)", folders.images)
    result.classes, result.unit = reader.classes, "pixels"
    result.pair_item = partial(LabelsItem, reader=reader)
    masks = _masks(folders)
    others = set(masks) if folders.images == folders.masks else set()
    images = [file for file in _files(folders.images) if file not in others]
    if not images:
        result.fault("expected images, but found none")
    if reader.note:
        result.fault(reader.note, file=folders.masks, is_remark=True)
    find_mask = _MaskFinder(masks)
    found = {image: find_mask(image) for image in images}
    for image, mask in found.items():
        missing = Missing("masks", (str(folders.masks),), f"{_stem(image)}.png")
        result.add(folders.images / image, missing if mask is None else folders.masks / mask)
    unused = sorted({*masks} - {*found.values()})
    if images and masks and len(unused) == len(masks):
        result.fault(
            f"expected masks with the names of the images, such as NAME.png or NAME_mask.png, but "
            f"found {len(images)} images ({images[0]}, ...) and {len(masks)} masks "
            f"({unused[0]}, ...) with no name in common"
        )
    elif unused:
        text = f"{len(unused)} masks have no image: {listing(unused, 3)}"
        result.fault(text, file=folders.masks, is_remark=True)
    _note_equal_names(result, images)
    return result


class _MaskFinder:
    """Finds the mask of an image by its path, by its path without the suffix or prefix of masks, or
    by its name in any subfolder. Ambiguous names are ignored."""

    def __init__(self, masks: Sequence[str]) -> None:
        """
        Args:
            masks: paths in the mask folder.
        """
        self._exact = {_stem(mask): mask for mask in masks}

    def __call__(self, image: str) -> str | None:
        stem = _stem(image)
        return self._exact.get(stem) or self._similar(image, stem)

    def _similar(self, image: str, stem: str) -> str | None:
        names = [stem, image, _without(stem, _IMAGE_SUFFIX, _IMAGE_PREFIX)]
        names += [_name(name) for name in names]
        found = (level.get(name) for name in names for level in self._levels)
        return next(filter(None, found), None)

    @cached_property
    def _levels(self) -> list[dict[str, str]]:
        """Masks by image name, in order of confidence."""
        stems = self._exact.items()
        suffixed = _unique((_without(s, _MASK_SUFFIX, _LETTER_SUFFIX), mask) for s, mask in stems)
        prefixed = _unique((_without(stem, _MASK_PREFIX), mask) for stem, mask in stems)
        paths = (self._exact, suffixed, prefixed)
        names = [_unique((_name(stem), mask) for stem, mask in it.items()) for it in paths]
        return [*paths, *names]


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _without(stem: str, *patterns: re.Pattern[str]) -> str:
    """A path whose name lacks the suffix or prefix that the first matching pattern removes."""
    name = _name(stem)
    matches = (pattern.fullmatch(name) for pattern in patterns)
    match = next(filter(None, matches), None)
    return stem if match is None else stem.removesuffix(name) + match["name"]


def _unique(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Entries by their names, without names that occur more than once."""
    result: dict[str, str] = {}
    repeated: set[str] = set()
    for name, path in entries:
        if result.setdefault(name, path) != path:
            repeated.add(name)
    return {name: path for name, path in result.items() if name not in repeated}


def _sample_name(image: str) -> str:
    """Name of an image that is valid as a file name: its path with `__` as the separator."""
    return _stem(image).replace("/", "__")


def _note_equal_names(result: ImageList, images: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for image in images:
        other = seen.setdefault(_sample_name(image), image)
        if other != image:
            file = result.source / image
            result.fault(f"expected images with different names, but got {other}", file=file)


def _lists(place: DataFiles) -> Iterator[ImageList]:
    splits, reader = _find(place)
    for name, folders in splits.items():
        images = _list(name, folders, reader)
        note_void(images, reader)
        yield images


def _split_names(root: Path) -> list[str]:
    return sorted(find_folders(root))


def _recognizes(root: Path) -> bool:
    return not voc_years(root) and bool(find_folders(root))


FOLDER_MASKS = Layout[SegmentationDataset](
    name="masks",
    files=_FILES,
    recognizes=_recognizes,
    splits=_split_names,
    lists=_lists,
    open=FolderSegmentation,
    recognizes_files=lambda files: files.annotations.is_dir() and has_images(files.annotations),
)
