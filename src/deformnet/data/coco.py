"""COCO's layout for detection (Lin et al. 2014)."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, final

import torch

from deformnet.data.base import require_folder
from deformnet.data.boxes import DetectionDataset, Objects, Photo
from deformnet.data.files import Folder, read_size
from deformnet.data.splits import Part, require_union, split_parts


@final
class COCODetection(DetectionDataset):
    """Images and boxes in the COCO layout, of COCO itself or of any set written in it.

    ```
    annotations/instances_<split>.json
    annotations/image_info_<split>.json  in its place: images whose objects are not published
    <split>/<file_name>                  the images; or in one of the other places below
    ```

    The images are where the first one that the json file lists is found: in `<split>/`, in
    `<split>/` less what follows its last underscore (`train/` for `train_small`), in `test2017/`
    for `test-dev2017`, in `root` or in `images/`.

    Several splits are joined by `+` (`train2014+val2014`). Crowds are ignored. Outlines (polygons,
    RLE) are not read. Labels count the categories in the order of their ids.

    Attributes:
        annotation_files: the json file of each part.
        image_ids: int64 [n], ids of the images in them.
        category_ids: ids of the classes in them.
    """

    def __init__(self, root: Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, json file (the message says which splits
                exist) or image.
            ValueError: for a json file that is broken, lists no image or contradicts itself, and
                for parts of a sum that differ in their classes or their ids, share an image, or
                have objects in one file alone.
        """
        root = Path(root).expanduser()
        require_folder(root)
        files: list[Path] = []
        photos: list[Photo] = []
        objects = Objects([], [], [], [])
        image_ids: list[int] = []
        parts: list[Part] = []
        ids: list[tuple[int, ...]] = []
        for name in split_parts(split):
            path = annotation_file(root, name)
            content = read_content(path)
            names = unique(path, "categories", content["categories"], "name")
            category_ids = tuple(sorted(names))
            image_files = unique(path, "images", content["images"], "file_name")
            folder = _find_folder(path, root, name, next(iter(image_files.values())))
            added = _photos(path, root, folder, content["images"])
            of_added = _objects(path, content["annotations"], list(image_files), category_ids)
            classes = tuple(names[i] for i in category_ids)
            parts.append(Part(str(path), classes, [photo.name for photo in added]))
            files.append(path)
            ids.append(category_ids)
            objects.extend(of_added, len(photos))
            photos += added
            image_ids += image_files
        require_union(parts)
        _require_one_numbering(files, ids, image_ids)
        has_ground_truth = [not is_image_info(path) for path in files]
        if any(has_ground_truth) and not all(has_ground_truth):
            bare = files[has_ground_truth.index(False)]
            raise ValueError(f"{bare}: has no objects, so it cannot be joined with splits that do")
        super().__init__(
            root,
            root,
            photos,
            objects,
            parts[0].classes,
            transforms,
            has_ground_truth=has_ground_truth[0],
        )
        self.split = split
        self.annotation_files = tuple(files)
        self.image_ids = torch.tensor(image_ids, dtype=torch.int64)
        self.category_ids = ids[0]

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


_INSTANCES, _IMAGE_INFO = "instances_", "image_info_"


def coco_splits(root: Path) -> list[str]:
    """The splits that have a json file of instances, or one of images alone."""
    names = {
        path.stem.removeprefix(prefix)
        for prefix in (_INSTANCES, _IMAGE_INFO)
        for path in (root / "annotations").glob(f"{prefix}*.json")
    }
    return sorted(names)


def annotation_file(root: Path, split: str) -> Path:
    """The json file of a split: of its instances, or else of its images alone.

    Raises:
        FileNotFoundError: if it has neither; the message says which splits there are.
    """
    instances = root / f"annotations/{_INSTANCES}{split}.json"
    image_info = root / f"annotations/{_IMAGE_INFO}{split}.json"
    for path in (instances, image_info):
        if path.is_file():
            return path
    known = ", ".join(coco_splits(root)) or "none"
    raise FileNotFoundError(f"{instances}: no such file; the splits here are: {known}")


def is_image_info(path: Path) -> bool:
    """Whether a json file lists images whose objects are not published."""
    return path.name.startswith(_IMAGE_INFO)


def _require_one_numbering(
    files: Sequence[Path], category_ids: Sequence[tuple[int, ...]], image_ids: Sequence[int]
) -> None:
    """Checks that an id means the same in all files: results give images and classes by id."""
    for path, ids in zip(files, category_ids, strict=True):
        if ids != category_ids[0]:
            raise ValueError(
                f"{path}: gives other ids to the classes than {files[0]}: they cannot be joined"
            )
    if len(set(image_ids)) < len(image_ids):
        names = " and ".join(str(path) for path in files)
        raise ValueError(f"{names}: give one id to several images: they cannot be joined")


