"""Data sets in the formats of common tools, written from real images.

    python tests/data/formats.py OUT             writes one folder per format to OUT
    python tests/data/formats.py OUT --table     and prints the table of docs/own-data.md
    python tests/data/formats.py OUT --pictures  and draws the pictures of that page

DEFORMNET_DATA names the folder of the real data sets.
"""

import argparse
import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import contourpy
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deformnet.data import (
    DataFiles,
    classification_splits,
    detection_splits,
    open_classification,
    open_detection,
    open_segmentation,
    segmentation_splits,
)
from deformnet.data.voc_files import color_map
from deformnet.visualization import draw_boxes, overlay

VOID = 255


@dataclass(frozen=True)
class Sample:
    """An image and what its annotation says."""

    image: Path
    """File with its pixels."""
    size: tuple[int, int] = (0, 0)
    """Height and width."""
    boxes: np.ndarray | None = None
    """float [n, 4]: edges x1, y1, x2, y2."""
    names: tuple[str, ...] = ()
    """Class of each box; of the image, if there are no boxes."""
    mask: np.ndarray | None = None
    """uint8 [H, W]: indices into the classes of the data set, or VOID."""
    instances: np.ndarray | None = None
    """uint8 [H, W]: number of the object, 0 for none."""

    def objects(self):
        return list(zip(self.boxes.tolist(), self.names, strict=True))


@dataclass(frozen=True)
class Source:
    """Images of a real data set."""

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]

    @property
    def all(self):
        return (*self.train, *self.val)

    @property
    def splits(self):
        return {"train": self.train, "val": self.val}


@dataclass(frozen=True)
class Written:
    """A data set as it is to be read: its classes, and its samples by split and name."""

    classes: tuple[str, ...]
    splits: Mapping[str, Mapping[str, Sample]]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        title: what people call it.
        files: its files, in a few words.
        network: what is trained on it.
        write: writes it into a folder.
        val: name of the validation split, or None if one has to be held out.
        message: the error instead, or its beginning, with {root} for the folder.
        by_hand: what a person does after that, with an estimate of the minutes.
        tolerance: fraction of the pixels of a mask that may differ, for polygons.
        is_apart: whether images and annotations are in two places.
    """

    title: str
    files: str
    network: str
    write: Callable[[Path, Path], Written]
    val: str | None = None
    message: str = ""
    by_hand: str = "0"
    tolerance: float = 0.0
    is_apart: bool = False

    @property
    def folder(self):
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).replace("--", "-")

    def location(self, out: Path):
        root = out / self.folder
        return DataFiles(root / "photos", root / "labels.json") if self.is_apart else root

    def open(self, out: Path, split: str):
        return _OPEN[self.network](self.location(out), split)

    def splits(self, out: Path):
        return _SPLITS[self.network](self.location(out))

    @property
    def command(self):
        if self.is_apart:
            return "train rfcn --images photos --annotations labels.json --val-fraction 0.2"
        held_out = "" if self.val or self.message else " --val-fraction 0.2"
        return f"train {self.network}{held_out}"


_OPEN = {"rfcn": open_detection, "deeplab": open_segmentation, "classifier": open_classification}
_SPLITS = {
    "rfcn": detection_splits,
    "deeplab": segmentation_splits,
    "classifier": classification_splits,
}


# Sources.


@cache
def blood(data: Path) -> Source:
    """BCCD: boxes of three classes."""
    return _boxed(data / "bccd_voc")


@cache
def people(data: Path) -> Source:
    """Penn-Fudan: pedestrians with boxes, masks and instances."""
    source = _boxed(data / "pennfudan_voc")
    folder = data / "pennfudan_voc/VOCdevkit"
    year = next(folder.iterdir())

    def with_masks(sample: Sample) -> Sample:
        files = [f"{kind}/{sample.image.stem}.png" for kind in _MASK_KINDS]
        mask, instances = (np.array(Image.open(year / file)) for file in files)
        return replace(sample, mask=mask, instances=instances)

    train, val = (tuple(map(with_masks, samples)) for samples in (source.train, source.val))
    return Source(("background", "person"), train, val)


_MASK_KINDS = ("SegmentationClass", "SegmentationObject")


@cache
def streets(data: Path) -> Source:
    """CamVid: masks of eleven classes and void, without a background."""
    root = data / "camvid_voc"
    classes = tuple((root / "classes.txt").read_text().split())
    year = next((root / "VOCdevkit").iterdir())

    def samples(split: str, count: int) -> tuple[Sample, ...]:
        names = (year / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        chosen = names[:: len(names) // count][:count]
        masks = [np.array(Image.open(year / f"SegmentationClass/{name}.png")) for name in chosen]
        return tuple(
            Sample(year / f"JPEGImages/{name}.jpg", mask.shape, mask=mask)
            for name, mask in zip(chosen, masks, strict=True)
        )

    return Source(classes, samples("train", 8), samples("val", 4))


def _boxed(root: Path) -> Source:
    images = {split: open_detection(root, split) for split in ("train", "val")}

    def samples(split: str, count: int) -> tuple[Sample, ...]:
        found = []
        for index in range(count):
            image, target = images[split][index]
            names = tuple(images[split].classes[label] for label in target.labels)
            boxes = np.asarray(target.boxes, dtype=float)
            file = images[split].image_path(index)
            found.append(Sample(file, tuple(image.shape[1:]), boxes, names))
        return tuple(found)

    return Source(images["train"].classes, samples("train", 8), samples("val", 4))


def _polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of the regions of a mask, float [n, 2] of x and y, with edges of pixels as units."""
    padded = np.pad(mask.astype(float), 1)
    places = [np.arange(length) - 0.5 for length in padded.shape]
    lines = contourpy.contour_generator(places[1], places[0], padded).lines(0.5)
    return [line[:-1] for line in lines if len(line) > 4]


