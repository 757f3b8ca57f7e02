"""Files of detections: our own format and the benchmarks'.

Our own (`.jsonl`) has one line for each image, in json:

    {"image": "2007_000027", "boxes": [[174.2, 101, 349, 351.5]], "scores": [0.98],
     "classes": ["person"]}

`image` is the image's name in its set, or a file name. Boxes are x1, y1, x2, y2, edges in pixels of
the image: the first pixel is the box 0, 0, 1, 1. An image without detections has empty lists.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from deformnet._errors import UserError
from deformnet._files import (
    MAX_ANNOTATION_BYTES,
    matching,
    naming,
    parse_json,
    read_lines,
    replacing,
    require_file,
)


class Record(NamedTuple):
    """The detections of an image of this name."""

    image: str
    boxes: Tensor | np.ndarray
    """float32 [d, 4], edges x1 y1 x2 y2 in pixels."""
    scores: Tensor | np.ndarray
    """[d]."""
    classes: Sequence[str]
    """The name of each detection's class, d."""


def to_line(record: Record) -> str:
    """A line of our own format, without the newline. Numbers are written as float32."""
    boxes = [short_floats(box) for box in np.asarray(record.boxes, np.float32)]
    scores = short_floats(np.asarray(record.scores, np.float32))
    content = {"image": record.image, "boxes": boxes, "scores": scores}
    return json.dumps({**content, "classes": list(record.classes)})


def write_detections(path: Path, records: Iterable[Record]) -> None:
    """Writes a file in our own format, as a whole or not at all."""
    with replacing(path) as file:
        file.writelines(f"{to_line(record)}\n".encode() for record in records)


