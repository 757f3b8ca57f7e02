"""Writers of small detection data sets."""

import json
from pathlib import Path

from small_sets import save_image

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>
<difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox></object>"""
SIZE = "<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


def voc_object(box, name="one", difficult=0):
    return OBJECT.format(*box, name=name, difficult=difficult)


def voc_xml(*objects, height=12, width=16):
    size = SIZE.format(height=height, width=width)
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write_voc(root: Path) -> Path:
    """Images a, b (12 x 16) in train, c in val; a has two objects, b none, c a difficult one."""
    folder = root / "VOCdevkit/VOC2012"
    contents = {
        "a": (voc_object((3, 2, 9, 10)), voc_object((1, 1, 16, 12), "two")),
        "b": (),
        "c": (voc_object((4, 5, 6, 7), "two", difficult=1),),
    }
    (folder / "Annotations").mkdir(parents=True)
    for seed, (name, objects) in enumerate(contents.items()):
        save_image(folder / f"JPEGImages/{name}.jpg", seed=seed)
        (folder / f"Annotations/{name}.xml").write_text(voc_xml(*objects))
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    (root / "classes.txt").write_text("one\ntwo\n")
    return root


def coco_content() -> dict:
    """Images 7 (three objects, one of them a crowd), 3 (none) and 5 (one), 12 x 16."""
    rle = {"size": [12, 16], "counts": [12, 24, 156]}
    outline = [[2, 1, 9, 1, 9, 10]]
    return {
        "images": [
            {"id": i, "file_name": f"{i:04d}.jpg", "height": 12, "width": 16} for i in (7, 3, 5)
        ],
        "categories": [{"id": 90, "name": "two"}, {"id": 4, "name": "one"}],
        "annotations": [
            _coco_object(1, 7, 4, [2, 1, 7, 9], outline),
            _coco_object(2, 5, 90, [0, 0, 16, 12], outline),
            _coco_object(3, 7, 90, [1, 0, 2, 12], rle, iscrowd=1),
            _coco_object(4, 7, 4, [0.5, 1.25, 3.5, 0.5], outline),
        ],
    }


def _coco_object(number, image, category, box, outline, iscrowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "iscrowd": iscrowd,
        "area": box[2] * box[3],
        "segmentation": outline,
    }


def write_coco(root: Path, content: dict, split: str = "train", images: str = "train") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    path = root / f"annotations/instances_{split}.json"
    path.write_text(json.dumps(content))
    for entry in content["images"]:
        save_image(root / images / entry["file_name"], seed=entry["id"])
    return path
