"""Detection files for other programs, written during inference.

They contain all boxes with their scores, including boxes that are not drawn:

- `jsonl`: `detections.jsonl`, deformnet's format; see `deformnet.metrics.detections`.
- `coco`: `detections.json`, a data set in COCO's format whose annotations have scores. The list of
  annotations is also valid in COCO's result format.
- `yolo`: `labels/photo.txt` for each image, lines `class x y width height score`: the index of the
  class in `classes.txt`, and center and size of the box as fractions of the image's size.
- `csv`: `detections.csv`, a table with a row for each box: image, class, score, x1, y1, x2, y2.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deformnet._errors import UserError
from deformnet._files import read_file, replacing, write_file
from deformnet.metrics.detections import Record, to_line
from deformnet.tasks.detection.data import Boxes
from deformnet.tasks.results import BoxFormat

AddBoxes = Callable[[str, str, Boxes], object]


@contextmanager
def listing_boxes(out: Path, box_format: BoxFormat, classes: Sequence[str]) -> Iterator[AddBoxes]:
    """Writes the boxes of images to a folder; a file for all images is replaced at the end.

    Yields:
        A function that takes the name of an image, the path of its results, and its boxes.
    Raises:
        UserError: if there is a list of other classes, which the data set may need.
    """
    match box_format:
        case "jsonl":
            with replacing(out / "detections.jsonl") as file:
                yield lambda name, _, boxes: file.write(_encoded(f"{_json_line(name, boxes)}\n"))
        case "csv":
            with replacing(out / "detections.csv") as file:
                file.write(_rows([("image", "class", "score", "x1", "y1", "x2", "y2")]))
                yield lambda name, _, boxes: file.write(_rows(_table(name, boxes)))
        case "yolo":
            content = _encoded("".join(f"{name}\n" for name in classes))
            if (path := out / "classes.txt").exists() and read_file(path) != content:
                raise UserError(
                    f"{path}: expected the classes of this network, but got others, perhaps of a "
                    "data set; choose another folder for the results"
                )
            with replacing(path) as file:
                file.write(content)
                yield lambda _, result, boxes: _write_yolo(out / "labels" / f"{result}.txt", boxes)
        case "coco":
            with _coco(out / "detections.json", classes) as add:
                yield add


def _json_line(name: str, boxes: Boxes) -> str:
    assert boxes.scores is not None
    return to_line(Record(name, boxes.boxes, boxes.scores, boxes.names))


def _table(name: str, boxes: Boxes) -> list[tuple[object, ...]]:
    values = boxes.to_dict()
    columns = zip(values["classes"], values["scores"], values["boxes"], strict=True)
    return [(name, class_name, score, *box) for class_name, score, box in columns]


def _rows(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def _write_yolo(path: Path, boxes: Boxes) -> None:
    height, width = boxes.size
    lines = []
    scores = boxes.to_dict()["scores"]
    for label, (x1, y1, x2, y2), score in zip(
        boxes.labels.tolist(), boxes.boxes.tolist(), scores, strict=True
    ):
        place = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        size = ((x2 - x1) / width, (y2 - y1) / height)
        numbers = " ".join(f"{number:.6f}" for number in (*place, *size))
        lines.append(f"{label} {numbers} {score}\n")
    write_file(path, _encoded("".join(lines)))


@contextmanager
def _coco(path: Path, classes: Sequence[str]) -> Iterator[AddBoxes]:
    """Writes annotations one by one, since those of a long video may not fit in memory."""
    images: list[dict[str, Any]] = []
    count = 0
    with replacing(path) as file:
        file.write(b'{"annotations": [')

        def add(name: str, _: str, boxes: Boxes) -> None:
            nonlocal count
            height, width = boxes.size
            images.append(
                {"id": len(images) + 1, "file_name": name, "height": height, "width": width}
            )
            for result in boxes.to_coco(len(images)):
                area = result["bbox"][2] * result["bbox"][3]
                annotation = {"id": count + 1, **result, "area": area, "iscrowd": 0}
                file.write(b",\n" if count else b"\n")
                file.write(json.dumps(annotation).encode())
                count += 1

        yield add
        categories = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
        rest = {"images": images, "categories": categories}
        file.write(f"\n], {json.dumps(rest)[1:]}\n".encode())


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")
