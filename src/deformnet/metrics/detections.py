"""Detections on disk: our own format and the benchmarks', and their scores.

Our own (`.jsonl`) has one line for each image, in json:

    {"image": "2007_000027", "boxes": [[174.2, 101, 349, 351.5]], "scores": [0.98],
     "classes": ["person"]}

`image` is the image's name in its set, or a file name. Boxes are x1, y1, x2, y2 in pixels of the
image and say where the edges are: the first pixel is the box 0, 0, 1, 1. An image without
detections has empty lists.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from torch import Tensor

from deformnet._files import replacing
from deformnet.data.boxes import DetectionDataset
from deformnet.data.coco import COCODetection
from deformnet.data.detection import detection_splits, open_detection
from deformnet.data.files import read_lines
from deformnet.metrics.coco import coco_ap, coco_table
from deformnet.metrics.voc import Found, Method, Truth, voc_ap, voc_table

_IMAGE_FILES = (".jpg", ".jpeg", ".png")


class Record(NamedTuple):
    """What was found in one image."""

    image: str
    """Its name."""
    boxes: Tensor | np.ndarray
    """float32 [d, 4], edges x1 y1 x2 y2 in pixels."""
    scores: Tensor | np.ndarray
    """[d]."""
    classes: Sequence[str]
    """The name of each detection's class, d."""


def to_line(record: Record) -> str:
    """The line of our own format, without the line's end. Numbers are written as float32."""
    return json.dumps(
        {
            "image": record.image,
            "boxes": [_short(box) for box in np.asarray(record.boxes, np.float32)],
            "scores": _short(np.asarray(record.scores, np.float32)),
            "classes": list(record.classes),
        }
    )


def write_detections(path: Path, records: Iterable[Record]) -> None:
    """Writes our own format. The file appears when it is whole: none is left half written."""
    with replacing(path) as file:
        file.writelines(f"{to_line(record)}\n".encode() for record in records)


def write_submission(
    folder: Path, records: Sequence[Record], dataset: COCODetection, name: str
) -> Path:
    """Writes the json file that COCO's server scores: numbers for images and classes, x y w h.

    Args:
        folder: where to write `detections_<split>_<name>_results.json`, as the server wants it
            called (in a zip file of the same name).
        records: at most one for each image. Numbers are written as float32.
        dataset: the images, with objects (val2017) or without (test-dev2017).
        name: of the method; letters, digits, dots, dashes and underscores.
    Returns:
        The file.
    Raises:
        ValueError: for detections of images or classes that the data set has not, for a sum of
            splits and for another name.
    """
    if not name or not all(sign.isalnum() or sign in "._-" for sign in name):
        raise ValueError(f"name: wanted letters, digits, dots, dashes, underscores, got {name!r}")
    if len(dataset.annotation_files) > 1:
        raise ValueError(f"{dataset.split}: a submission is for one split")
    known = _COCOTruth(dataset.annotation_files, *_ids(dataset))
    path = folder / f"detections_{dataset.split}_{name}_results.json"
    by_name = _known(records, known, "detections")
    with replacing(path) as output:
        output.write(b"[")
        for number, result in enumerate(_to_results(by_name, known)):
            result["bbox"] = _short(np.asarray(result["bbox"], np.float32))
            (result["score"],) = _short(np.asarray([result["score"]], np.float32))
            output.write(b",\n" if number else b"\n")
            output.write(json.dumps(result).encode())
        output.write(b"\n]\n")
    return path


