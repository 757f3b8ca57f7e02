"""Files that are looked at together, and what is wrong with them."""

import math
from pathlib import Path
from typing import NamedTuple

from deformnet.data.files import read_image, read_labels
from deformnet.data.voc import annotated_size, parse_annotation, read_object

Size = tuple[int, int]
"""Height and width."""


class Fault(NamedTuple):
    """What is wrong with a file."""

    file: str
    text: str
    left_out: bool = False
    """Whether it is no more than a remark, as on a box without area, which readers leave out."""


class ImageItem(NamedTuple):
    """An image that must decode and have a size."""

    image: str
    size: Size | None
    """The annotated one; None if none is."""

    @property
    def files(self) -> tuple[str, ...]:
        return (self.image,)

    def faults(self) -> list[Fault]:
        found: list[Fault] = []
        size = _image_size(self.image, found)
        if size and self.size and size != self.size:
            found.append(Fault(self.image, f"is {_text(size)}, annotated as {_text(self.size)}"))
        return found


class BoxesItem(NamedTuple):
    """An image and its boxes in VOC's XML."""

    image: str
    annotation: str
    classes: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return self.image, self.annotation

    def faults(self) -> list[Fault]:
        found: list[Fault] = []
        size = _image_size(self.image, found)
        path = Path(self.annotation)
        try:
            content = parse_annotation(path)
        except (ValueError, OSError) as error:
            return [*found, Fault(self.annotation, reason(error, path))]
        stated = annotated_size(content)
        if size and stated and size != stated:
            found.append(Fault(self.image, f"is {_text(size)}, annotated as {_text(stated)}"))
        labels = {name: label for label, name in enumerate(self.classes)}
        for number, item in enumerate(content.iterfind("object"), start=1):
            try:
                box, _, _ = read_object(path, item, labels)
            except ValueError as error:
                found.append(Fault(self.annotation, f"object {number}: {reason(error, path)}"))
                continue
            if not has_area(box, size):
                text = f"object {number}: box {list(box)} has no area inside the image"
                found.append(Fault(self.annotation, f"{text}; readers leave it out", left_out=True))
        return found


class LabelsItem(NamedTuple):
    """An image and its label map."""

    image: str
    labels: str
    allowed: bytes
    """The labels that may occur."""

    @property
    def files(self) -> tuple[str, ...]:
        return self.image, self.labels

    def faults(self) -> list[Fault]:
        found: list[Fault] = []
        size = _image_size(self.image, found)
        path = Path(self.labels)
        try:
            labels = read_labels(path)
        except (ValueError, OSError) as error:
            return [*found, Fault(self.labels, reason(error, path))]
        height, width = labels.shape
        if size and size != (height, width):
            text = f"is {_text((height, width))}, its image {_text(size)}"
            found.append(Fault(self.labels, text))
        unknown = sorted(set(labels.unique().tolist()) - set(self.allowed))
        if unknown:
            found.append(Fault(self.labels, f"labels of no class: {', '.join(map(str, unknown))}"))
        return found


Item = ImageItem | BoxesItem | LabelsItem


def has_area(box: tuple[float, float, float, float], size: Size | None) -> bool:
    """Whether readers keep a box (edges), clipped to its image; None is an image of any size."""
    x1, y1, x2, y2 = box
    height, width = size or (math.inf, math.inf)
    inside = min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0)
    return inside and all(map(math.isfinite, box))


def reason(error: Exception, path: Path) -> str:
    """What an error says about a file, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{path}: ")


def _image_size(file: str, found: list[Fault]) -> Size | None:
    """The size of an image that decodes; None, and a fault more, if it does not."""
    path = Path(file)
    try:
        _, height, width = read_image(path).shape
    except (ValueError, OSError) as error:
        found.append(Fault(file, reason(error, path)))
        return None
    return height, width


def _text(size: Size) -> str:
    height, width = size
    return f"{width}x{height}"