def _outlines(sample: Sample) -> list[np.ndarray]:
    """Polygons of all objects of a sample with instances."""
    numbers = range(1, int(sample.instances.max()) + 1)
    return [line for number in numbers for line in _polygons(sample.instances == number)]


# Files.


def _copy(sample: Sample, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(sample.image, path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lines(path: Path, lines: Sequence[str]) -> None:
    _write(path, "".join(f"{line}\n" for line in lines))


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _xml(sample: Sample, file: str) -> str:
    height, width = sample.size
    objects = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>0</difficult><bndbox><xmin>{x1 + 1:.0f}</xmin><ymin>{y1 + 1:.0f}</ymin>"
        f"<xmax>{x2:.0f}</xmax><ymax>{y2:.0f}</ymax></bndbox></object>\n"
        for (x1, y1, x2, y2), name in sample.objects()
    )
    return (
        f"<annotation><folder>images</folder><filename>{file}</filename>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"{objects}</annotation>\n"
    )


def _coco(
    samples: Mapping[str, Sample],
    classes: Sequence[str],
    above: str = "",
    *,
    polygons: bool = False,
) -> str:
    """A JSON file of COCO; `above` is the class that Roboflow puts above all others."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    if above:
        categories = [{"id": 0, "name": above, "supercategory": "none"}] + [
            {**category, "supercategory": above} for category in categories
        ]
    images, annotations = [], []
    for number, (file, sample) in enumerate(samples.items(), start=1):
        height, width = sample.size
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        lines = [_polygons(sample.instances == i + 1) for i in range(len(sample.names) * polygons)]
        for place, ((x1, y1, x2, y2), name) in enumerate(sample.objects()):
            outline = [line.ravel().tolist() for line in lines[place]] if polygons else []
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": classes.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": outline,
                    "iscrowd": 0,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(content)


def _yolo_boxes(sample: Sample, classes: Sequence[str]) -> list[str]:
    height, width = sample.size
    return [
        f"{classes.index(name)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
        f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
        for (x1, y1, x2, y2), name in sample.objects()
    ]


def _yolo_polygons(sample: Sample) -> list[str]:
    scale = np.array(sample.size[::-1])
    lines = [(line / scale).ravel() for line in _outlines(sample)]
    return [" ".join(["0", *(f"{value:.6f}" for value in line)]) for line in lines]


def _labelme(sample: Sample, file: str, shapes: Sequence[tuple[str, str, Sequence]]) -> str:
    entries = [
        {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
        for label, kind, points in shapes
    ]
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": entries,
        "imagePath": file,
        "imageData": None,
        "imageHeight": sample.size[0],
        "imageWidth": sample.size[1],
    }
    return json.dumps(content)


def _stems(samples: Sequence[Sample]) -> dict[str, Sample]:
    return {sample.image.stem: sample for sample in samples}


def _used(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Classes that occur, sorted, as they are read without a file that names them."""
    return tuple(sorted({name for sample in samples for name in sample.names}))


# Boxes.


def labelimg(root: Path, data: Path) -> Written:
    samples = blood(data).all
    for sample in samples:
        _copy(sample, root / sample.image.name)
        _write(root / f"{sample.image.stem}.xml", _xml(sample, sample.image.name))
    return Written(_used(samples), {"train": _stems(samples)})


def labelimg_folders(root: Path, data: Path) -> Written:
    """As labelImg writes after "Change Save Dir"; the last image has no file."""
    samples = blood(data).all
    for sample in samples:
        _copy(sample, root / "images" / sample.image.name)
    for sample in samples[:-1]:
        xml = _xml(sample, sample.image.name)
        _write(root / "annotations" / f"{sample.image.stem}.xml", xml)
    empty = replace(samples[-1], boxes=np.zeros((0, 4)), names=())
    return Written(_used(samples[:-1]), {"train": _stems((*samples[:-1], empty))})


def capitals(root: Path, data: Path) -> Written:
    """Names as cameras and people write them, in folders by day."""
    samples, names = blood(data).all, {}
    for number, sample in enumerate(samples):
        name = f"Slide {number} (copy).v2.{number % 3}"
        folder = root / ("Monday 1.6." if number % 2 else "Tuesday")
        _copy(sample, folder / f"{name}.JPG")
        _write(folder / f"{name}.XML", _xml(sample, f"{name}.JPG"))
        names[name] = sample
    return Written(_used(samples), {"train": names})


def rotated(root: Path, data: Path) -> Written:
    """Photographs as phones store them: turned, with the orientation in EXIF."""
    samples = people(data).all
    exif = Image.Exif()
    exif[0x0112] = 6
    for sample in samples:
        root.mkdir(parents=True, exist_ok=True)
        turned = Image.open(sample.image).convert("RGB").transpose(Image.Transpose.ROTATE_90)
        turned.save(root / sample.image.name, quality=95, exif=exif)
        _write(root / f"{sample.image.stem}.xml", _xml(sample, sample.image.name))
    return Written(_used(samples), {"train": _stems(samples)})


def roboflow_voc(root: Path, data: Path) -> Written:
    source = blood(data)
    splits = {"train": {}, "valid": {}}
    for split, samples in zip(splits, (source.train, source.val), strict=True):
        for number, sample in enumerate(samples):
            name = f"{sample.image.stem}_jpg.rf.{number:032x}"
            _copy(sample, root / split / f"{name}.jpg")
            _write(root / split / f"{name}.xml", _xml(sample, f"{name}.jpg"))
            splits[split][name] = sample
    _write(root / "README.roboflow.txt", "blood - v1\n")
    return Written(_used(source.all), splits)


def devkit(root: Path, data: Path) -> Written:
    source, year = blood(data), root / "VOCdevkit/VOC2012"
    for split, samples in source.splits.items():
        _lines(year / f"ImageSets/Main/{split}.txt", list(_stems(samples)))
        for sample in samples:
            _copy(sample, year / "JPEGImages" / sample.image.name)
            xml = _xml(sample, sample.image.name)
            _write(year / "Annotations" / f"{sample.image.stem}.xml", xml)
    return Written(
        _used(source.all), {split: _stems(samples) for split, samples in source.splits.items()}
    )


def roboflow_coco(root: Path, data: Path) -> Written:
    source = blood(data)
    splits = {"train": source.train, "valid": source.val}
    for split, samples in splits.items():
        files = {f"{sample.image.stem}_jpg.rf.1a2b.jpg": sample for sample in samples}
        for file, sample in files.items():
            _copy(sample, root / split / file)
        _write(root / split / "_annotations.coco.json", _coco(files, source.classes, "cells"))
    named = {
        split: {f"{name}_jpg.rf.1a2b": it for name, it in _stems(samples).items()}
        for split, samples in splits.items()
    }
    return Written(source.classes, named)


def _coco_splits(root: Path, data: Path, file: str, folder: str) -> Written:
    source = blood(data)
    for split, samples in source.splits.items():
        files = {sample.image.name: sample for sample in samples}
        for name, sample in files.items():
            _copy(sample, root / folder.format(split=split) / name)
        _write(root / file.format(split=split), _coco(files, source.classes))
    return Written(
        source.classes, {split: _stems(samples) for split, samples in source.splits.items()}
    )


def coco(root: Path, data: Path) -> Written:
    return _coco_splits(root, data, "annotations/instances_{split}.json", "{split}")


def coco_beside(root: Path, data: Path) -> Written:
    return _coco_splits(root, data, "{split}.json", "images")


def coco_inside(root: Path, data: Path) -> Written:
    return _coco_splits(root, data, "annotations/instances_{split}.json", "images/{split}")


def _coco_alone(root: Path, data: Path, file: str, folder: str) -> Written:
    source = blood(data)
    for sample in source.all:
        _copy(sample, root / folder / sample.image.name)
    files = {sample.image.name: sample for sample in source.all}
    _write(root / file, _coco(files, source.classes))
    return Written(source.classes, {"train": _stems(source.all)})


def coco_alone(root: Path, data: Path) -> Written:
    return _coco_alone(root, data, "result.json", "images")


def coco_apart(root: Path, data: Path) -> Written:
    return _coco_alone(root, data, "labels.json", "photos")


def cvat_coco(root: Path, data: Path) -> Written:
    return _coco_alone(root, data, "annotations/instances_default.json", "images/default")


def yolo(root: Path, data: Path) -> Written:
    """As Roboflow writes it, with folders that are relative to another one."""
    source = blood(data)
    splits = {"train": source.train, "valid": source.val}
    for split, samples in splits.items():
        for sample in samples:
            _copy(sample, root / split / "images" / sample.image.name)
            lines = _yolo_boxes(sample, source.classes)
            _lines(root / split / "labels" / f"{sample.image.stem}.txt", lines)
    names = json.dumps(source.classes)
    text = f"train: ../train/images\nval: ../valid/images\n\nnc: 3\nnames: {names}\n"
    _write(root / "data.yaml", text)
    named = {"train": _stems(source.train), "val": _stems(source.val)}
    return Written(source.classes, named)


def yolo_classes(root: Path, data: Path) -> Written:
    """As Label Studio writes it; the last image has no labels, and no file."""
    source = blood(data)
    for sample in source.all:
        _copy(sample, root / "images" / sample.image.name)
    for sample in source.all[:-1]:
        lines = _yolo_boxes(sample, source.classes)
        _lines(root / "labels" / f"{sample.image.stem}.txt", lines)
    _lines(root / "classes.txt", source.classes)
    empty = replace(source.all[-1], boxes=np.zeros((0, 4)), names=())
    return Written(source.classes, {"train": _stems((*source.all[:-1], empty))})


def yolo_unnamed(root: Path, data: Path) -> Written:
    written = yolo_classes(root, data)
    (root / "classes.txt").unlink()
    return written


def labelme_boxes(root: Path, data: Path) -> Written:
    samples = blood(data).all
    for sample in samples:
        _copy(sample, root / sample.image.name)
        shapes = [
            (name, "rectangle", [[x1, y1], [x2, y2]]) for (x1, y1, x2, y2), name in sample.objects()
        ]
        text = _labelme(sample, sample.image.name, shapes)
        _write(root / f"{sample.image.stem}.json", text)
    return Written(_used(samples), {"train": _stems(samples)})


def cvat_xml(root: Path, data: Path) -> Written:
    """CVAT for images 1.1, which no reader reads."""
    samples, entries = blood(data).all, []
    for number, sample in enumerate(samples):
        _copy(sample, root / "images" / sample.image.name)
        boxes = "".join(
            f'<box label="{name}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"></box>'
            for (x1, y1, x2, y2), name in sample.objects()
        )
        entries.append(f'<image id="{number}" name="{sample.image.name}">{boxes}</image>\n')
    text = f"<annotations><version>1.1</version>\n{''.join(entries)}</annotations>\n"
    _write(root / "annotations.xml", text)
    return Written((), {})


def table_of_boxes(root: Path, data: Path) -> Written:
    """A .csv of boxes, as TensorFlow's tutorials use it."""
    samples = blood(data).all
    root.mkdir(parents=True)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
        for sample in samples:
            _copy(sample, root / "images" / sample.image.name)
            size = sample.size[::-1]
            rows = [(sample.image.name, *size, name, *box) for box, name in sample.objects()]
            table.writerows(rows)
    return Written((), {})


# Masks and polygons.


def _masks(root: Path, source: Source, stored: Callable[[Sample], np.ndarray]) -> None:
    for sample in source.all:
        _copy(sample, root / "images" / sample.image.name)
        _save(stored(sample), root / "masks" / f"{sample.image.stem}.png")


def masks(root: Path, data: Path) -> Written:
    """Ids 0 and 1, and no file of names."""
    source = people(data)
    _masks(root, source, lambda sample: sample.mask)
    return Written(("background", "object"), {"train": _stems(source.all)})


def binary_masks(root: Path, data: Path) -> Written:
    source = people(data)
    _masks(root, source, lambda sample: np.where(sample.mask == 1, 255, 0).astype(np.uint8))
    _lines(root / "classes.txt", source.classes)
    return Written(source.classes, {"train": _stems(source.all)})


def instance_masks(root: Path, data: Path) -> Written:
    """Numbers of objects instead of classes."""
    _masks(root, people(data), lambda sample: sample.instances)
    return Written((), {})


def id_masks(root: Path, data: Path) -> Written:
    """Ids of classes in folders by split."""
    source = streets(data)
    for split, samples in source.splits.items():
        for sample in samples:
            _copy(sample, root / split / "images" / sample.image.name)
            _save(sample.mask, root / split / "masks" / f"{sample.image.stem}.png")
    _lines(root / "classes.txt", source.classes)
    splits = {split: _stems(samples) for split, samples in source.splits.items()}
    return Written(source.classes, splits)


_COLORS = color_map()[1:]


def color_masks(root: Path, data: Path) -> Written:
    """Colors that class_dict.csv names, as CamVid on Kaggle: train/ and train_labels/."""
    source = streets(data)
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(source.classes)] = _COLORS[: len(source.classes)]
    for split, samples in source.splits.items():
        for sample in samples:
            _copy(sample, root / split / sample.image.name)
            file = root / f"{split}_labels/{sample.image.stem}_L.png"
            _save(colors[sample.mask], file)
    rows = [f"{name},{r},{g},{b}" for name, (r, g, b) in zip(source.classes, colors, strict=False)]
    _lines(root / "class_dict.csv", ["name,r,g,b", *rows, "Void,0,0,0"])
    splits = {split: _stems(samples) for split, samples in source.splits.items()}
    return Written(source.classes, splits)