def read_content(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists `images`, `annotations` (empty in a file of images alone) and `categories`.

    Raises:
        ValueError: if the file is no json, or lacks one of them.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as json ({reason})") from error
    if is_image_info(path) and isinstance(content, dict):
        content["annotations"] = []
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: wanted a list of objects under {key!r}")
        if not entries and key != "annotations":
            raise ValueError(f"{path}: {key!r} is empty")
    return content


def _without_outlines(entry: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what takes nine tenths of the memory and is not used."""
    entry.pop("segmentation", None)
    return entry


def unique(path: Path, key: str, entries: Sequence[dict], value: str) -> dict[int, str]:
    """The text `value` of every entry by its id.

    Raises:
        ValueError: if an entry lacks one of them, or two share one.
    """
    found: dict[int, str] = {}
    for entry in entries:
        number, text = entry.get("id"), entry.get(value)
        if not _is_integer(number) or not isinstance(text, str):
            raise ValueError(
                f"{path}: {key!r}: wanted an integer 'id' and a text {value!r}, got {number!r} "
                f"and {text!r}"
            )
        if number in found:
            raise ValueError(f"{path}: {key!r}: id {number} more than once")
        found[number] = text
    if len(set(found.values())) < len(found):
        seen: set[str] = set()
        twice = next(text for text in found.values() if text in seen or seen.add(text))
        raise ValueError(f"{path}: {key!r}: {value} {twice!r} more than once")
    return found


def image_folders(root: Path, split: str) -> list[Path]:
    """The folders from which the file names of a split's images may count, the likeliest first."""
    shorter = split.rpartition("_")[0] or split
    # test-dev2017 is a part of test2017.
    places = [split, shorter, split.replace("-dev", ""), "", "images"]
    return list(dict.fromkeys(root / place for place in places))


def _find_folder(path: Path, root: Path, split: str, file: str) -> Path:
    places = image_folders(root, split)
    for place in places:
        if (place / file).is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"{path}: lists {file}, which is in none of {looked}")


def missing_images(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Those of `files`, paths from `folder`, that are not there."""
    folders = {parent: Folder(folder / parent) for parent in {file.parent for file in files}}
    return [file for file in files if folders[file.parent].find(file.name) is None]


def _photos(path: Path, root: Path, folder: Path, entries: Sequence[dict[str, Any]]) -> list[Photo]:
    """The images of a file, with paths from `root`."""
    files = [Path(entry["file_name"]) for entry in entries]
    missing = missing_images(folder, files)
    if missing:
        count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{path}: lists {missing[0]}, which is not in {folder}{count}")
    place = folder.relative_to(root)
    # File names tell people more than ids, as long as they tell the images apart.
    by_stem = len({file.stem for file in files}) == len(files)
    return [
        Photo(
            name=file.stem if by_stem else str(entry["id"]),
            file=str(place / file),
            size=image_size(entry) or read_size(folder / file),
        )
        for entry, file in zip(entries, files, strict=True)
    ]


def image_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of an image's entry; None where it does not say."""
    height, width = entry.get("height"), entry.get("width")
    if _is_integer(height) and _is_integer(width) and height > 0 and width > 0:
        return height, width
    return None


def _objects(
    path: Path,
    entries: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> Objects:
    places = {number: place for place, number in enumerate(image_ids)}
    labels = {number: label for label, number in enumerate(category_ids)}
    objects = Objects([], [], [], [])
    for entry in entries:
        photo, box, label, crowd = read_object(path, entry, places, labels)
        objects.photos.append(photo)
        objects.boxes.append(box)
        objects.labels.append(label)
        objects.ignored.append(crowd)
    return objects


def read_object(
    path: Path, entry: dict[str, Any], places: Mapping[int, int], labels: Mapping[int, int]
) -> tuple[int, tuple[float, float, float, float], int, bool]:
    """The place of its image, box (edges), label and whether it is a crowd, of one annotation.

    Args:
        places: of the images, by id.
        labels: of the categories, by id.
    Raises:
        ValueError: if one of them is malformed or unknown.
    """
    where = f"{path}: annotation {entry.get('id')}"
    image, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
    if not _is_integer(image) or image not in places:
        raise ValueError(f"{where}: is of image {image!r}, which the file does not list")
    if not _is_integer(category) or category not in labels:
        raise ValueError(f"{where}: is of category {category!r}, which the file does not list")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"{where}: bbox: wanted 4 numbers x, y, width, height, got {box!r}")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{where}: iscrowd: wanted 0 or 1, got {crowd!r}")
    x, y, width, height = box
    return places[image], (x, y, x + width, y + height), labels[category], bool(crowd)


def _is_integer(value: object) -> TypeGuard[int]:
    # True and False are ints to Python, and json's ints have no bound.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)
