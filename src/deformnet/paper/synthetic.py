"""Synthetic images in the layout, and with the classes, of the data sets of the paper."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Cityscapes

from deformnet._files import replacing, write_file
from deformnet.data.synthetic import Scene, Shapes, scene
from deformnet.data.voc_files import VOC_CLASSES
from deformnet.paper.rows import CITYSCAPES, COCO, IMAGENET, VOC_DETECTION, DataSet

_IMAGES = 2  # per split
_FOLDER_PIXELS = 32  # side of the placeholders of an image folder

# Label of a shape -> Cityscapes' id of the class with that train id.
_CITYSCAPES_IDS = np.zeros(256, dtype=np.uint8)
for _class in Cityscapes.classes:
    if 0 <= _class.train_id < CITYSCAPES.classes:
        _CITYSCAPES_IDS[_class.train_id] = _class.id


def write_synthetic_data(data: DataSet, root: Path, height: int, width: int) -> None:
    """Write two images for each split of a data set, with the files that its readers expect.

    All classes of the data set are declared, so that a network has its full size; shapes of a few
    kinds represent the objects.
    Existing files are overwritten.
    """
    scenes = _scenes(height, width)
    if data is COCO:
        _write_coco(root, scenes)
    elif data is CITYSCAPES:
        _write_cityscapes(root, scenes)
    elif data is IMAGENET:
        _write_folders(root, data.classes, scenes)
    elif data is VOC_DETECTION:
        for year, split in (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test")):
            _write_voc(root / "VOCdevkit" / year, "Main", split, scenes)
    else:
        for split in (data.train, data.test):
            _write_voc(root / "VOCdevkit/VOC2012", "Segmentation", split, scenes)


def _scenes(height: int, width: int) -> Iterator[Scene]:
    shapes = Shapes(height=height, width=width, objects=(2, 4), radius=(0.1, 0.4))
    return (scene(shapes, "train", number) for number in itertools.count())


def _write_voc(year: Path, kind: str, split: str, scenes: Iterator[Scene]) -> None:
    names = [f"{year.name}_{split}_{number}" for number in range(_IMAGES)]
    for name, drawn in zip(names, scenes, strict=False):
        _save(drawn.image, year / f"JPEGImages/{name}.jpg")
        if kind == "Main":
            _write(year / f"Annotations/{name}.xml", _annotation(drawn))
        else:
            _save(drawn.labels, year / f"SegmentationClass/{name}.png")
    _write(year / f"ImageSets/{kind}/{split}.txt", "\n".join(names))


def _annotation(drawn: Scene) -> str:
    height, width, _ = drawn.image.shape
    objects = []
    for item in drawn.objects:
        x1, y1, x2, y2 = item.box
        objects.append(
            f"<object><name>{VOC_CLASSES[item.label]}</name><difficult>0</difficult>"
            f"<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    size = f"<size><height>{height}</height><width>{width}</width></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def _write_coco(root: Path, scenes: Iterator[Scene]) -> None:
    categories = [{"id": n + 1, "name": f"category {n + 1}"} for n in range(COCO.classes)]
    for place, split in enumerate((*COCO.train.split("+"), COCO.test)):
        images, annotations = [], []
        for number in range(place * _IMAGES, (place + 1) * _IMAGES):  # no id in two files
            drawn = next(scenes)
            file = f"{split}_{number}.jpg"
            _save(drawn.image, root / split / file)
            height, width, _ = drawn.image.shape
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            for item in drawn.objects:
                x1, y1, x2, y2 = item.box
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": item.area, "iscrowd": 0}
                ids = {"image_id": number, "category_id": item.label}
                annotations.append({"id": len(annotations) + 1, **ids, **box})
        content = {"images": images, "categories": categories}
        kind = "image_info"
        if split != COCO.test:
            kind, content = "instances", content | {"annotations": annotations}
        _write(root / f"annotations/{kind}_{split}.json", json.dumps(content, default=int))


def _write_cityscapes(root: Path, scenes: Iterator[Scene]) -> None:
    for split in (CITYSCAPES.train, CITYSCAPES.test):
        for number in range(_IMAGES):
            drawn = next(scenes)
            name = f"{split}/synthetic/synthetic_{number:06d}_000000"
            _save(drawn.image, root / f"leftImg8bit/{name}_leftImg8bit.png")
            ids = _CITYSCAPES_IDS[drawn.labels]
            _save(ids, root / f"gtFine/{name}_gtFine_labelIds.png")


def _write_folders(root: Path, classes: int, scenes: Iterator[Scene]) -> None:
    """Write an image folder: a scene for the first class, placeholders for the others."""
    small = np.zeros((_FOLDER_PIXELS, _FOLDER_PIXELS, 3), dtype=np.uint8)
    for split in (IMAGENET.train, IMAGENET.test):
        for number in range(classes if split == IMAGENET.train else 1):
            _save(small if number else next(scenes).image, root / f"{split}/n{number:08d}/0.jpg")


def _save(pixels: np.ndarray, path: Path) -> None:
    with replacing(path, durable=False) as file:
        Image.fromarray(pixels).save(file, Image.registered_extensions()[path.suffix])


def _write(path: Path, text: str) -> None:
    write_file(path, text.encode(), durable=False)