def cvat_masks(root: Path, data: Path) -> Written:
    """CVAT's "Segmentation mask 1.1", where what is not labeled is the background."""
    source = streets(data)
    classes = ("background", *source.classes)
    samples = [
        replace(sample, mask=np.where(sample.mask == VOID, 0, sample.mask + 1).astype(np.uint8))
        for sample in source.all
    ]
    colors = color_map()[: len(classes)]
    for sample in samples:
        _copy(sample, root / "JPEGImages" / sample.image.name)
        for kind in _MASK_KINDS:
            _save(colors[sample.mask], root / kind / f"{sample.image.stem}.png")
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(classes, colors, strict=True)]
    _lines(root / "labelmap.txt", ["# label:color_rgb:parts:actions", *rows])
    _lines(root / "ImageSets/Segmentation/default.txt", list(_stems(samples)))
    return Written(classes, {"default": _stems(samples)})


_CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 13: "fence", 17: "pole", 20: "traffic sign"},
    **{21: "vegetation", 23: "sky", 24: "person", 25: "rider", 26: "car"},
}
_CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)


def cityscapes(root: Path, data: Path) -> Written:
    source = data / "camvid_cityscapes"
    table = np.full(256, VOID, np.uint8)
    for number, name in _CITYSCAPES.items():
        table[number] = _CITYSCAPES_CLASSES.index(name)
    splits: dict[str, dict[str, Sample]] = {"train": {}, "val": {}}
    for split in splits:
        for image in sorted(source.glob(f"leftImg8bit/{split}/*/*.png")):
            name = image.name.removesuffix("_leftImg8bit.png")
            labels = f"gtFine/{split}/{image.parent.name}/{name}_gtFine_labelIds.png"
            ids = np.array(Image.open(source / labels))
            sample = Sample(image, ids.shape, mask=table[ids])
            _copy(sample, root / image.relative_to(source))
            _save(ids, root / labels)
            splits[split][name] = sample
    return Written(_CITYSCAPES_CLASSES, splits)


