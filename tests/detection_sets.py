"""Writers of small detection data sets."""

import json
from pathlib import Path

from small_sets import save_image, write_list

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>
<difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox></object>"""
SIZE = "<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


def voc_object(box, name="one", difficult=0):
    return OBJECT.format(*box, name=name, difficult=difficult)


def voc_xml(*objects, height=12, width=16):
    size = SIZE.format(height=height, width=width)
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write_voc_images(year: Path, contents, height=12, width=16, seed=0) -> None:
    """Images by name, with their objects."""
    for number, (name, objects) in enumerate(contents.items(), seed):
        save_image(year / f"JPEGImages/{name}.jpg", height, width, number)
        xml = voc_xml(*objects, height=height, width=width)
        write_list(year / f"Annotations/{name}.xml", [xml])


def write_voc(root: Path) -> Path:
    """Images a, b (12 x 16) in train, c in val; a has two objects, b none, c a difficult one."""
    year = root / "VOCdevkit/VOC2012"
    contents = {
        "a": [voc_object((3, 2, 9, 10)), voc_object((1, 1, 16, 12), "two")],
        "b": [],
        "c": [voc_object((4, 5, 6, 7), "two", difficult=1)],
    }
    write_voc_images(year, contents)
    write_list(year / "ImageSets/Main/train.txt", "ab")
    write_list(year / "ImageSets/Main/val.txt", "c")
    write_list(root / "classes.txt", ["one", "two"])
    return root


def coco_content() -> dict:
    """Images 7 (three objects, one of them a crowd), 3 (none) and 5 (one), 12 x 16."""
    rle = {"size": [12, 16], "counts": [12, 24, 156]}
    outline = [[2, 1, 9, 1, 9, 10]]
    objects = [
        coco_object(1, 7, 4, [2, 1, 7, 9], segmentation=outline),
        coco_object(2, 5, 90, [0, 0, 16, 12], segmentation=outline),
        coco_object(3, 7, 90, [1, 0, 2, 12], iscrowd=1, segmentation=rle),
        coco_object(4, 7, 4, [0.5, 1.25, 3.5, 0.5], segmentation=outline),
    ]
    return coco({i: f"{i:04d}.jpg" for i in (7, 3, 5)}, {90: "two", 4: "one"}, objects)


def coco(images: dict[int, str], categories: dict[int, str], objects, size=(12, 16)) -> dict:
    """Annotations in the COCO format, from file names and categories by id."""
    size = {"height": size[0], "width": size[1]}
    return {
        "images": [{"id": i, "file_name": name, **size} for i, name in images.items()],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
        "annotations": objects,
    }


def coco_object(number, image, category, box, **more):
    ids = {"id": number, "image_id": image, "category_id": category}
    return {**ids, "bbox": box, "iscrowd": 0, "area": box[2] * box[3], **more}


def write_coco(root: Path, content: dict, split: str = "train", images: str = "train") -> Path:
    path = root / f"annotations/instances_{split}.json"
    write_list(path, [json.dumps(content)])
    for entry in content["images"]:
        size = entry.get("height") or 12, entry.get("width") or 16
        save_image(root / images / entry["file_name"], *size, entry["id"])
    return path
