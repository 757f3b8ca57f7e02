"""COCO's layout for detection (Lin et al. 2014)."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self, TypeGuard, final

import torch

from deformnet._errors import UserError
from deformnet._files import mapped, matching, read_json
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import (
    Folder,
    Orientation,
    inside,
    listing,
    read_size,
    subfolders,
    walk_files,
)
from deformnet.data.items import ImageItem, box_remark, has_area
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.splits import USUAL_SPLITS, Part, require_union, resolve, split_parts

Entry = Mapping[str, object]
"""An object of a JSON file."""

Hook = Callable[[dict[str, object]], dict[str, object]]
"""Changes an object of a JSON file when it is read."""

FILES = "a COCO JSON file, such as annotations/instances_<split>.json"
"""Files by which the layout is recognized, for messages."""

_INSTANCES, _IMAGE_INFO, _KEYPOINTS = "instances_", "image_info_", "person_keypoints_"
_FOLDERS = ("annotations", "annotation", "labels", "json", "jsons")
_ROBOFLOW = "_annotations.coco.json"
_OTHERS = ("captions_", "panoptic_")  # other files that COCO publishes
_UNNAMED = ("default", "_annotations.coco")  # CVAT, Roboflow
_OTHER_FOLDERS = {"train": ("training",), "val": ("valid", "validation", "dev")}
_FEW = 20  # JSON files of a folder, of which all are inspected
_PEEKED = 3


@final
class COCODetection(DetectionDataset):
    """Images and boxes in the COCO layout.

    ```
    annotations/instances_<split>.json
    annotations/image_info_<split>.json  instead, for images without published annotations
    <split>/<file_name>                  images, or in one of the other folders below
    ```

    The JSON files may also be `annotations/<split>.json`, `<split>.json`, or
    `<split>/_annotations.coco.json` next to the images (Roboflow). A file without the name of a
    split, such as `instances_default.json` (CVAT), is `train`.

    Images are read from the folder that contains most of them: `<split>/`, `<split>/` without its
    last underscore and the rest (`train/` for `train_small`), `test2017/` for `test-dev2017`,
    `root`, `images/`, `images/<split>/`, `<split>/images/`, the folder of the JSON file, or any
    other folder.

    Several splits are joined by `+` (`train2014+val2014`). Crowds are ignored; segmentations
    (polygons, RLE) are not read. Labels number the categories in the order of their ids, without
    the parent category that Roboflow adds.

    Attributes:
        annotation_files: JSON file of each part of the split.
        image_ids: int64 [n], ids of the images in these files.
        category_ids: ids of the classes in these files.
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
            FileNotFoundError: if a folder, JSON file (the message lists the splits that exist) or
                image is missing.
            UserError: if a JSON file is malformed, inconsistent, without images, or names images
                outside the data set; or if the parts of a union differ in their classes or ids,
                share an image, or only some of them have published annotations.
        """
        place = locate(root)
        images: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        files: list[COCOFile] = []
        parts: list[Part] = []
        for name in split_parts(split):
            part = find_split(place, name)
            file = COCOFile(part.file)
            found = ImageList(name, file.path)
            add_images(found, file, part)
            found.require()
            for entry in file.annotations:
                index, box, label, crowd = file.parse(entry)
                objects.add(len(images) + index, box, label, crowd)
            names = image_names(file.files)
            for image_name, (path, size) in zip(names, found.singles, strict=True):
                relative = Path(path).relative_to(place.images)
                size = size or read_size(Path(path), orientation=orientation)
                images.append(ImageFile(image_name, str(relative), size))
            files.append(file)
            parts.append(Part(str(file.path), file.classes, names))
        require_union(parts)
        _require_same_ids(files)
        super().__init__(
            *(place.annotations, split, place.images, images, objects),
            *(files[0].classes, transforms),
            has_ground_truth=files[0].has_annotations,
            orientation=orientation,
        )
        self.annotation_files = tuple(file.path for file in files)
        self.image_ids = torch.tensor([i for file in files for i in file.files], dtype=torch.int64)
        self.category_ids = tuple(files[0].categories)

    def subset(self, indices: Sequence[int], split: str) -> Self:
        part = super().subset(indices, split)
        part.image_ids = self.image_ids[list(indices)]
        return part


class COCOSplit(NamedTuple):
    """The file of a split."""

    name: str
    file: Path
    images: Path
    """Folder that contains the images, in one of its subfolders."""


def find_splits(place: DataFiles) -> dict[str, COCOSplit]:
    """The splits of a data set, with their files, sorted.

    Raises:
        UserError: if separate annotations are not a single file.
    """
    if place.are_apart:
        files = _files_apart(place.annotations)
        if len(files) != 1:
            found = listing([file.name for file in files], 5)
            raise UserError(
                f"{place.annotations}: expected one COCO JSON file, but found {found}; pass one"
            )
        return {"train": COCOSplit("train", files[0], place.images)}
    files = _official_files(place.annotations) or _all_files(place.annotations)
    return {
        name: COCOSplit(name, file, place.images)
        for name, file in sorted(_named(files, place.images).items())
    }


def coco_splits(root: Path) -> list[str]:
    """Names of the splits in a folder."""
    return list(find_splits(DataFiles(root, root)))


def find_split(place: DataFiles, name: str) -> COCOSplit:
    """The split with a name.

    Raises:
        FileNotFoundError: if there is none; the message lists the splits that exist.
    """
    splits = find_splits(place)
    part = splits.get(resolve(list(splits), name))
    if part is None:
        file = place.annotations / f"annotations/{_INSTANCES}{name}.json"
        known = listing(list(splits))
        raise FileNotFoundError(f"{file}: no such file; the splits in {place} are: {known}")
    return part


def _files_apart(path: Path) -> list[Path]:
    return [path] if is_coco(path) else _coco_files(path) if path.is_dir() else []


def _official_files(root: Path) -> list[Path]:
    """Files with COCO's names; if two have the same split, the one with annotations."""
    folder = root / "annotations"
    info = sorted(matching(folder, f"{_IMAGE_INFO}*.json"))
    instances = sorted(matching(folder, f"{_INSTANCES}*.json"))
    known = {_rest(path) for path in instances}
    return [*instances, *(path for path in info if _rest(path) not in known)]