def coco_polygons(root: Path, data: Path) -> Written:
    source = people(data)
    for split, samples in source.splits.items():
        files = {sample.image.name: sample for sample in samples}
        for name, sample in files.items():
            _copy(sample, root / "images" / name)
        text = _coco(files, source.classes[1:], polygons=True)
        _write(root / f"annotations/instances_{split}.json", text)
    splits = {split: _stems(samples) for split, samples in source.splits.items()}
    return Written(source.classes, splits)


def coco_runs(root: Path, data: Path) -> Written:
    """Run lengths, as segmentation tools write them."""
    from faster_coco_eval.core import mask as runs

    content = json.loads((data / "nuclei_coco/annotations/instances_val_small.json").read_text())
    images = content["images"][:8]
    chosen = {image["id"]: image for image in images}
    annotations = [it for it in content["annotations"] if it["image_id"] in chosen]
    text = json.dumps({**content, "images": images, "annotations": annotations})
    _write(root / "annotations/instances_train.json", text)
    samples = {}
    for number, image in chosen.items():
        file = data / "nuclei_coco/val" / image["file_name"]
        size = image["height"], image["width"]
        mask = np.zeros(size, np.uint8)
        for it in annotations:
            if it["image_id"] == number:
                mask |= runs.decode(it["segmentation"])
        samples[file.stem] = Sample(file, size, mask=mask)
        _copy(samples[file.stem], root / "train" / file.name)
    return Written(("background", "nucleus"), {"train": samples})


