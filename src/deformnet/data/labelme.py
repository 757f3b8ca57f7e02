"""The layout of labelme for detection and segmentation: one JSON file per image."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, final

import numpy as np
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import mapped, matching, read_json, read_lines
from deformnet.data.base import IGNORE, LabeledImage, SegmentationDataset
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import (
    MAX_PIXELS,
    Orientation,
    Size,
    image_names,
    is_image,
    listing,
    read_png,
    read_size,
    walk_images,
)
from deformnet.data.items import (
    Fault,
    Findings,
    box_remark,
    check_image,
    has_area,
    reason,
    unreadable,
)
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.polygons import BACKGROUND, Region, Stamp, draw, with_background
from deformnet.data.splits import Part, require_union, resolve, split_parts

_JSON_FOLDERS = ("annotations", "Annotations", "labels", "json", "jsons", "labelme")
_IMAGE_FOLDERS = ("images", "Images", "JPEGImages", "imgs")
_NAMES = ("classes.txt", "labels.txt")
# Special labels in labelme's labels.txt.
_IGNORED, _BACKGROUNDS = "__ignore__", ("_background_", BACKGROUND)

_LINES = ("point", "points", "line", "linestrip")
_PEEKED = 3  # JSON files of a folder that are inspected to recognize the layout
_CIRCLE = 72  # corners of the polygon of a circle


class LabelmeClasses(NamedTuple):
    """Names of the object classes, without the background."""

    names: tuple[str, ...]
    origin: str
    """Source of the names, for messages."""


class LabelmeObject(NamedTuple):
    """One object: a shape, or several with the same label and group."""

    number: int
    """Number of its first shape, counted from 1."""
    label: str
    ignored: bool
    polygons: list[np.ndarray]
    stamps: list[Stamp]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Edges."""
        points = np.concatenate([*self.polygons, *map(_corners, self.stamps)])
        (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
        return x1, y1, x2, y2


class LabelmeFile:
    """The content of a JSON file.

    Attributes:
        path: the file.
        image_path: path of the image as stored; often from another machine, or an older name.
        size: height and width; None if not given.
        objects: the objects, in the order of their first shapes.
        skipped: number of points and lines, which have no area.
    Raises:
        UserError: if the file is not a labelme file, or a shape is malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_json(path, _without_image)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise UserError(f"{path}: expected a labelme JSON file with a list of shapes")
        self.image_path = str(content.get("imagePath") or "")
        self.size = _size(content.get("imageHeight"), content.get("imageWidth"))
        self.skipped = 0
        self.objects: list[LabelmeObject] = []
        pixels = 0
        groups: dict[tuple[str, str], LabelmeObject] = {}
        for number, shape in enumerate(content["shapes"], start=1):
            item = self._parse(number, shape)
            if item is None:
                self.skipped += 1
                continue
            pixels += sum(stamp.mask.size for stamp in item.stamps)
            if pixels > MAX_PIXELS:
                raise UserError(
                    f"{path}: shape {number}: expected at most {MAX_PIXELS} pixels in total in the "
                    "masks of the file, but got more; crop the masks to their objects"
                )
            group = shape.get("group_id")
            key = (item.label, str(number) if group is None else f"group {group}")
            if key in groups:
                groups[key].polygons.extend(item.polygons)
                groups[key].stamps.extend(item.stamps)
            else:
                groups[key] = item
                self.objects.append(item)

    def _parse(self, number: int, shape: object) -> LabelmeObject | None:
        """The object of a shape; None for points and lines."""
        where = f"{self.path}: shape {number}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise UserError(f"{where}: expected a shape with a label")
        kind = shape.get("shape_type") or "polygon"
        if kind in _LINES:
            return None
        points = _points(where, shape.get("points"))
        polygons, stamps = [], []
        if kind == "mask":
            stamps.append(_read_mask(where, points, shape.get("mask")))
        else:
            polygons.append(_polygon(where, kind, points))
        return LabelmeObject(number, shape["label"], bool(shape.get("difficult")), polygons, stamps)


@final
class LabelmeDetection(DetectionDataset):
    """Images and boxes of labelme.

    ```
    classes.txt (labels.txt)     optional
    <any name>.json              next to the images, or in annotations/, labels/ or json/
    <any name>.jpg               or in images/
    ```

    or the same in a folder for each split. Without such folders, all images are `train`. Several
    splits are joined by `+`.

    Rectangles, polygons, circles, rotated boxes and masks are objects; shapes with the same label
    and `group_id` are one object. Points and lines, which have no area, and shapes labeled
    `__ignore__` or `_background_` are skipped. Objects marked as difficult by X-AnyLabeling are
    ignored.

    The image has the name of its JSON file or, if there is none, the name in `imagePath`.
    `imageData` is not used. Without classes.txt, the classes are the sorted labels of all splits.
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
            FileNotFoundError: if a folder, split (the message lists those that exist) or image is
                missing.
            UserError: if a JSON file is malformed, classes.txt lacks a label, or the parts of a
                union share an image.
        """
        place = locate(root)
        classes = read_classes(place)
        files: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        for name, image, path in _read_union(place, split, classes):
            content = LabelmeFile(path)
            for item in content.objects:
                label = label_of(path, item, classes)
                if label is not None:
                    objects.add(len(files), item.box, label, item.ignored)
            size = content.size or read_size(image, orientation=orientation)
            files.append(ImageFile(name, str(image.relative_to(place.images)), size))
        super().__init__(
            *(place.annotations, split, place.images, files, objects, classes.names, transforms),
            orientation=orientation,
        )


@final
class LabelmeSegmentation(SegmentationDataset):
    """Images with label maps drawn from labelme's shapes.

    See `LabelmeDetection` for files and shapes; the JSON file is read again with its sample. Label
    0 is the background; the classes follow from 1. Later shapes are drawn over earlier ones;
    ignored shapes and shapes labeled `__ignore__` are void.
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
            FileNotFoundError, UserError: see `LabelmeDetection`.
        """
        place = locate(root)
        self._object_classes = read_classes(place)
        classes = with_background(self._object_classes.names, self._object_classes.origin)
        samples = [LabeledImage(*row) for row in _read_union(place, split, self._object_classes)]
        super().__init__(place.annotations, split, samples, classes, transforms, orientation)

    def annotated_size(self, index: int) -> Size | None:
        return LabelmeFile(self.samples[index].labels).size

    def labels(self, index: int, size: Size) -> Tensor:
        path = self.samples[index].labels
        content = LabelmeFile(path)
        self._require_size(index, size, content.size)
        regions = []
        for item in content.objects:
            label = label_of(path, item, self._object_classes)
            background = 0 if item.label in _BACKGROUNDS else IGNORE
            value = background if label is None or item.ignored else label + 1
            regions.append(Region(value, item.polygons, item.stamps))
        return draw(size, regions)


class LabelmeItem(NamedTuple):
    """An image and its JSON file."""

    image: str
    annotation: str
    classes: LabelmeClasses

    def check(self) -> Findings:
        path = Path(self.annotation)
        counts: Counter[int] = Counter()
        try:
            content = LabelmeFile(path)
        except (ValueError, OSError) as error:
            return unreadable(self.image, path, error)
        size, faults = check_image(self.image, content.size)
        for item in content.objects:
            try:
                label = label_of(path, item, self.classes)
            except ValueError as error:
                faults.append(Fault(self.annotation, reason(error, path)))
                continue
            if label is not None:
                counts[label] += not item.ignored and has_area(item.box, size)
            remark = box_remark(item.box, size)
            if remark:
                text = f"shape {item.number} {remark}"
                faults.append(Fault(self.annotation, text, is_remark=True))
        if content.skipped:
            text = f"{content.skipped} points or lines have no area; readers skip them"
            faults.append(Fault(self.annotation, text, is_remark=True))
        stored = PureWindowsPath(content.image_path).name
        if stored != Path(self.image).name:
            text = f"imagePath is {stored!r}; readers use {Path(self.image).name} by its name"
            faults.append(Fault(self.annotation, text, is_remark=True))
        return Findings(faults, counts)


# Classes.


def read_classes(place: DataFiles, *, strict: bool = True) -> LabelmeClasses:
    """Classes in classes.txt or labels.txt or, without them, the sorted labels of all splits.

    Args:
        strict: if False, malformed JSON files are skipped.
    Raises:
        UserError: if there are none, or a JSON file is malformed.
    """
    root = place.annotations
    path = next((root / name for name in _NAMES if (root / name).is_file()), None)
    if path is None:
        files = (file for folder in _splits(place).values() for file in _json_files(folder))
        names = sorted({label for file in files for label in _labels(file, strict)})
    else:
        names = read_lines(path)
    names = [name for name in names if name not in (_IGNORED, *_BACKGROUNDS)]
    if not names:
        raise UserError(f"{path or root}: expected labels of objects, but found none")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected unique class names, but got one more than once")
    return LabelmeClasses(tuple(names), f"in {path or root}")


def _labels(path: Path, strict: bool) -> set[str]:
    try:
        return {item.label for item in LabelmeFile(path).objects}
    except (UserError, OSError):
        if strict:
            raise
        return set()


def label_of(path: Path, item: LabelmeObject, classes: LabelmeClasses) -> int | None:
    """Index of the class of an object; None for the background and objects without a class.

    Raises:
        UserError: if the class is unknown.
    """
    if item.label in classes.names:
        return classes.names.index(item.label)
    if item.label in (_IGNORED, *_BACKGROUNDS):
        return None
    raise UserError(
        f"{path}: shape {item.number}: expected one of the labels {classes.origin} "
        f"({listing(classes.names, 5)}), but got {item.label!r}; add it to that file or correct "
        "the label"
    )


# Files.


def labelme_splits(root: Path) -> list[str]:
    """Folders with labelme JSON files; `train` for files in `root` itself."""
    return list(_splits(DataFiles(root, root)))


def _splits(place: DataFiles) -> dict[str, Path]:
    """Folder of the JSON files of each split."""
    root = place.annotations
    if place.are_apart:
        return {"train": root} if root.is_dir() and has_shapes(root) else {}
    places = [root, *(root / name for name in _JSON_FOLDERS if (root / name).is_dir())]
    splits: dict[str, Path] = {}
    for base in places:
        if has_shapes(base):
            splits.setdefault("train", base)
        for folder in sorted(matching(base, "*/")):
            own = folder.name.startswith(".") or folder.name in _JSON_FOLDERS
            below = [folder, *(folder / name for name in _JSON_FOLDERS)]
            found = None if own else next(filter(has_shapes, below), None)
            if found:
                splits.setdefault(folder.name, found)
    return splits


def has_shapes(folder: Path) -> bool:
    """Whether the first JSON files of a folder are labelme's."""
    return any(_is_labelme(path) for path in islice(_json_files(folder), _PEEKED))


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in matching(folder, "*.json") if not path.name.startswith("."))