def read_detections(path: Path, classes: Collection[str] = ()) -> list[Record]:
    """Reads detections that name their images; each image comes once.

    `path` is one of

    - a `.jsonl` file in our own format;
    - a folder of VOC result files, `<run>_det_<split>_<class>.txt`, with a line
      `image score x1 y1 x2 y2` for each detection: its first and last pixel, counted from 1;
    - a folder of text files `<image>.txt`, with a line `class score x y width height` for each
      detection: from pixel x to pixel x + width, counted from 1 as VOC does (so it is read by
      Padilla et al. 2020, "A survey on performance metrics for object-detection algorithms").

    COCO's result files give numbers to images and classes; `score` reads them.

    Args:
        classes: known class names: a VOC result file is of the longest one that its name ends
            with. If there is none the class is what follows the last underscore.
    Raises:
        FileNotFoundError: if there is no such file or folder, or no text file in the folder.
        ValueError: one line that names the file, for another format, malformed or truncated
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
        raise ValueError(
            f"{path}: wanted detections with names, a .jsonl file or a folder of .txt files"
        )
    return _read_json_lines(path)


def score(
    boxes: Path, data: Path, *, split: str | None = None, ious: Sequence[float] = (0.5, 0.7)
) -> dict[str, Any]:
    """Scores detections from files as the benchmark of the data does.

    Args:
        boxes: what `read_detections` reads, or for COCO data also a `.json` file in COCO's result
            format.
        data: the ground truth: a folder in the VOC or the COCO layout, a COCO json file of
            annotations, or a folder of text files `<image>.txt` with a line
            `class x y width height` for each object (see `read_detections`).
        split: the part of a folder in the VOC or the COCO layout; others have none.
        ious: thresholds of VOC AP. COCO's are fixed.
    Returns:
        As `score_records`, with VOC AP in both methods.
    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: one line that says which file is malformed; for detections of images or classes
            that are not in the ground truth.
    """
    boxes, data = Path(boxes).expanduser(), Path(data).expanduser()
    truth = _open(data, split)
    if boxes.suffix != ".json":
        records = read_detections(boxes, truth.classes)
        return _score(records, truth, str(boxes), ious, get_args(Method))
    if isinstance(truth, _NamedTruth):
        raise ValueError(
            f"{boxes}: COCO results give images by number, but {data} is not COCO data; "
            "wanted a .jsonl file or a folder of .txt files"
        )
    results = _read_json(boxes)
    if not isinstance(results, list):
        raise ValueError(f"{boxes}: wanted COCO results, a list of detections")
    return _score_results(results, truth, str(boxes))


def score_records(
    records: Sequence[Record],
    dataset: DetectionDataset,
    *,
    ious: Sequence[float] = (0.5, 0.7),
    method: Method,
) -> dict[str, Any]:
    """Scores detections in memory: COCO AP for COCO data, VOC AP for other.

    Args:
        records: at most one for each image.
        dataset: the ground truth.
        ious: thresholds of VOC AP. COCO's are fixed.
        method: of VOC AP.
    Returns:
        Plain numbers for a JSON file, None for NaN: "images" in the set, "images_with_detections"
        (fewer than expected hint at detections that are not complete), "detections", and either
        "coco" with the numbers of `coco_ap` or "voc" with those of `VOCScores.to_json` by method.
    Raises:
        ValueError: for detections of images or classes that are not in the ground truth.
    """
    return _score(records, _truth_of(dataset), "detections", ious, (method,))


def score_table(scores: Mapping[str, Any]) -> str:
    """What `score` and `score_records` return, as text."""
    counts = (
        f"{scores['detections']} detections in {scores['images_with_detections']} of "
        f"{scores['images']} images"
    )
    if "coco" in scores:
        return f"{counts}\n\n{coco_table(scores['coco'])}"
    tables = [voc_table(of_method, method) for method, of_method in scores["voc"].items()]
    return "\n\n".join([counts, *tables])


class _NamedTruth(NamedTuple):
    """Ground truth for VOC AP."""

    images: dict[str, Truth]
    classes: tuple[str, ...]


class _COCOTruth(NamedTuple):
    """Ground truth for COCO AP: the files, and the ids behind the names in them."""

    files: tuple[Path, ...]
    images: dict[str, int]
    classes: dict[str, int]


def _open(data: Path, split: str | None) -> _NamedTruth | _COCOTruth:
    if data.is_dir():
        try:
            splits = detection_splits(data)
        except FileNotFoundError:
            if not any(data.glob("*.txt")):
                raise
        else:
            if split is None:
                known = ", ".join(splits) or "none"
                raise ValueError(f"{data}: wanted a split (--split); those here are: {known}")
            return _truth_of(open_detection(data, split))
    if split is not None:
        raise ValueError(f"{data}: has no splits, got {split!r}")
    if data.is_dir():
        return _open_texts(data)
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such file or folder")
    return _open_coco(data)


def _truth_of(dataset: DetectionDataset) -> _NamedTruth | _COCOTruth:
    if isinstance(dataset, COCODetection):
        if not dataset.has_ground_truth:
            raise ValueError(
                f"{dataset.annotation_files[0]}: {dataset.split} has no truth to score with; "
                "`deformnet evaluate` writes a file for its server"
            )
        return _COCOTruth(dataset.annotation_files, *_ids(dataset))
    truths = {dataset.name(i): Truth(*dataset.annotations(i)) for i in range(len(dataset))}
    return _NamedTruth(truths, dataset.classes)


def _ids(dataset: COCODetection) -> tuple[dict[str, int], dict[str, int]]:
    """The ids behind the names of images and classes."""
    names = [dataset.name(i) for i in range(len(dataset))]
    images = dict(zip(names, dataset.image_ids.tolist(), strict=True))
    return images, dict(zip(dataset.classes, dataset.category_ids, strict=True))


def _open_texts(data: Path) -> _NamedTruth:
    objects = [_read_text(file, scored=False) for file in _text_files(data)]
    classes = tuple(sorted({name for record in objects for name in record.classes}))
    if not classes:
        raise ValueError(f"{data}: no object in any of the {len(objects)} text files")
    truths = {}
    for record in objects:
        labels = np.array([classes.index(name) for name in record.classes], dtype=np.int64)
        truths[record.image] = Truth(record.boxes, labels, np.zeros(len(labels), dtype=bool))
    return _NamedTruth(truths, classes)


def _open_coco(file: Path) -> _COCOTruth:
    """A json file alone: the images themselves need not be there."""
    content = _read_json(file)
    try:
        ids = [int(image["id"]) for image in content["images"]]
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        categories = {category["name"]: category["id"] for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not COCO annotations ({error!r})") from error
    # The names that COCODetection gives.
    names = stems if len(set(stems)) == len(stems) else map(str, ids)
    return _COCOTruth((file,), dict(zip(names, ids, strict=True)), categories)


def _score(
    records: Sequence[Record],
    truth: _NamedTruth | _COCOTruth,
    source: str,
    ious: Sequence[float],
    methods: Sequence[Method],
) -> dict[str, Any]:
    """Scores records; errors begin with `source`."""
    known = _known(records, truth, source)
    if isinstance(truth, _COCOTruth):
        return _score_results(list(_to_results(known, truth)), truth, source)
    labels = {name: label for label, name in enumerate(truth.classes)}
    found = {
        name: Found(
            record.boxes, record.scores, np.array([labels[c] for c in record.classes], np.int64)
        )
        for name, record in known.items()
    }
    by_method = {
        method: voc_ap(truth.images, found, truth.classes, ious, method).to_json()
        for method in methods
    }
    counts = [len(record.classes) for record in known.values() if record.classes]
    return {**_counts(truth, len(counts), sum(counts)), "voc": by_method}


def _score_results(
    results: Sequence[Mapping[str, Any]], truth: _COCOTruth, source: str
) -> dict[str, Any]:
    try:
        numbers = coco_ap(truth.files, results)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with_detections = len({result["image_id"] for result in results})
    by_name = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    return {**_counts(truth, with_detections, len(results)), "coco": by_name}


def _counts(truth: _NamedTruth | _COCOTruth, images: int, detections: int) -> dict[str, int]:
    return {
        "images": len(truth.images),
        "images_with_detections": images,
        "detections": detections,
    }


def _to_results(known: Mapping[str, Record], truth: _COCOTruth) -> Iterator[dict[str, Any]]:
    """Records in COCO's result format."""
    for name, record in known.items():
        rows = zip(record.boxes.tolist(), record.scores.tolist(), record.classes, strict=True)
        for (x1, y1, x2, y2), value, class_name in rows:
            yield {
                "image_id": truth.images[name],
                "category_id": truth.classes[class_name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": value,
            }


def _known(
    records: Sequence[Record], truth: _NamedTruth | _COCOTruth, source: str
) -> dict[str, Record]:
    """Records by the names of the ground truth, which must have all their images and classes."""
    known: dict[str, Record] = {}
    unknown = []
    for record in records:
        name = record.image
        if name not in truth.images and Path(name).suffix.lower() in _IMAGE_FILES:
            name = Path(name).stem
        if name in known:
            raise ValueError(f"{source}: image {name!r} comes more than once")
        if name in truth.images:
            known[name] = record
        else:
            unknown.append(record.image)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} of {len(records)} images are not in the ground truth, "
            f"such as {unknown[0]!r}"
        )
    names = [name for record in records for name in record.classes]
    foreign = [name for name in names if name not in truth.classes]
    if foreign:
        raise ValueError(
            f"{source}: {len(foreign)} of {len(names)} detections are of classes that are not in "
            f"the ground truth, such as {foreign[0]!r}; its classes: {', '.join(truth.classes)}"
        )
    return known