def _all_files(root: Path) -> list[Path]:
    folders = subfolders(root)
    files = _coco_files(root)
    for folder in folders:
        if folder.name.lower() in _FOLDERS:
            files += _coco_files(folder)
    for folder in folders:
        if (folder / _ROBOFLOW).is_file():
            files.append(folder / _ROBOFLOW)
        elif folder.name.lower() in USUAL_SPLITS:
            files += _coco_files(folder)[:1]
    return files


def _coco_files(folder: Path) -> list[Path]:
    """COCO files directly in a folder; if there are many, only the first are inspected."""
    paths = sorted(path for path in matching(folder, "*.json") if not path.name.startswith("."))
    if len(paths) > _FEW and not any(map(is_coco, paths[:_PEEKED])):
        return []
    return [path for path in paths if not path.name.startswith(_OTHERS) and is_coco(path)]


def is_coco(path: Path) -> bool:
    """Whether a file looks like a COCO file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    content = mapped(path)
    return content.find(b'"images"') >= 0 and content.find(b'"categories"') >= 0


def _named(files: Sequence[Path], root: Path) -> dict[str, Path]:
    """Files by the names of their splits."""
    if len(files) == 1 and _split_name(files[0], root) is None and not _is_official(files[0]):
        return {"train": files[0]}
    named: dict[str, Path] = {}
    for file in files:
        name = _rest(file) if _is_official(file) else _split_name(file, root) or file.stem
        name = "train" if name in _UNNAMED else name
        if name in named:
            name = file.stem if file.stem not in named else f"{file.parent.name}_{file.stem}"
        named[name] = file
    return named


def _is_official(path: Path) -> bool:
    return path.name.startswith((_INSTANCES, _IMAGE_INFO, _KEYPOINTS))


def _rest(path: Path) -> str:
    """Name of the split in an official name."""
    return re.sub(f"^({_INSTANCES}|{_IMAGE_INFO}|{_KEYPOINTS})", "", path.stem)


def _split_name(path: Path, root: Path) -> str | None:
    """The split in the name of a file or, if there is none, of its folder in `root`."""
    words = [word for word in re.split(r"[_\-. ]+", path.stem) if word.lower() in USUAL_SPLITS]
    if len(words) == 1:
        return words[0]
    is_unnamed = path.name == _ROBOFLOW or path.parent.name.lower() in USUAL_SPLITS
    return path.parent.name if is_unnamed and path.parent != root else None


class COCOFile:
    """The content of a JSON file, validated.

    Attributes:
        path: the file.
        has_annotations: False for a list of images whose annotations are not published.
        files: file names of the images by id.
        sizes: height and width of each image; None if not given.
        categories: names of the categories by id, in the order of the ids, without the parent
            category that Roboflow adds.
        annotations: as stored, without segmentations, or as returned by a hook.
    Raises:
        UserError: if the file is not JSON, lacks one of the lists, or repeats an id or a name.
    """

    def __init__(self, path: Path, hook: Hook | None = None) -> None:
        self.path = path
        self.has_annotations = not path.name.startswith(_IMAGE_INFO)
        content = read_json(path, hook or _without_segmentation)
        images = self._entries(content, "images")
        self.files = self._by_id("images", images, "file_name")
        self.sizes = [_image_size(entry) for entry in images]
        entries = self._entries(content, "categories")
        categories = self._by_id("categories", entries, "name")
        self.annotations = self._entries(content, "annotations") if self.has_annotations else []
        unused = _category_above(entries)
        if unused is not None and all(it.get("category_id") != unused for it in self.annotations):
            del categories[unused]
        self.categories = dict(sorted(categories.items()))
        self._places = {number: place for place, number in enumerate(self.files)}
        self._labels = {number: label for label, number in enumerate(self.categories)}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.categories.values())

    @property
    def has_classes_of_coco(self) -> bool:
        """Whether the categories are COCO's 80, judged by their number, first and last name."""
        classes = self.classes
        return len(classes) == 80 and (classes[0], classes[-1]) == ("person", "toothbrush")

    def parse(self, entry: Entry) -> tuple[int, tuple[float, float, float, float], int, bool]:
        """Index of its image, box (edges), label and whether it is a crowd, of one annotation.

        Raises:
            UserError: if one of them is malformed or unknown.
        """
        where = f"{self.path}: annotation {entry.get('id')}"
        image, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
        if not _is_integer(image) or image not in self._places:
            raise UserError(f"{where}: expected the id of a listed image, but got image {image!r}")
        if not _is_integer(category) or category not in self._labels:
            raise UserError(
                f"{where}: expected the id of a listed category, but got category {category!r}"
            )
        if not _is_box(box):
            raise UserError(
                f"{where}: expected bbox to be 4 numbers x, y, width, height, but got {box!r}"
            )
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise UserError(f"{where}: expected iscrowd to be 0 or 1, but got {crowd!r}")
        x, y, width, height = box
        place, label = self._places[image], self._labels[category]
        return place, (x, y, x + width, y + height), label, bool(crowd)

    def _entries(self, content: object, key: str) -> list[dict[str, object]]:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{self.path}: expected a list of objects under {key!r}")
        if not entries and key != "annotations":
            raise UserError(f"{self.path}: expected entries under {key!r}, but the list is empty")
        return entries

    def _by_id(self, key: str, entries: Sequence[Entry], value: str) -> dict[int, str]:
        """The text `value` of every entry by its id; both must be unique."""
        texts: dict[int, str] = {}
        for entry in entries:
            number, text = entry.get("id"), entry.get(value)
            if not _is_integer(number) or not isinstance(text, str):
                raise UserError(
                    f"{self.path}: {key!r}: expected an integer 'id' and a string {value!r}, "
                    f"but got {number!r} and {text!r}"
                )
            if number in texts:
                raise UserError(f"{self.path}: {key!r}: id {number} occurs more than once")
            texts[number] = text
        for text, following in pairwise(sorted(texts.values())):
            if text == following:
                raise UserError(f"{self.path}: {key!r}: {value} {text!r} occurs more than once")
        return texts


