"""The YOLO layout (darknet, ultralytics) for detection and segmentation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, final

from torch import Tensor

from deformnet._errors import UserError
from deformnet.data.base import LabeledImage, SegmentationDataset
from deformnet.data.boxes import DetectionDataset, ImageFile, ObjectList
from deformnet.data.files import (
    Folder,
    Orientation,
    find_images,
    image_names,
    listing,
    read_size,
    walk_files,
)
from deformnet.data.items import Fault, Findings, ImageItem, check_image, has_area, reason
from deformnet.data.layouts import ImageList, Layout, Missing
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.polygons import Region, draw, with_background
from deformnet.data.splits import Part, require_union, resolve, split_parts
from deformnet.data.yolo_files import (
    FILES,
    YOLOClasses,
    YOLOObject,
    find_splits,
    has_labels,
    is_label,
    listed_images,
    names_classes,
    parse_line,
    read_classes,
    read_labels,
    read_objects,
)

_SAMPLED = 100  # number of label files to read to find out whether there are polygons


@final
class YOLODetection(DetectionDataset):
    """Images and boxes in the YOLO layout.

    ```
    data.yaml                          names, and locations of the splits; or
    classes.txt (obj.names)            only names, one per line
    images/<split>/<any name>.jpg      also <split>/images/, images/ or <split>/
    labels/<split>/<any name>.txt      also <split>/labels/, labels/, or next to the images
    ```

    Each line of a label file is an object: `class x y width height` (the center and size of its
    box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon, of which the bounding box is read). All
    coordinates are fractions of the width and height of the image; values outside 0 to 1 raise an
    error (with a tolerance of 1% for rounding). Keypoints (`kpt_shape` in data.yaml) are not read.
    An image without a label file has no objects.

    The entries `train`, `val` and `test` of data.yaml are folders, files that list images, or lists
    of these. Paths from another machine are matched by their last components; nothing outside
    `root` is read. Without data.yaml, every folder of images is a split, or all images are `train`.
    Several splits are joined by `+`.
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
            UserError: if data.yaml or a label is malformed, an object has an unknown class, a split
                has no images or no labels, or the parts of a union share an image.
        """
        place = locate(root)
        classes = _classes(place)
        files: list[ImageFile] = []
        objects = ObjectList([], [], [], [])
        for name, image, labels in _read_union(place, split, classes):
            size = read_size(image, orientation=orientation)
            for item in read_objects(labels, classes) if labels else ():
                objects.add(len(files), item.box(*size), item.label, False)
            files.append(ImageFile(name, str(image.relative_to(place.images)), size))
        super().__init__(
            *(place.annotations, split, place.images, files, objects, classes.names, transforms),
            orientation=orientation,
        )


@final
class YOLOSegmentation(SegmentationDataset):
    """Images in the YOLO layout with label maps drawn from polygons.

    See `YOLODetection` for the files; label files are read with their sample. Label 0 is the
    background; the classes of data.yaml follow from 1. Later objects are drawn over earlier ones. A
    box among the polygons raises an error.
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
            FileNotFoundError, UserError: see `YOLODetection`, except for the contents of labels.
        """
        place = locate(root)
        self._yolo_classes = _classes(place)
        classes = with_background(self._yolo_classes.names, self._yolo_classes.file)
        self._first = len(classes) - len(self._yolo_classes.names)
        samples = [
            # The image path takes the role of a missing label file.
            LabeledImage(name, image, labels or image)
            for name, image, labels in _read_union(place, split, self._yolo_classes)
        ]
        super().__init__(place.annotations, split, samples, classes, transforms, orientation)

    def labels(self, index: int, size: tuple[int, int]) -> Tensor:
        _, image, labels = self.samples[index]
        objects = [] if labels == image else read_objects(labels, self._yolo_classes)
        return draw(size, [self._region(labels, item, size) for item in objects])

    def _region(self, path: Path, item: YOLOObject, size: tuple[int, int]) -> Region:
        if item.is_box:
            raise UserError(
                f"{path}: line {item.line}: expected a polygon, like other objects of this data "
                "set, but got a box; draw its outline, or train a detector"
            )
        return Region(self._first + item.label, [item.polygon(*size)])


class YOLOItem(NamedTuple):
    """An image and its label file."""

    image: str
    annotation: str
    classes: YOLOClasses

    def check(self) -> Findings:
        size, faults = check_image(self.image, None)
        path = Path(self.annotation)
        counts: Counter[int] = Counter()
        try:
            lines = read_labels(path)
        except (ValueError, OSError) as error:
            return Findings([*faults, Fault(self.annotation, reason(error, path))], counts)
        for number, line in enumerate(lines, start=1):
            try:
                item = parse_line(path, number, line, self.classes)
            except ValueError as error:
                faults.append(Fault(self.annotation, reason(error, path)))
                continue
            if size is None or has_area(item.box(*size), size):
                counts[item.label] += 1
            else:
                text = f"line {number}: the box has no area inside the image; readers drop it"
                faults.append(Fault(self.annotation, text, is_remark=True))
        return Findings(faults, counts)


def yolo_splits(root: Path) -> list[str]:
    """Splits of data.yaml that exist, or folders of images."""
    return [name for name, sources in find_splits(root).items() if all(s.exists() for s in sources)]


def _splits(place: DataFiles) -> dict[str, list[Path]]:
    return {"train": [place.images]} if place.are_apart else find_splits(place.annotations)


def _classes(place: DataFiles) -> YOLOClasses:
    folder = place.annotations
    places = [folder, folder.parent, place.images] if place.are_apart else [folder]
    return read_classes(next(filter(names_classes, places), folder))


def _read_union(
    place: DataFiles, split: str, classes: YOLOClasses
) -> Iterator[tuple[str, Path, Path | None]]:
    """Name, image and label file (None if it has none) of each image in a union of splits."""
    splits = _splits(place)
    parts: list[Part] = []
    rows: list[tuple[str, Path, Path | None]] = []
    for name in split_parts(split):
        part = resolve(list(splits), name)
        if part not in splits:
            known = listing(list(splits))
            raise FileNotFoundError(f"{place}: no split {name!r}; the splits are: {known}")
        images = _fill(place, part, splits[part], classes)
        images.require()
        files: list[tuple[Path, Path | None]] = sorted(
            [*images.pairs, *((Path(item.image), None) for item in images.singles)],
            key=lambda pair: pair[0],
        )
        names = image_names([image.relative_to(place.images) for image, _ in files])
        rows += [(name, *pair) for name, pair in zip(names, files, strict=True)]
        parts.append(Part(str(images.source), classes.names, names))
    require_union(parts)
    return iter(rows)


def _fill(place: DataFiles, name: str, sources: Sequence[Path], classes: YOLOClasses) -> ImageList:
    """The images of a split, from folders or lists of images, with their label files."""
    images = ImageList(name, sources[0], classes=classes.names)
    images.pair_item = partial(YOLOItem, classes=classes)
    files: list[Path | Missing] = []
    for source in sources:
        if source.is_dir():
            files += find_images(source)
        elif source.is_file():
            files += listed_images(place.images, source)
        else:
            images.fault(f"no such folder or list of images, but {classes.file.name} refers to it")
    labels = _Labels(place)
    for file in dict.fromkeys(files):
        annotation = None if isinstance(file, Missing) else labels.of(file)
        if isinstance(file, Missing):
            images.entries += 1
            images.missing.append(file)
        elif annotation is None:
            images.entries += 1
            images.singles.append(ImageItem(str(file), None))
        else:
            images.add(file, annotation)
    if not images.entries:
        images.fault("expected images, but found none")
    elif images.singles and not images.pairs:
        tried = listing([str(folder) for folder in labels.folders(Path(images.singles[0].image))])
        images.fault(
            f"expected a label file (<name>.txt) for at least one of its {images.entries} images "
            f"in {tried}, but found none"
        )
    elif images.singles:
        text = f"{len(images.singles)} images have no label file; they are read without objects"
        images.fault(text, is_remark=True)
    return images


class _Labels:
    """Label files of images."""

    def __init__(self, place: DataFiles) -> None:
        self._place = place
        self._folders: dict[Path, list[Folder]] = {}

    def of(self, image: Path) -> Path | None:
        """The label file of an image; None if there is none."""
        if image.parent not in self._folders:
            self._folders[image.parent] = [Folder(place) for place in self.folders(image)]
        name = f"{image.stem}.txt"
        return next(filter(None, (place.find(name) for place in self._folders[image.parent])), None)

    def folders(self, image: Path) -> list[Path]:
        """Folders that may contain the label file of an image, in order of preference."""
        root = self._place.images
        parts = image.parent.relative_to(root).parts
        if self._place.are_apart:
            return list(
                dict.fromkeys([self._place.annotations.joinpath(*parts), self._place.annotations])
            )
        places = [image.parent, image.parent / "labels"]
        if "images" in parts:
            at = len(parts) - 1 - parts[::-1].index("images")
            places.insert(0, root.joinpath(*parts[:at], "labels", *parts[at + 1 :]))
        return places


def _lists(place: DataFiles) -> Iterator[ImageList]:
    for name, sources in _splits(place).items():
        failed = ImageList(name, sources[0])
        with failed.noting_errors():
            yield _fill(place, name, sources, _classes(place))
        if failed.faults:
            yield failed


def _has_polygons(place: DataFiles) -> bool:
    """Whether one of the first label files has polygons."""
    if not (_holds_labels(place) if place.are_apart else has_labels(place.annotations)):
        return False
    try:
        classes = _classes(place)
        filled = (_fill(place, name, folders, classes) for name, folders in _splits(place).items())
        labels = islice(chain.from_iterable(images.pairs for images in filled), _SAMPLED)
        return any(not item.is_box for _, path in labels for item in read_objects(path, classes))
    except (ValueError, OSError):
        return True  # the reader reports it


def _holds_labels(place: DataFiles) -> bool:
    """Whether one of the first files of a folder is a label file."""
    return place.annotations.is_dir() and any(
        is_label(path)
        for folder, names in walk_files(place.annotations, lambda name: name.endswith(".txt"))
        for path in (Path(folder, name) for name in names[:_SAMPLED])
    )


YOLO_BOXES = Layout[DetectionDataset](
    name="YOLO",
    files=FILES,
    recognizes=has_labels,
    splits=yolo_splits,
    lists=_lists,
    open=YOLODetection,
    recognizes_files=_holds_labels,
)
YOLO_MASKS = Layout[SegmentationDataset](
    name="YOLO with polygons",
    files=FILES,
    recognizes=lambda root: _has_polygons(DataFiles(root, root)),
    splits=yolo_splits,
    lists=lambda place: iter(()),  # same as the lists with boxes, which also read polygons
    open=YOLOSegmentation,
    recognizes_files=_has_polygons,
)