def _read_json_lines(path: Path) -> list[Record]:
    detections: dict[str, Record] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = _from_line(line)
            except ValueError as error:  # broken json and other encodings are that, too
                raise ValueError(f"{path}: line {number}: {error}") from error
            if record.image in detections:
                raise ValueError(f"{path}: line {number}: {record.image!r} comes a second time")
            detections[record.image] = record
    if not detections:
        raise ValueError(f"{path}: holds no image")
    return list(detections.values())


def _from_line(line: bytes) -> Record:
    content = json.loads(line)
    wanted = ("image", "boxes", "scores", "classes")
    if not isinstance(content, dict) or any(key not in content for key in wanted):
        raise ValueError(f"wanted {', '.join(wanted)}, got {str(content)[:100]}")
    image, boxes, scores, classes = (content[key] for key in wanted)
    if not isinstance(image, str):
        raise ValueError(f"wanted the image's name, got {image}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"wanted a list of class names, got {str(classes)[:100]}")
    return _checked(image, boxes, scores, classes)


def _read_voc_results(files: Sequence[Path], classes: Collection[str]) -> list[Record]:
    by_image: dict[str, list[tuple[str, list[float]]]] = {}
    by_class: dict[str, Path] = {}
    for file in files:
        _, separator, tail = file.stem.partition("_det_")
        names = [name for name in classes if tail.endswith(f"_{name}")]
        name = max(names, key=len, default=tail.rpartition("_")[2])
        if not separator or name == tail:
            raise ValueError(f"{file}: wanted <run>_det_<split>_<class>.txt as its name")
        if name in by_class:
            raise ValueError(f"{file}: of class {name!r}, as is {by_class[name].name} beside it")
        by_class[name] = file
        for line in read_lines(file):
            image, numbers = _fields(file, line, "image score x1 y1 x2 y2")
            by_image.setdefault(image, []).append((name, numbers))
    try:
        return [_from_pixels(image, rows) for image, rows in by_image.items()]
    except ValueError as error:
        raise ValueError(f"{files[0].parent}: {error}") from error


def _read_text(file: Path, *, scored: bool) -> Record:
    """The boxes of one image; the score of each is 1 if the file has none."""
    form = "class score x y width height" if scored else "class x y width height"
    rows = []
    for line in read_lines(file):
        name, (*scores, x, y, width, height) = _fields(file, line, form)
        rows.append((name, [*(scores or [1.0]), x, y, x + width, y + height]))
    try:
        return _from_pixels(file.stem, rows)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_pixels(image: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Record:
    """From class, score, and first and last pixel counted from 1."""
    numbers = np.array([row for _, row in rows], dtype=np.float64).reshape(-1, 5)
    edges = numbers[:, 1:] - (1, 1, 0, 0)
    return _checked(image, edges, numbers[:, 0], [name for name, _ in rows])


def _checked(image: str, boxes: Any, scores: Any, classes: Sequence[str]) -> Record:
    try:
        # Scores in double precision: files may tell apart what float32 does not.
        edges, values = np.asarray(boxes, np.float32), np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{image}: wanted numbers as boxes and scores ({error})") from error
    if edges.size == 0:
        edges = edges.reshape(0, 4)
    if edges.shape != (len(classes), 4) or values.shape != (len(classes),):
        raise ValueError(
            f"{image}: wanted boxes [n, 4], scores [n] and n classes, got {list(edges.shape)}, "
            f"{list(values.shape)} and {len(classes)}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{image}: a score is NaN or infinite")
    if not np.isfinite(edges).all():
        raise ValueError(f"{image}: a box is NaN or infinite")
    inverted = (edges[:, 2:] < edges[:, :2]).any(1)
    if inverted.any():
        raise ValueError(f"{image}: box {edges[inverted][0].tolist()} ends before it begins")
    return Record(image, edges, values, classes)


def _fields(file: Path, line: str, form: str) -> tuple[str, list[float]]:
    """The first field of a line, in which there may be blanks, and the numbers behind it."""
    count = len(form.split())
    name, *texts = line.rsplit(maxsplit=count - 1)
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count - 1 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{file}: wanted {form!r} a line, got {line!r}")
    return name, numbers


def _text_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .txt file in this folder")
    return files


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as json ({error})") from error


def _short(numbers: np.ndarray) -> list[float]:
    """float32 numbers with no more digits than tell them apart."""
    return [float(str(number)) for number in numbers]
