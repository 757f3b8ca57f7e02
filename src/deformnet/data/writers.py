"""Writers of data sets in the layouts of COCO, VOC and YOLO."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from PIL import Image

from deformnet._errors import UserError
from deformnet._files import encoding_png, write_file
from deformnet.data.base import SegmentationDataset
from deformnet.data.boxes import DetectionDataset
from deformnet.data.files import Size, read_size
from deformnet.data.voc_files import color_map

Box = tuple[float, float, float, float]


class SourceObject(NamedTuple):
    """A box with area."""

    box: Box
    """Edges."""
    label: int
    ignored: bool


@dataclass
class SourceImage:
    """An image of the data set to convert.

    Attributes:
        path: image file.
        name: unique name, without suffix.
        split: the smallest of its splits.
        boxes: data set with its boxes, and its index there.
        masks: data set with its label map, and its index there.
    """

    path: Path
    name: str
    split: str
    boxes: tuple[DetectionDataset, int] | None = None
    masks: tuple[SegmentationDataset, int] | None = None

    @property
    def file(self) -> str:
        """Name of the image file in the new data set."""
        return f"{self.name}{self.path.suffix}"

    @property
    def size(self) -> Size:
        """Height and width of the image, as used by its boxes and label map."""
        if self.boxes is not None:
            images, index = self.boxes
            return images.size(index)
        images, index = self._with_masks()
        annotated = images.annotated_size(index)
        return read_size(self.path, orientation=images.orientation, annotated=annotated)

    def objects(self) -> list[SourceObject]:
        """The boxes."""
        if self.boxes is None:
            return []
        images, index = self.boxes
        boxes, labels, ignored = images.annotations(index)
        lists = boxes.tolist(), labels.tolist(), ignored.tolist()
        return [SourceObject(tuple(box), *rest) for box, *rest in zip(*lists, strict=True)]

    def labels(self) -> Image.Image:
        """The label map."""
        images, index = self._with_masks()
        return Image.fromarray(images.labels(index, self.size).numpy())

    def _with_masks(self) -> tuple[SegmentationDataset, int]:
        assert self.masks is not None
        return self.masks


class Content(NamedTuple):
    """A data set with boxes, label maps, or both.

    Attributes:
        images: all images.
        splits: images with boxes of each split.
        mask_splits: images with label maps of each split.
        classes: classes of the objects.
        mask_classes: classes of the label maps, with the background.
    """

    images: list[SourceImage]
    splits: dict[str, list[SourceImage]]
    mask_splits: dict[str, list[SourceImage]]
    classes: tuple[str, ...]
    mask_classes: tuple[str, ...]


class Writer(ABC):
    """Writes the annotations of a data set, image by image.

    Attributes:
        folder: folder of the data set.
        content: data set to convert.
        boxes: number of boxes that have been written.
        masks: number of label maps that have been written.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        self.folder = folder
        self.content = content
        self.boxes = 0
        self.masks = 0

    @abstractmethod
    def image_folder(self, image: SourceImage) -> str:
        """Folder of an image file, relative to the folder of the data set."""

    @abstractmethod
    def add(self, image: SourceImage) -> None:
        """Writes or keeps the annotations of an image."""

    @abstractmethod
    def finish(self) -> None:
        """Writes the files that all images share."""

    def remarks(self) -> list[str]:
        """One sentence about each kind of annotation that was left out."""
        return []

    def write(self, path: str, lines: Iterable[str]) -> None:
        """Writes a text file."""
        content = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        write_file(self.folder / path, content, durable=False)


class COCOWriter(Writer):
    """Writes `annotations/instances_<split>.json` and `images/`."""

    def __init__(self, folder: Path, content: Content) -> None:
        super().__init__(folder, content)
        # JSON text takes less memory than objects.
        self._images: dict[str, str] = {}
        self._objects: dict[str, list[str]] = {}

    def image_folder(self, image: SourceImage) -> str:
        return "images"

    def add(self, image: SourceImage) -> None:
        number = len(self._images) + 1
        height, width = image.size
        entry = {"id": number, "file_name": image.file, "width": width, "height": height}
        self._images[image.name] = json.dumps(entry)
        objects = self._objects[image.name] = []
        for item in image.objects():
            self.boxes += 1
            x1, y1, x2, y2 = item.box
            entry = {
                "id": self.boxes,
                "image_id": number,
                "category_id": item.label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(item.ignored),
                "segmentation": [],
            }
            objects.append(json.dumps(entry))

    def finish(self) -> None:
        names = enumerate(self.content.classes, start=1)
        categories = [json.dumps({"id": number, "name": name}) for number, name in names]
        for split, images in self.content.splits.items():
            objects = [text for image in images for text in self._objects[image.name]]
            lines = [
                *('{"images": [', ",\n".join(self._images[image.name] for image in images)),
                *('], "categories": [', ",\n".join(categories)),
                *('], "annotations": [', ",\n".join(objects), "]}"),
            ]
            self.write(f"annotations/instances_{split}.json", lines)