def _without_segmentation(entry: dict[str, object]) -> dict[str, object]:
    """Drops what takes nine tenths of the memory and is not used."""
    entry.pop("segmentation", None)
    return entry


def _category_above(entries: Sequence[Entry]) -> int | None:
    """Id of the category that is the parent of all others, as written by Roboflow."""
    for entry in entries:
        others = [other for other in entries if other is not entry]
        above = {str(other.get("supercategory")) for other in others}
        if entry.get("supercategory") == "none" and above == {entry["name"]}:
            number = entry["id"]
            return number if isinstance(number, int) else None
    return None


def _image_folders(split: COCOSplit) -> list[Path]:
    """Folders to which the file names of a split may be relative, the likeliest first."""
    name = split.name
    shorter = name.rpartition("_")[0] or name
    # test-dev2017 is a part of test2017.
    names = dict.fromkeys(
        [name, shorter, name.replace("-dev", ""), split.file.stem, _rest(split.file)]
    )
    others = [*names, *_OTHER_FOLDERS.get(name, ())]
    places = [*names, "", "images", *(f"images/{other}" for other in others)]
    places += [f"{other}/images" for other in others] + others
    places += ["data", *(f"data/{other}" for other in others), "JPEGImages", "imgs", "img"]
    folders = [split.images / place for place in places]
    beside = split.file.parent
    if beside != split.images and beside.is_relative_to(split.images):
        first = 0 if split.file.name == _ROBOFLOW else len(folders)
        folders[first:first] = [beside, beside / "images"]
    return list(dict.fromkeys(folders))


