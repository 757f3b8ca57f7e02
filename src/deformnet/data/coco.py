"""COCO's layout for detection (Lin et al. 2014)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard, final

import torch

from deformnet._errors import UserError
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import Folder, listing, read_json, read_size, require_folder
from deformnet.data.items import ImageItem, has_area
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.splits import Part, require_union, split_parts

Entry = Mapping[str, object]
"""An object of a json file."""

Hook = Callable[[dict[str, object]], dict[str, object]]
"""Changes an object of a json file when it is read."""

_INSTANCES, _IMAGE_INFO = "instances_", "image_info_"


@final
class COCODetection(DetectionDataset):
    """Images and boxes in the COCO layout.

    ```
    annotations/instances_<split>.json
    annotations/image_info_<split>.json  instead, for images without published annotations
    <split>/<file_name>                  images, or in one of the other folders below
    ```

    The images are in the folder that has most of them: `<split>/`, `<split>/` without its last
    underscore and what follows (`train/` for `train_small`), `test2017/` for `test-dev2017`, `root`
    or `images/`.

    Several splits are joined by `+` (`train2014+val2014`). Crowds are ignored, segmentations
    (polygons, RLE) not read. Labels number the categories in the order of their ids.

    Attributes:
        annotation_files: json file of each part.
        image_ids: int64 [n], ids of the images in these files.
        category_ids: ids of the classes in these files.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, json file (the message says which splits exist)
                or image.
            UserError: for a json file that is broken, inconsistent or without images, and for parts
                of a union that differ in their classes or ids, share an image, or have published
                annotations only in some.
        """
        root = require_folder(Path(root).expanduser())
        images: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        files: list[COCOFile] = []
        parts: list[Part] = []
        for name in split_parts(split):
            file = COCOFile(annotation_file(root, name))
            found = ImageList(name, file.path)
            add_images(found, file, root, name)
            found.require()
            for entry in file.annotations:
                place, box, label, crowd = file.parse(entry)
                objects.add(len(images) + place, box, label, crowd)
            names = image_names(file.files)
            for image_name, (path, size) in zip(names, found.singles, strict=True):
                place = Path(path).relative_to(root)
                images.append(ImageFile(image_name, str(place), size or read_size(Path(path))))
            files.append(file)
            parts.append(Part(str(file.path), file.classes, names))
        require_union(parts)
        _require_same_ids(files)
        super().__init__(
            *(root, split, root, images, objects, files[0].classes, transforms),
            has_ground_truth=files[0].has_annotations,
        )
        self.annotation_files = tuple(file.path for file in files)
        self.image_ids = torch.tensor([i for file in files for i in file.files], dtype=torch.int64)
        self.category_ids = tuple(files[0].categories)


def coco_splits(root: Path) -> list[str]:
    """Splits with a json file of instances, or of images alone."""
    names = {
        path.stem.removeprefix(prefix)
        for prefix in (_INSTANCES, _IMAGE_INFO)
        for path in (root / "annotations").glob(f"{prefix}*.json")
    }
    return sorted(names)


def annotation_file(root: Path, split: str) -> Path:
    """The json file of a split: of its instances, or else of its images alone.

    Raises:
        FileNotFoundError: if neither exists; the message says which splits do.
    """
    paths = [root / f"annotations/{kind}{split}.json" for kind in (_INSTANCES, _IMAGE_INFO)]
    for path in paths:
        if path.is_file():
            return path
    known = listing(coco_splits(root))
    raise FileNotFoundError(f"{paths[0]}: no such file; the splits in {root} are: {known}")


class COCOFile:
    """The content of a json file, validated.

    Attributes:
        path: the file.
        has_annotations: False for a file of images whose annotations are not published.
        files: file names of the images by id.
        sizes: height and width of each image; None if not given.
        categories: names of the categories by id, in the order of the ids.
        annotations: as stored, without segmentations, or as a hook makes them.
    Raises:
        UserError: if the file is not json, lacks one of the lists, or repeats an id or a name.
    """

    def __init__(self, path: Path, hook: Hook | None = None) -> None:
        self.path = path
        self.has_annotations = not path.name.startswith(_IMAGE_INFO)
        content = read_json(path, hook or _without_segmentation)
        images = self._entries(content, "images")
        self.files = self._by_id("images", images, "file_name")
        self.sizes = [_image_size(entry) for entry in images]
        categories = self._by_id("categories", self._entries(content, "categories"), "name")
        self.categories = dict(sorted(categories.items()))
        self.annotations = self._entries(content, "annotations") if self.has_annotations else []
        self._places = {number: place for place, number in enumerate(self.files)}
        self._labels = {number: label for label, number in enumerate(self.categories)}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.categories.values())

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


def _image_folders(root: Path, split: str) -> list[Path]:
    """Folders to which the file names of a split may be relative, the likeliest first."""
    shorter = split.rpartition("_")[0] or split
    # test-dev2017 is a part of test2017.
    places = [split, shorter, split.replace("-dev", ""), "", "images"]
    return list(dict.fromkeys(root / place for place in places))


def add_images(images: ImageList, content: COCOFile, root: Path, split: str) -> None:
    """Adds the images of a file to its list, from the folder that has most of them."""
    files = [Path(file) for file in content.files.values()]
    folders = _image_folders(root, split)
    absent = {folder: _missing_images(folder, files) for folder in folders}
    folder = min(folders, key=lambda place: len(absent[place]))
    missing = set(absent[folder])
    places = [folder] if len(missing) < len(files) else folders
    images.entries = len(files)
    images.missing += [
        Missing("images", tuple(map(str, places)), str(file)) for file in absent[folder]
    ]
    images.singles += [
        ImageItem(str(folder / file), size)
        for file, size in zip(files, content.sizes, strict=True)
        if file not in missing
    ]


def _missing_images(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Those of `files`, paths relative to `folder`, that do not exist."""
    folders = {parent: Folder(folder / parent) for parent in {file.parent for file in files}}
    return [file for file in files if folders[file.parent].find(file.name) is None]


def _lists(root: Path) -> Iterator[ImageList]:
    for split in coco_splits(root):
        path = annotation_file(root, split)
        images = ImageList(path.stem, path, may_be_official=True)
        with images.noting_errors():
            content = COCOFile(path)
            add_images(images, content, root, split)
            for entry in content.annotations:
                with images.noting_errors():
                    place, box, _, _ = content.parse(entry)
                    if not has_area(box, content.sizes[place]):
                        text = f"annotation {entry.get('id')}: box {entry.get('bbox')} has no area"
                        images.fault(f"{text} inside its image; readers drop it", is_remark=True)
        yield images


COCO_BOXES = Layout[DetectionDataset](
    name="COCO",
    files="annotations/instances_*.json or image_info_*.json",
    recognizes=lambda root: bool(coco_splits(root)),
    splits=coco_splits,
    lists=_lists,
    open=COCODetection,
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
