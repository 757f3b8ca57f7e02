"""Synthetic images in the layout, and with the classes, of the data sets of the paper."""

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from torchvision.datasets import Cityscapes

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

    Args:
        data: data set.
        root: folder; existing files are overwritten.
        height, width: image size in pixels.
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
            _write_voc_boxes(root / "VOCdevkit" / year, split, scenes)
    else:
        for split in (data.train, data.test):
            _write_voc_masks(root / "VOCdevkit/VOC2012", split, scenes)


def _scenes(height: int, width: int) -> Iterator[Scene]:
    shapes = Shapes(height=height, width=width, objects=(2, 4), radius=(0.1, 0.4))
    number = 0
    while True:
        yield scene(shapes, "train", number)
        number += 1


def _write_voc_masks(folder: Path, split: str, scenes: Iterator[Scene]) -> None:
    names = []
    for number in range(_IMAGES):
        drawn = next(scenes)
        names.append(f"{split}_{number}")
        _save(drawn.image, folder / f"JPEGImages/{names[-1]}.jpg")
        _save(drawn.labels, folder / f"SegmentationClass/{names[-1]}.png")
    _write(folder / f"ImageSets/Segmentation/{split}.txt", "\n".join(names))


def _write_voc_boxes(folder: Path, split: str, scenes: Iterator[Scene]) -> None:
    names = []
    for number in range(_IMAGES):
        drawn = next(scenes)
        names.append(f"{folder.name}_{split}_{number}")
        _save(drawn.image, folder / f"JPEGImages/{names[-1]}.jpg")
        root = ElementTree.Element("annotation")
        size = ElementTree.SubElement(root, "size")
        for tag, value in zip(("height", "width", "depth"), drawn.image.shape, strict=True):
            ElementTree.SubElement(size, tag).text = str(value)
        for item in drawn.objects:
            element = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(element, "name").text = VOC_CLASSES[item.label]
            ElementTree.SubElement(element, "difficult").text = "0"
            box = ElementTree.SubElement(element, "bndbox")
            x1, y1, x2, y2 = item.box
            edges = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}
            for tag, value in edges.items():
                ElementTree.SubElement(box, tag).text = str(value)
        _write(folder / f"Annotations/{names[-1]}.xml", ElementTree.tostring(root, "unicode"))
    _write(folder / f"ImageSets/Main/{split}.txt", "\n".join(names))


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
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": item.label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": item.area,
                        "iscrowd": 0,
                    }
                )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