class VOCWriter(Writer):
    """Writes `Annotations/`, `ImageSets/`, `JPEGImages/`, `SegmentationClass/` and classes.txt."""

    def __init__(self, folder: Path, content: Content) -> None:
        super().__init__(folder, content)
        self._palette = color_map().tobytes()
        self._single_pixels = 0

    def image_folder(self, image: SourceImage) -> str:
        return "JPEGImages"

    def add(self, image: SourceImage) -> None:
        if image.boxes is not None:
            self._write_boxes(image)
        if image.masks is not None:
            self._write_mask(image)

    def _write_boxes(self, image: SourceImage) -> None:
        height, width = image.size
        lines = [
            "<annotation>",
            f"  <filename>{escape(image.file)}</filename>",
            f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        ]
        for item in image.objects():
            x1, y1, x2, y2 = item.box
            # First and last pixel, counted from 1. A box of a single pixel is read as a box without
            # area, since such boxes in VOC are accidental clicks.
            corners = x1 + 1, y1 + 1, x2, y2
            if corners[:2] == corners[2:]:
                self._single_pixels += 1
                continue
            self.boxes += 1
            texts = zip(("xmin", "ymin", "xmax", "ymax"), map(_number, corners), strict=True)
            box = "".join(f"<{tag}>{text}</{tag}>" for tag, text in texts)
            name = escape(self.content.classes[item.label])
            difficult = int(item.ignored)
            lines += [
                "  <object>",
                f"    <name>{name}</name><difficult>{difficult}</difficult>",
                f"    <bndbox>{box}</bndbox>",
                "  </object>",
            ]
        self.write(f"Annotations/{image.name}.xml", [*lines, "</annotation>"])

    def _write_mask(self, image: SourceImage) -> None:
        self.masks += 1
        labels = image.labels()
        labels.putpalette(self._palette)
        encoded = io.BytesIO()
        with encoding_png():
            labels.save(encoded, "PNG")
        file = self.folder / f"SegmentationClass/{image.name}.png"
        write_file(file, encoded.getvalue(), durable=False)

    def finish(self) -> None:
        kinds = (("Main", self.content.splits), ("Segmentation", self.content.mask_splits))
        for kind, splits in kinds:
            for split, images in splits.items():
                names = [image.name for image in images]
                self.write(f"ImageSets/{kind}/{split}.txt", names)
        self.write("classes.txt", self.content.mask_classes or self.content.classes)

    def remarks(self) -> list[str]:
        if not self._single_pixels:
            return []
        return [
            f"{self._single_pixels} boxes of a single pixel are left out; VOC has no such boxes."
        ]


class YOLOWriter(Writer):
    """Writes data.yaml, `images/<split>/` and `labels/<split>/`.

    A split that shares images with a smaller one (trainval and train) is written as a list.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        super().__init__(folder, content)
        self._ignored = 0

    def image_folder(self, image: SourceImage) -> str:
        return f"images/{image.split}"

    def add(self, image: SourceImage) -> None:
        height, width = image.size
        if (height, width) != read_size(image.path, orientation="upright"):
            raise UserError(
                f"{image.path}: expected boxes on the upright image, as YOLO reads it, but they "
                "are on the stored pixels; save the image without its EXIF orientation"
            )
        lines = []
        for item in image.objects():
            if item.ignored:
                self._ignored += 1
                continue
            self.boxes += 1
            x1, y1, x2, y2 = item.box
            center = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            numbers = (*center, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{item.label} {' '.join(map(_number, numbers))}")
        self.write(f"labels/{image.split}/{image.name}.txt", lines)

    def finish(self) -> None:
        entries = ["path: ."]
        for split, images in self.content.splits.items():
            if all(image.split == split for image in images):
                entries.append(f"{split}: images/{split}")
            else:
                files = [f"./{self.image_folder(image)}/{image.file}" for image in images]
                self.write(f"{split}.txt", files)
                entries.append(f"{split}: {split}.txt")
        names = [
            f"  {label}: {json.dumps(name, ensure_ascii=False)}"
            for label, name in enumerate(self.content.classes)
        ]
        self.write("data.yaml", [*entries, "names:", *names])

    def remarks(self) -> list[str]:
        if not self._ignored:
            return []
        return [f"{self._ignored} difficult objects or crowds are left out; YOLO has neither."]


def _number(value: float) -> str:
    """The shortest text that parses to the same number."""
    return str(int(value)) if value.is_integer() else repr(value)