def _is_labelme(path: Path) -> bool:
    if not path.is_file():
        return False
    content = mapped(path)
    return content.find(b'"shapes"') >= 0 and content.find(b'"imagePath"') >= 0


def _read_union(
    place: DataFiles, split: str, classes: LabelmeClasses
) -> Iterator[tuple[str, Path, Path]]:
    """Name, image and JSON file of each image in a union of splits."""
    splits = _splits(place)
    parts: list[Part] = []
    rows: list[tuple[str, Path, Path]] = []
    for name in split_parts(split):
        part = resolve(list(splits), name)
        if part not in splits:
            known = listing(list(splits))
            raise FileNotFoundError(f"{place}: no split {name!r}; the splits are: {known}")
        images = _fill(place, part, splits[part], classes)
        images.require()
        names = image_names([image.relative_to(place.images) for image, _ in images.pairs])
        rows += [(name, *pair) for name, pair in zip(names, images.pairs, strict=True)]
        parts.append(Part(str(images.source), classes.names, names))
    require_union(parts)
    return iter(rows)


def _fill(place: DataFiles, name: str, folder: Path, classes: LabelmeClasses) -> ImageList:
    """The images of a split with their JSON files."""
    images = ImageList(name, folder, classes=classes.names)
    images.pair_item = partial(LabelmeItem, classes=classes)
    places = [_ImageFolder(place) for place in _image_folders(place, folder)]
    owners: dict[Path, Path] = {}
    for path in _json_files(folder):
        image = next(filter(None, (place.named(path.stem) for place in places)), None)
        if image is None:
            stored = PureWindowsPath(LabelmeFile(path).image_path).name
            image = next(filter(None, (place.file(stored) for place in places)), None)
        if image is None:
            tried = tuple(str(place.path) for place in places[:2])
            images.add(Missing("images", tried, f"{path.stem}.jpg"), path)
        elif image in owners:
            images.fault(f"image {image.name} is also annotated by {owners[image].name}", file=path)
        else:
            owners[image] = path
            images.add(image, path)
    unlabeled = len({file for place in places[:2] for file in place.files} - {*owners})
    if unlabeled:
        text = f"{unlabeled} images have no JSON file; they are not read"
        images.fault(text, is_remark=True)
    return images


