"""COCO's layout for detection (Lin et al. 2014)."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, final

import torch

from deformnet.data.base import require_folder
from deformnet.data.boxes import DetectionDataset, Objects, Photo
from deformnet.data.files import Folder, read_size


@final
class COCODetection(DetectionDataset):
    """Images and boxes in the COCO layout, of COCO itself or of any set written in it.

    ```
    annotations/instances_<split>.json
    <split>/<file_name>                 the images; or in one of the other places below
    ```

    The images are where the first one that the json file lists is found: in `<split>/`, in
    `<split>/` less what follows its last underscore (`train/` for `train_small`), in `root` or in
    `images/`.

    Crowds are ignored. Outlines (polygons, RLE) are not read. Labels count the categories in the
    order of their ids.

    Attributes:
        annotation_file: the json file.
        image_ids: int64 [n], ids of the images in it.
        category_ids: ids of the classes in it.
    """

    def __init__(self, root: Path, split: str, transforms: Callable | None = None) -> None:
        """
        Raises:
            FileNotFoundError: for a missing folder, json file (the message says which splits
                exist) or image.
            ValueError: for a json file that is broken, lists no image or contradicts itself.
        """
        root = Path(root).expanduser()
        require_folder(root)
        path = root / f"annotations/instances_{split}.json"
        if not path.is_file():
            known = ", ".join(coco_splits(root)) or "none"
            raise FileNotFoundError(f"{path}: no such file; the splits here are: {known}")
        content = _read(path)
        names = _unique(path, "categories", content["categories"], "name")
        category_ids = tuple(sorted(names))
        image_files = _unique(path, "images", content["images"], "file_name")
        folder = _find_folder(path, root, split, next(iter(image_files.values())))
        photos = _photos(path, folder, content["images"])
        objects = _objects(path, content["annotations"], list(image_files), category_ids)
        classes = tuple(names[i] for i in category_ids)
        super().__init__(root, folder, photos, objects, classes, transforms)
        self.split = split
        self.annotation_file = path
        self.image_ids = torch.tensor(list(image_files), dtype=torch.int64)
        self.category_ids = category_ids

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def coco_splits(root: Path) -> list[str]:
    """The splits that have a json file of instances."""
    names = (path.stem for path in (root / "annotations").glob("instances_*.json"))
    return sorted(name.removeprefix("instances_") for name in names)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError, too
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as json ({reason})") from error
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


def _unique(path: Path, key: str, entries: Sequence[dict], value: str) -> dict[int, str]:
    """The text `value` of every entry by its id."""
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


def _find_folder(path: Path, root: Path, split: str, file: str) -> Path:
    """The folder from which the file names of the images count."""
    shorter = split.rpartition("_")[0] or split
    places = list(dict.fromkeys([root / split, root / shorter, root, root / "images"]))
    for place in places:
        if (place / file).is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(f"{path}: lists {file}, which is in none of {looked}")


def _photos(path: Path, folder: Path, entries: Sequence[dict[str, Any]]) -> list[Photo]:
    files = [Path(entry["file_name"]) for entry in entries]
    folders = {parent: Folder(folder / parent) for parent in {file.parent for file in files}}
    missing = [file for file in files if folders[file.parent].find(file.name) is None]
    if missing:
        count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{path}: lists {missing[0]}, which is not in {folder}{count}")
    # File names tell people more than ids, as long as they tell the images apart.
    by_stem = len({file.stem for file in files}) == len(files)
    return [
        Photo(
            name=file.stem if by_stem else str(entry["id"]),
            file=str(file),
            size=_size(entry) or read_size(folder / file),
        )
        for entry, file in zip(entries, files, strict=True)
    ]


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
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
        objects.photos.append(places[image])
        objects.boxes.append((x, y, x + width, y + height))
        objects.labels.append(labels[category])
        objects.ignored.append(bool(crowd))
    return objects


def _is_integer(value: object) -> TypeGuard[int]:
    # True and False are ints to Python, and json's ints have no bound.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)