def yolo_polygons(root: Path, data: Path) -> Written:
    source = people(data)
    for split, samples in source.splits.items():
        for sample in samples:
            _copy(sample, root / "images" / split / sample.image.name)
            lines = _yolo_polygons(sample)
            _lines(root / "labels" / split / f"{sample.image.stem}.txt", lines)
    text = "path: /home/me/people\ntrain: images/train\nval: images/val\nnames:\n  0: person\n"
    _write(root / "data.yaml", text)
    splits = {split: _stems(samples) for split, samples in source.splits.items()}
    return Written(source.classes, splits)


def labelme_polygons(root: Path, data: Path) -> Written:
    source = people(data)
    for sample in source.all:
        _copy(sample, root / sample.image.name)
        shapes = [("person", "polygon", line.tolist()) for line in _outlines(sample)]
        text = _labelme(sample, sample.image.name, shapes)
        _write(root / f"{sample.image.stem}.json", text)
    return Written(source.classes, {"train": _stems(source.all)})


# Classes.


def class_folders(root: Path, data: Path) -> Written:
    """A folder of cells for each class."""
    samples = {}
    for sample in blood(data).all:
        picture = Image.open(sample.image)
        for number, (box, name) in enumerate(sample.objects()):
            file = root / name / f"{sample.image.stem}-{number}.png"
            if len(list(file.parent.glob("*"))) < 6:
                _save(np.asarray(picture.crop(tuple(map(int, box)))), file)
                key = f"{name}/{file.name}"
                size = (int(box[3] - box[1]), int(box[2] - box[0]))
                samples[key] = Sample(file, size, names=(name,))
    return Written(tuple(sorted({it.names[0] for it in samples.values()})), {"train": samples})