def read_detections(path: Path, classes: Collection[str] = ()) -> list[Record]:
    """Reads detections that name their images, one record for each image.

    `path` is one of

    - a `.jsonl` file in our own format;
    - a folder of VOC result files, `<run>_det_<split>_<class>.txt`, with a line
      `image score x1 y1 x2 y2` for each detection: first and last pixel, counted from 1;
    - a folder of text files `<image>.txt`, with a line `class score x y width height` for each
      detection: from pixel x to pixel x + width, counted from 1 as VOC does (so it is read by
      Padilla et al. 2020, "A survey on performance metrics for object-detection algorithms").

    COCO's result files number images and classes; `deformnet.tasks.scoring.score` reads them.

    Args:
        classes: known class names. The class of a VOC result file is the longest of them that the
            file name ends with, or else the part behind the last underscore.
    Raises:
        FileNotFoundError: if there is no such file or folder, or no text file in the folder.
        UserError: one line that names the file, for an unknown format, malformed or truncated
            content, an image that comes twice, and numbers that are NaN or infinite.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = _text_files(path)
        if any("_det_" in file.name for file in files):
            return _read_voc_results(files, classes)
        return [_read_text(file, scored=True) for file in files]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix != ".jsonl":
        raise UserError(
            f"{path}: expected detections with image names, a .jsonl file or a folder of .txt files"
        )
    return _read_json_lines(path)


def read_objects(folder: Path) -> list[Record]:
    """Reads ground truth: text files `<image>.txt` with a line `class x y width height` an object.

    Raises:
        FileNotFoundError, UserError: as `read_detections`.
    """
    return [_read_text(file, scored=False) for file in _text_files(folder)]


def _read_json_lines(path: Path) -> list[Record]:
    require_file(path)
    detections: dict[str, Record] = {}
    with naming(path), path.open("rb") as file:
        lines = iter(partial(file.readline, MAX_ANNOTATION_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = _from_line(line.decode("utf-8-sig"))
            except ValueError as error:  # broken json and other encodings are that, too
                raise UserError(f"{path}: line {number}: {error}") from error
            if record.image in detections:
                raise UserError(
                    f"{path}: line {number}: expected each image once, "
                    f"but got {record.image!r} again"
                )
            detections[record.image] = record
    if not detections:
        raise UserError(f"{path}: expected a line for each image, but the file is empty")
    return list(detections.values())


def _from_line(line: str) -> Record:
    content = parse_json(line)
    keys = ("image", "boxes", "scores", "classes")
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise ValueError(f"expected {', '.join(keys)}, but got {str(content)[:100]}")
    image, boxes, scores, classes = (content[key] for key in keys)
    if not isinstance(image, str):
        raise ValueError(f"expected image to be a name, but got {image}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"expected classes to be a list of names, but got {str(classes)[:100]}")
    return _checked(image, boxes, scores, classes)


def _read_voc_results(files: Sequence[Path], classes: Collection[str]) -> list[Record]:
    by_image: dict[str, list[tuple[str, list[float]]]] = {}
    by_class: dict[str, Path] = {}
    for file in files:
        _, separator, tail = file.stem.partition("_det_")
        names = [name for name in classes if tail.endswith(f"_{name}")]
        name = max(names, key=len, default=tail.rpartition("_")[2])
        if not separator or name == tail:
            raise UserError(f"{file}: expected a name like <run>_det_<split>_<class>.txt")
        if name in by_class:
            raise UserError(
                f"{file}: expected one file for each class, but {by_class[name].name} "
                f"is also of class {name!r}"
            )
        by_class[name] = file
        for line in read_lines(file):
            image, numbers = _fields(file, line, "image score x1 y1 x2 y2")
            by_image.setdefault(image, []).append((name, numbers))
    return [_from_pixels(files[0].parent, image, rows) for image, rows in by_image.items()]


def _read_text(file: Path, *, scored: bool) -> Record:
    """The boxes of one image; without scores in the file, each is 1."""
    form = "class score x y width height" if scored else "class x y width height"
    rows = []
    for line in read_lines(file):
        name, (*scores, x, y, width, height) = _fields(file, line, form)
        rows.append((name, [*(scores or [1.0]), x, y, x + width, y + height]))
    return _from_pixels(file, file.stem, rows)


def _from_pixels(source: Path, image: str, rows: Sequence[tuple[str, list[float]]]) -> Record:
    """From class, score, and first and last pixel counted from 1."""
    numbers = np.array([row for _, row in rows], dtype=np.float64).reshape(-1, 5)
    edges = numbers[:, 1:] - (1, 1, 0, 0)
    try:
        return _checked(image, edges, numbers[:, 0], [name for name, _ in rows])
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _checked(image: str, boxes: Any, scores: Any, classes: Sequence[str]) -> Record:
    try:
        # Scores in double precision: files may tell apart what float32 does not.
        edges, values = np.asarray(boxes, np.float32), np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{image}: expected boxes and scores to be numbers ({error})") from error
    if edges.size == 0:
        edges = edges.reshape(0, 4)
    if edges.shape != (len(classes), 4) or values.shape != (len(classes),):
        raise ValueError(
            f"{image}: expected boxes [n, 4], scores [n] and n classes, but got "
            f"{list(edges.shape)}, {list(values.shape)} and {len(classes)}"
        )
    for name, array in (("scores", values), ("boxes", edges)):
        if not np.isfinite(array).all():
            raise ValueError(f"{image}: expected finite {name}, but got NaN or infinity")
    inverted = (edges[:, 2:] < edges[:, :2]).any(1)
    if inverted.any():
        raise ValueError(
            f"{image}: expected boxes x1 y1 x2 y2, but box {edges[inverted][0].tolist()} "
            "ends before it begins"
        )
    return Record(image, edges, values, classes)


def _fields(file: Path, line: str, form: str) -> tuple[str, list[float]]:
    """The first field of a line, which may contain spaces, and the numbers after it."""
    count = len(form.split())
    name, *texts = line.rsplit(maxsplit=count - 1)
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count - 1 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{file}: expected lines like {form!r}, but got {line!r}")
    return name, numbers


def _text_files(folder: Path) -> list[Path]:
    files = sorted(matching(folder, "*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .txt file in this folder")
    return files


def short_floats(numbers: np.ndarray) -> list[float]:
    """float32 numbers with as few digits as distinguish them."""
    return [float(str(number)) for number in numbers]