def add_images(images: ImageList, content: COCOFile, split: COCOSplit) -> None:
    """Adds the images of a file to its list, from the folder that contains most of them.

    Raises:
        UserError: if a file name refers to a path outside the folder.
    """
    files = [_inside(content.path, file) for file in content.files.values()]
    folder, absent = _best_folder(_image_folders(split), files)
    tried = [str(folder)]
    if len(absent) == len(files):
        tried = [str(place) for place in _image_folders(split) if place.is_dir()]
        folder, absent = _best_folder(_folders_with(split.images, files[0]) or [folder], files)
    missing = set(absent)
    images.entries = len(files)
    if missing and len(missing) < len(files):
        tried = [str(folder)]
    images.missing += [Missing("images", tuple(tried), str(file)) for file in absent]
    images.singles += [
        ImageItem(str(folder / file), size)
        for file, size in zip(files, content.sizes, strict=True)
        if file not in missing
    ]


def _best_folder(
    folders: Sequence[Path], files: Sequence[PurePosixPath]
) -> tuple[Path, list[PurePosixPath]]:
    """The first folder with all files, or the one with most of them; and the missing files."""
    best, lacks = folders[0], list(files)
    for folder in folders:
        absent = _missing_images(folder, files)
        if len(absent) < len(lacks):
            best, lacks = folder, absent
        if not absent:
            break
    return best, lacks


def _folders_with(root: Path, file: PurePosixPath) -> list[Path]:
    """All folders below `root` that contain a file."""
    folders = (Path(place) for place, _ in walk_files(root, lambda name: False))
    return [folder for folder in folders if (folder / file).is_file()]


def _inside(path: Path, name: str) -> PurePosixPath:
    try:
        return inside(name)
    except UserError as error:
        raise UserError(f"{path}: file_name: {error}") from error


def _missing_images(folder: Path, files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Those of `files`, paths relative to `folder`, that do not exist."""
    if not folder.is_dir():
        return list(files)
    folders = {parent: Folder(folder / parent) for parent in {file.parent for file in files}}
    return [file for file in files if folders[file.parent].find(file.name) is None]


def _lists(place: DataFiles) -> Iterator[ImageList]:
    root = place.annotations
    for split in find_splits(place).values():
        name = split.file.stem
        if split.file.name == _ROBOFLOW and split.file.parent != root:
            name = split.name
        images = ImageList(name, split.file)
        with images.noting_errors():
            content = COCOFile(split.file)
            images.may_be_official = content.has_classes_of_coco
            add_images(images, content, split)
            images.classes = content.classes if content.has_annotations else ()
            owners: set[int] = set()
            for entry in content.annotations:
                with images.noting_errors():
                    owner, box, label, crowd = content.parse(entry)
                    owners.add(owner)
                    images.counts[label] += not crowd and has_area(box, content.sizes[owner])
                    remark = box_remark(box, content.sizes[owner])
                    if remark:
                        text = f"annotation {entry.get('id')}: box {entry.get('bbox')} {remark}"
                        images.fault(text, is_remark=True)
            images.empty = (images.entries - len(owners)) * content.has_annotations
        yield images


COCO_BOXES = Layout[DetectionDataset](
    name="COCO",
    files=FILES,
    recognizes=lambda root: bool(coco_splits(root)),
    splits=coco_splits,
    lists=_lists,
    open=COCODetection,
    recognizes_files=lambda files: bool(_files_apart(files.annotations)),
)


def image_names(files: Mapping[int, str]) -> list[str]:
    """File names, which tell people more than ids, if they are unique; else the ids."""
    stems = [Path(name).stem for name in files.values()]
    return stems if len(set(stems)) == len(stems) else list(map(str, files))


def _require_same_ids(files: Sequence[COCOFile]) -> None:
    """Checks that an id means the same in all files: results name images and classes by id."""
    for file in files:
        if tuple(file.categories) != tuple(files[0].categories):
            raise UserError(
                f"{file.path}: expected the category ids of {files[0].path} to join both splits, "
                "but got other ids for the same classes"
            )
        if file.has_annotations != files[0].has_annotations:
            bare = next(file.path for file in files if not file.has_annotations)
            raise UserError(f"{bare}: has no annotations; it cannot be joined with splits that do")
    numbers = [number for file in files for number in file.files]
    if len(set(numbers)) < len(numbers):
        names = " and ".join(str(file.path) for file in files)
        raise UserError(f"{names}: give one id to several images; they cannot be joined")


def _image_size(entry: Entry) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    if _is_integer(height) and _is_integer(width) and height > 0 and width > 0:
        return height, width
    return None


def _is_integer(value: object) -> TypeGuard[int]:
    # True and False are ints in Python, and json's ints are not bounded.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_box(value: object) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, float) or _is_integer(number) for number in value)
    )