_EXPECTED = "expected a data set with a COCO JSON file"

FORMATS = (
    Format("labelImg", "`a.jpg`, `a.xml`", "rfcn", labelimg),
    Format("labelImg, two folders", "`images/`, `annotations/*.xml`", "rfcn", labelimg_folders),
    Format("Capitals and blanks", "`Day 1/Image 1.v2.JPG`, `.XML`", "rfcn", capitals),
    Format("Phone photographs", "`a.jpg` with EXIF orientation, `a.xml`", "rfcn", rotated),
    Format("Roboflow VOC", "`train/`, `valid/`: `.jpg`, `.xml`", "rfcn", roboflow_voc, "valid"),
    Format("VOC, own classes", "`VOCdevkit/VOC2012/`", "rfcn", devkit, "val"),
    Format("Roboflow COCO", "`train/_annotations.coco.json`", "rfcn", roboflow_coco, "valid"),
    Format("COCO", "`annotations/instances_train.json`, `train/`", "rfcn", coco, "val"),
    Format("COCO, one folder", "`train.json`, `val.json`, `images/`", "rfcn", coco_beside, "val"),
    Format("COCO, images by split", "the same, `images/train/`", "rfcn", coco_inside, "val"),
    Format("COCO, one file", "`result.json`, `images/`", "rfcn", coco_alone),
    Format("COCO, apart", "`labels.json`, `photos/`", "rfcn", coco_apart, is_apart=True),
    Format("CVAT COCO", "`annotations/instances_default.json`", "rfcn", cvat_coco),
    Format("YOLO", "`data.yaml`, `train/images/`, `train/labels/`", "rfcn", yolo, "val"),
    Format("YOLO, no yaml", "`images/`, `labels/`, `classes.txt`", "rfcn", yolo_classes),
    Format("labelme", "`a.jpg`, `a.json`: rectangles", "rfcn", labelme_boxes),
    Format("Masks 0, 1", "`images/`, `masks/`", "deeplab", masks),
    Format("Masks 0, 255", "the same, `classes.txt`", "deeplab", binary_masks),
    Format("Masks of ids", "`train/images/`, `train/masks/`, ...", "deeplab", id_masks, "val"),
    Format("Masks of colors", "`train_labels/`, `class_dict.csv`", "deeplab", color_masks, "val"),
    Format("CVAT masks", "`SegmentationClass/`, `labelmap.txt`", "deeplab", cvat_masks),
    Format("Cityscapes", "`leftImg8bit/`, `gtFine/`", "deeplab", cityscapes, "val"),
    Format(
        *("COCO polygons", "`annotations/`, `images/`", "deeplab", coco_polygons, "val"),
        tolerance=0.005,
    ),
    Format("COCO run lengths", "`annotations/`, `train/`", "deeplab", coco_runs),
    Format(
        *("YOLO polygons", "`data.yaml`, `labels/`", "deeplab", yolo_polygons, "val"),
        tolerance=0.005,
    ),
    Format(
        *("labelme polygons", "`a.jpg`, `a.json`", "deeplab", labelme_polygons), tolerance=0.005
    ),
    Format("Class folders", "`CLASS/*.png`", "classifier", class_folders),
    Format(
        *("YOLO, no names", "`images/`, `labels/`", "rfcn", yolo_unnamed),
        message="{root}: expected class names in data.yaml, classes.txt or obj.names, but found "
        "none; write them, one per line, to {root}/classes.txt",
        by_hand="1: write them",
    ),
    Format(
        *("Masks of instances", "`images/`, `masks/`", "deeplab", instance_masks),
        message="{root}/classes.txt: no such file; expected class names, one per line from id 0, "
        "since the masks contain ids up to 3; if the ids number objects, save class ids instead",
        by_hand="5: a script",
    ),
    Format(
        *("CVAT for images", "`annotations.xml`, `images/`", "rfcn", cvat_xml),
        message="{root}: found 12 images, 1 CVAT XML files; the folder contains annotations.xml, "
        f"images; export them as COCO or YOLO; {_EXPECTED}",
        by_hand="2: export again",
    ),
    Format(
        *("Table of boxes", "`labels.csv`, `images/`", "rfcn", table_of_boxes),
        message="{root}: found 12 images, 1 tables (.csv); the folder contains images, labels.csv; "
        f"convert the tables to COCO; {_EXPECTED}",
        by_hand="10: a script",
    ),
    Format(
        *("Boxes for DeepLab", "`a.jpg`, `a.xml`", "deeplab", labelimg),
        message="{root}: expected masks, but found boxes; train rfcn or another detector, or add "
        "masks (expected a data set with leftImg8bit/ and gtFine/",
        by_hand="0: train rfcn",
    ),
)


