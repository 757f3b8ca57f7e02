"""Files that are checked together, and their faults."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from deformnet.data.base import IGNORE, LabelReader, wrong_mask_size
from deformnet.data.files import Size, read_image, size_error
from deformnet.data.voc_files import ClassList, annotated_size, parse_annotation, read_object

FAR = 0.1
"""Distance that boxes may extend beyond their image without a remark, as a fraction of its longer
side."""


class Fault(NamedTuple):
    """A fault of a file."""

    file: str
    text: str
    is_remark: bool = False
    """Whether it does no harm, such as a box without area, which readers drop."""


class Findings(NamedTuple):
    """Result of a check of files."""

    faults: list[Fault]
    counts: Counter[int]
    """Objects or pixels of each class, without ignored objects, void, and boxes without area."""


class ImageItem(NamedTuple):
    """An image."""

    image: str
    size: Size | None
    """Annotated size; None if there is none."""

    def check(self) -> Findings:
        return Findings(check_image(self.image, self.size)[1], Counter())


class BoxesItem(NamedTuple):
    """An image and its boxes in VOC's XML."""

    image: str
    annotation: str
    classes: ClassList

    def check(self) -> Findings:
        path = Path(self.annotation)
        counts: Counter[int] = Counter()
        try:
            content = parse_annotation(path)
        except (ValueError, OSError) as error:
            return unreadable(self.image, path, error)
        size, faults = check_image(self.image, annotated_size(content))
        for number, item in enumerate(content.iterfind("object"), start=1):
            try:
                box, label, ignored = read_object(path, item, self.classes)
            except ValueError as error:
                faults.append(Fault(self.annotation, f"object {number}: {reason(error, path)}"))
                continue
            counts[label] += not ignored and has_area(box, size)
            remark = box_remark(box, size)
            if remark:
                text = f"object {number}: box {list(box)} {remark}"
                faults.append(Fault(self.annotation, text, is_remark=True))
        return Findings(faults, counts)


class LabelsItem(NamedTuple):
    """An image and its label map."""

    image: str
    labels: str
    reader: LabelReader

    def check(self) -> Findings:
        path = Path(self.labels)
        try:
            labels = self.reader.read(path)
        except (ValueError, OSError) as error:
            return unreadable(self.image, path, error)
        height, width = labels.shape
        size, faults = _read_image_size(self.image, (height, width))
        if size and size != (height, width):
            text = wrong_mask_size(Path(self.image), size, (height, width))
            faults.append(Fault(self.labels, text))
        pixels = enumerate(labels.flatten().bincount(minlength=IGNORE)[:IGNORE].tolist())
        counts = Counter({label: count for label, count in pixels if count})
        if not counts:
            faults.append(Fault(self.labels, "all pixels are void", is_remark=True))
        return Findings(faults, counts)


class Item(Protocol):
    """A named tuple. The first fields are the files to read, as strings, starting with the image;
    the other fields, which are not strings, are what the files are checked against."""

    def check(self) -> Findings:
        """Reads the files."""
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


def box_remark(box: tuple[float, float, float, float], size: Size | None) -> str:
    """Remark about an unusual but accepted box (edges); empty if there is none."""
    if size is not None and min(size) > 1 and max(box[2:]) <= 1 and max(box) > 0:
        return "is within 0 to 1: expected pixels, but it seems to be in fractions"
    if not has_area(box, size):
        return "has no area inside the image; readers drop it"
    if size is None:
        return ""
    x1, y1, x2, y2 = box
    height, width = size
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    is_far = beyond > max(2, FAR * max(size))
    return "extends far outside the image; readers clip it" if is_far else ""


def reason(error: Exception, path: Path) -> str:
    """Message of an error about a file, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{path}: ")


def unreadable(image: str, annotation: Path, error: Exception) -> Findings:
    """Findings of an image whose annotation cannot be read."""
    faults = [*check_image(image, None)[1], Fault(str(annotation), reason(error, annotation))]
    return Findings(faults, Counter())


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