def _image_folders(place: DataFiles, folder: Path) -> list[Path]:
    """Folders that may contain the images of JSON files, in order of preference."""
    root = place.annotations
    if place.are_apart:
        return [Path(inner) for inner, _ in walk_images(place.images)]
    parts = folder.relative_to(root).parts
    places = [folder]
    if parts and parts[0] in _JSON_FOLDERS:  # annotations/train: images/train
        places += [root.joinpath(name, *parts[1:]) for name in _IMAGE_FOLDERS]
    places += [folder / name for name in _IMAGE_FOLDERS]
    if parts:
        places += [folder.parent / name for name in ("", *_IMAGE_FOLDERS)]
    return [place for place in dict.fromkeys(places) if place == folder or place.is_dir()]


class _ImageFolder:
    """Images in a folder by their stems, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
        self._names = {name for name in names if is_image(name)}
        self._stems = {Path(name).stem: name for name in names if name in self._names}

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in self._names]

    def named(self, stem: str) -> Path | None:
        """The image with this stem."""
        return self.path / self._stems[stem] if stem in self._stems else None

    def file(self, name: str) -> Path | None:
        """The image with this name."""
        return self.path / name if name in self._names else None


def _lists(place: DataFiles) -> Iterator[ImageList]:
    for name, folder in _splits(place).items():
        failed = ImageList(name, folder)
        with failed.noting_errors():
            yield _fill(place, name, folder, read_classes(place, strict=False))
        if failed.faults:
            yield failed


# Shapes.


def _without_image(entry: dict[str, object]) -> dict[str, object]:
    """Drops the copy of the image that labelme stores."""
    entry.pop("imageData", None)
    return entry


def _size(height: object, width: object) -> Size | None:
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return (height, width) if max(height, width) < 2**31 else None
    return None


def _points(where: str, value: object) -> np.ndarray:
    """Corners, float [n, 2]."""
    try:
        points = np.array(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[-1] != 2 or not np.isfinite(points).all():
        raise UserError(f"{where}: expected points to be a list of [x, y], but got something else")
    return points


def _polygon(where: str, kind: object, points: np.ndarray) -> np.ndarray:
    """The outline of a shape."""
    count = len(points)
    if kind == "rectangle" and count in (2, 4):  # two opposite corners, or all
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    if kind == "circle" and count == 2:  # the center and a point of the circle
        angles = np.arange(_CIRCLE) * (2 * np.pi / _CIRCLE)
        offsets = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return points[0] + np.linalg.norm(points[1] - points[0]) * offsets
    if kind in ("polygon", "rotation") and count >= 3:
        return points
    if kind not in ("rectangle", "circle", "polygon", "rotation"):
        raise UserError(f"{where}: expected a rectangle, polygon, circle or mask, but got {kind!r}")
    raise UserError(f"{where}: expected the points of a {kind}, but got {count} points")


def _corners(stamp: Stamp) -> np.ndarray:
    """First and last corner of the foreground of a mask; of the whole mask if it is empty."""
    rows, columns = np.flatnonzero(stamp.mask.any(1)), np.flatnonzero(stamp.mask.any(0))
    if not len(rows):
        return np.array([(stamp.x, stamp.y), (stamp.x, stamp.y)])
    edges = [(columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)]
    return np.add(edges, (stamp.x, stamp.y))


def _read_mask(where: str, points: np.ndarray, value: object) -> Stamp:
    """The mask of a shape: a PNG in base64, placed at its first point."""
    try:
        data = base64.b64decode(value if isinstance(value, str) else "", validate=True)
    except ValueError:
        raise UserError(f"{where}: expected a mask as PNG in base64, but got none") from None
    mask = read_png(data, f"{where}: mask") > 0
    x, y = points.min(0).clip(-(2**31), 2**31).round().astype(int).tolist()
    return Stamp(x, y, mask)


LABELME_BOXES = Layout[DetectionDataset](
    name="labelme",
    files="<image>.json with shapes",
    recognizes=lambda root: bool(labelme_splits(root)),
    splits=labelme_splits,
    lists=_lists,
    open=LabelmeDetection,
    recognizes_files=lambda files: bool(_splits(files)),
)
LABELME_MASKS = Layout[SegmentationDataset](
    name="labelme",
    files="<image>.json with shapes",
    recognizes=LABELME_BOXES.recognizes,
    splits=labelme_splits,
    lists=lambda place: iter(()),  # same as the lists with boxes, which read all shapes
    open=LabelmeSegmentation,
    recognizes_files=LABELME_BOXES.recognizes_files,
)