def write(it: Format, out: Path, data: Path) -> Written:
    """Writes a format into its folder in `out`."""
    return it.write(out / it.folder, data)


# The table and the pictures of the documentation.


def table(out: Path) -> str:
    """Markdown table of all formats in `out`."""
    rows = [("from", "files", "command", "result", "by hand, minutes")]
    rows += [("---",) * 5]
    rows += [
        (it.title, it.files, f"`{it.command}`", _result(it, out), it.by_hand) for it in FORMATS
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _result(it: Format, out: Path) -> str:
    try:
        images = {split: it.open(out, split) for split in it.splits(out)}
    except (ValueError, OSError) as error:
        text = str(error).replace(f"{out}{os.sep}", "")
        shown, more, _ = text.partition("expected a data set with")
        return f"`{shown.rstrip(' (;')}{' ...' if more else ''}`"
    (classes,) = {it.classes for it in images.values()}
    sizes = ", ".join(f"{split} {len(split_images)}" for split, split_images in images.items())
    return f"{sizes}; {len(classes)} class{'es' if len(classes) > 1 else ''}"


_HEIGHT = 280  # of a picture


def pictures(folder: Path, data: Path) -> None:
    """Draws each kind of annotation on images of BCCD (MIT license) and of nuclei (CC0)."""
    cells = open_detection(data / "bccd_voc", "train")
    image, target = cells[8]
    nuclei = open_segmentation(data / "nuclei_coco", "val_small")
    tissue, mask = nuclei[78]
    regions = np.asarray(mask) == 1
    photo = Image.fromarray(np.moveaxis(np.asarray(tissue), 0, -1))
    drawn = {
        "boxes": [
            Image.fromarray(np.moveaxis(np.asarray(image), 0, -1)),
            draw_boxes(image, target.boxes, target.labels, cells.classes),
        ],
        "masks": [photo, Image.fromarray(regions), overlay(tissue, mask, nuclei.classes)],
        "polygons": [photo, _drawn_polygons(photo, regions)],
        "classes": _crops(cells),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, panels in drawn.items():
        _side_by_side(panels).save(folder / f"own-{name}.png", optimize=True)


def _drawn_polygons(photo: Image.Image, regions: np.ndarray) -> Image.Image:
    """A photo with the outlines of regions, at twice its size."""
    picture = photo.resize((2 * photo.width, 2 * photo.height))
    draw = ImageDraw.Draw(picture)
    for line in _polygons(regions):
        step = max(1, len(line) // 12)  # as few corners as people click
        corners = [(2 * x, 2 * y) for x, y in line[::step]]
        draw.polygon(corners, outline="yellow", width=2)
        for x, y in corners:
            draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill="black", outline="yellow")
    return picture


def _crops(cells) -> list[Image.Image]:
    """One object of each class, with the name of its folder below."""
    crops: dict[str, Image.Image] = {}
    for image, target in map(cells.__getitem__, range(10)):
        for box, label in zip(target.boxes.int().tolist(), target.labels.tolist(), strict=True):
            x1, y1, x2, y2 = box
            pixels = np.moveaxis(np.asarray(image)[:, y1:y2, x1:x2], 0, -1)
            crop = Image.fromarray(pixels).resize((_HEIGHT - 30, _HEIGHT - 30))
            crops.setdefault(cells.classes[label], crop)
    framed = []
    for name, crop in sorted(crops.items()):
        panel = Image.new("RGB", (_HEIGHT, _HEIGHT), "white")
        panel.paste(crop, (15, 0))
        font = ImageFont.load_default(size=18)
        ImageDraw.Draw(panel).text((15, _HEIGHT - 25), f"{name}/", fill="black", font=font)
        framed.append(panel)
    return framed


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    resized = [
        panel.convert("RGB").resize((round(panel.width * _HEIGHT / panel.height), _HEIGHT))
        for panel in panels
    ]
    width = sum(panel.width + 8 for panel in resized) - 8
    joined = Image.new("RGB", (width, _HEIGHT), "white")
    x = 0
    for panel in resized:
        joined.paste(panel, (x, 0))
        x += panel.width + 8
    return joined.quantize(128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    data = Path(os.environ["DEFORMNET_DATA"])
    for it in FORMATS:
        if not (arguments.out / it.folder).exists():
            write(it, arguments.out, data)
    if arguments.table:
        print(table(arguments.out), end="")
    if arguments.pictures:
        pictures(arguments.out / "pictures", data)


if __name__ == "__main__":
    main()
