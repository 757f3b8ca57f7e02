"""Files that are checked together, and their faults."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from deformnet.data.base import IGNORE, LabelReader, wrong_mask_size
from deformnet.data.files import Size, read_image, size_error
from deformnet.data.voc_files import ClassList, annotated_size, parse_annotation, read_object


class Fault(NamedTuple):
    """A fault of a file."""

    file: str
    text: str
    is_remark: bool = False
    """Whether it does no harm, such as a box without area, which readers drop."""


class ImageItem(NamedTuple):
    """An image."""

    image: str
    size: Size | None
    """Annotated size; None if there is none."""

    def faults(self) -> list[Fault]:
        return check_image(self.image, self.size)[1]


class BoxesItem(NamedTuple):
    """An image and its boxes in VOC's XML."""

    image: str
    annotation: str
    classes: ClassList

    def faults(self) -> list[Fault]:
        path = Path(self.annotation)
        try:
            content = parse_annotation(path)
        except (ValueError, OSError) as error:
            return [*check_image(self.image, None)[1], Fault(self.annotation, reason(error, path))]
        size, faults = check_image(self.image, annotated_size(content))
        for number, item in enumerate(content.iterfind("object"), start=1):
            try:
                box, _, _ = read_object(path, item, self.classes)
            except ValueError as error:
                faults.append(Fault(self.annotation, f"object {number}: {reason(error, path)}"))
                continue
            if not has_area(box, size):
                text = f"object {number}: box {list(box)} has no area inside the image"
                faults.append(Fault(self.annotation, f"{text}; readers drop it", is_remark=True))
        return faults


class LabelsItem(NamedTuple):
    """An image and its label map."""

    image: str
    labels: str
    reader: LabelReader

    def faults(self) -> list[Fault]:
        path = Path(self.labels)
        try:
            labels = self.reader.read(path)
        except (ValueError, OSError) as error:
            return [*check_image(self.image, None)[1], Fault(self.labels, reason(error, path))]
        height, width = labels.shape
        size, faults = _read_image_size(self.image, (height, width))
        if size and size != (height, width):
            text = wrong_mask_size(Path(self.image), size, (height, width))
            faults.append(Fault(self.labels, text))
        if (labels == IGNORE).all():
            faults.append(Fault(self.labels, "all pixels are void", is_remark=True))
        return faults


class Item(Protocol):
    """A named tuple. Its first fields are the files that it reads, as strings; the others, none of
    them a string, are what the files must agree with."""

    def faults(self) -> list[Fault]:
        """Faults of the files."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, places: slice, /) -> Sequence[Any]: ...


def files_of(item: Item) -> list[str]:
    """The files that an item reads."""
    return [field for field in item if isinstance(field, str)]


def has_area(box: tuple[float, float, float, float], size: Size | None) -> bool:
    """Whether a box (edges) has area when clipped to its image; None for an unknown size."""
    x1, y1, x2, y2 = box
    height, width = size or (math.inf, math.inf)
    inside = min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0)
    return inside and all(map(math.isfinite, box))


def reason(error: Exception, path: Path) -> str:
    """Message of an error about a file, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{path}: ")


def check_image(file: str, annotated: Size | None) -> tuple[Size | None, list[Fault]]:
    """Size of an image, None if it does not decode; and its faults."""
    size, faults = _read_image_size(file, annotated)
    if size is None or annotated is None or size == annotated:
        return size, faults
    return size, [Fault(file, size_error(Path(file), size, annotated))]


def _read_image_size(file: str, annotated: Size | None) -> tuple[Size | None, list[Fault]]:
    path = Path(file)
    try:
        _, height, width = read_image(path, orientation="auto", annotated=annotated).shape
    except (ValueError, OSError) as error:
        return None, [Fault(file, reason(error, path))]
    return (height, width), []
