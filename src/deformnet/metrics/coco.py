"""Average precision as COCO defines it; faster-coco-eval computes it."""

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from deformnet._errors import UserError
from deformnet._files import read_json
from deformnet._text import Table, percent
from deformnet.metrics.confusion import Confusion, detection_confusion
from deformnet.metrics.curves import PrecisionRecall
from deformnet.metrics.numbers import by_name, scored_classes
from deformnet.metrics.voc import GroundTruth, Predictions

NAMES = (
    *("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge"),
    *("AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge"),
)
"""COCO's twelve numbers in COCO's order.

AP and AR are means over the IoU thresholds 0.5, 0.55, ..., 0.95 and over the classes, with at most
100 detections an image; AP50 and AP75 are at one threshold; small is below 32^2 pixels of area,
large above 96^2; AR1, AR10 and AR100 are recalls with so many detections an image.
"""


_LARGEST_COORDINATE = 1_000_000
"""Of a polygon: drawing one takes time in proportion to its length."""
_CLASS_NAMES = (*NAMES[:6], "AR100")
"""The numbers of each class."""


@dataclass(frozen=True, eq=False)
class COCOScores:
    """Scores of boxes.

    Attributes:
        numbers: COCO's twelve metrics (`NAMES`); NaN if there are no such objects.
        per_class: AP, AP50, AP75, APsmall, APmedium, APlarge and AR100 of each class.
        objects: number of objects of each class, without crowds.
        curves: precision and recall of each class.
        confusion: confusion matrix of objects and detections.
    """

    numbers: dict[str, float]
    per_class: dict[str, dict[str, float]]
    objects: dict[str, int]
    curves: PrecisionRecall
    confusion: Confusion

    def to_json(self) -> dict[str, object]:
        """Plain numbers for a JSON file, with None for NaN."""
        return {
            "coco": by_name(self.numbers, self.numbers.values()),
            "per_class": {
                name: {**by_name(values, values.values()), "objects": self.objects[name]}
                for name, values in self.per_class.items()
            },
            **scored_classes(self.curves.ap),
        }

    def tables(self) -> list[Table]:
        """The twelve metrics, which are means over classes, and the metrics of each class, in
        percent."""
        scored = scored_classes(self.curves.ap)
        means = coco_table(self.numbers)
        if scored["classes_scored"] < scored["classes"]:
            over = f"means over {scored['classes_scored']} of {scored['classes']} classes"
            means = means._replace(title=f"{means.title}, {over}")
        rows = [
            (name, str(self.objects[name]), *(percent(value) for value in values.values()))
            for name, values in self.per_class.items()
        ]
        return [means, Table("COCO AP of each class", ("class", "objects", *_CLASS_NAMES), rows)]


def coco_scores(
    annotation_file: Path | Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    images: Collection[int] | None = None,
    categories: Collection[int] | None = None,
) -> COCOScores:
    """Evaluates boxes in COCO's result format, for all classes and for each class; see `coco_ap`.

    Args:
        images, categories: ids of the images and categories to evaluate; None for all.
    """
    evaluated = _evaluated(annotation_file, results, "bbox", images, categories)
    names = {c["id"]: c["name"] for c in evaluated.annotations["categories"]}
    ids: list[int] = evaluated.of.params.catIds  # in the order of the results
    classes = tuple(names[number] for number in ids)
    # [IoU thresholds, recalls, classes, sizes, limits of detections]; -1 for no objects.
    results_of = evaluated.of.eval
    precision, recall = (
        np.where(results_of[key] < 0, math.nan, results_of[key]) for key in ("precision", "recall")
    )
    scores = np.where(np.isnan(precision), math.nan, results_of["scores"])
    parts = {
        "AP": precision[:, :, :, 0, -1],
        "AP50": precision[:1, :, :, 0, -1],
        "AP75": precision[5:6, :, :, 0, -1],
        "APsmall": precision[:, :, :, 1, -1],
        "APmedium": precision[:, :, :, 2, -1],
        "APlarge": precision[:, :, :, 3, -1],
        "AR100": recall[:, None, :, 0, -1],
    }
    means = {name: values.mean((0, 1)).tolist() for name, values in parts.items()}
    objects = Counter(
        entry["category_id"]
        for entry in evaluated.annotations["annotations"]
        if not entry["iscrowd"]
    )
    return COCOScores(
        evaluated.numbers(),
        {name: {key: values[k] for key, values in means.items()} for k, name in enumerate(classes)},
        {names[number]: objects[number] for number in ids},
        PrecisionRecall(
            classes,
            precision[0, :, :, 0, -1].T,
            scores[0, :, :, 0, -1].T,
            tuple(means["AP50"]),
        ),
        _confusion(evaluated, {number: k for k, number in enumerate(ids)}, classes),
    )


def coco_ap(
    annotation_file: Path | Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    iou_type: Literal["bbox", "segm"] = "bbox",
) -> dict[str, float]:
    """COCO's twelve numbers (`NAMES`) of detections in COCO's result format.

    Args:
        annotation_file: a COCO JSON file with `images`, `annotations` and `categories`, or several
            with the same categories and different images.
        results: detections with `image_id`, `category_id`, `score`, and `bbox` [x, y, width,
            height] or `segmentation` (RLE), depending on `iou_type`. Not modified.
        iou_type: compare boxes or masks.
    Returns:
        numbers from 0 to 1; NaN where the set has no such objects (COCO's own tools say -1).
    Raises:
        FileNotFoundError: if there is no such annotation file.
        ValueError: if it is not a COCO JSON file; for a malformed detection, or one of an image or
            a category that the file does not list.
    """
    return _evaluated(annotation_file, results, iou_type).numbers()


def coco_table(numbers: Mapping[str, float]) -> Table:
    """The metrics of `coco_ap` in percent."""
    return Table("COCO AP and AR", (), [(name, percent(v)) for name, v in numbers.items()])


class _Evaluated(NamedTuple):
    """Validated annotations and detections, and the finished evaluation."""

    annotations: dict[str, list[dict[str, Any]]]
    detections: list[dict[str, Any]]
    of: COCOeval_faster

    def numbers(self) -> dict[str, float]:
        values = (float(value) for value in self.of.all_stats)
        return {name: v if v >= 0 else math.nan for name, v in zip(NAMES, values, strict=False)}


def _evaluated(
    annotation_file: Path | Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    iou_type: Literal["bbox", "segm"],
    only_images: Collection[int] | None = None,
    only_categories: Collection[int] | None = None,
) -> _Evaluated:
    """See `coco_ap` for arguments and errors; None keeps all images or categories."""
    files = [annotation_file] if isinstance(annotation_file, Path) else list(annotation_file)
    annotations = _joined([_read(file, iou_type) for file in files])
    for key, number, kept in (
        ("images", "id", only_images),
        ("annotations", "image_id", only_images),
        ("categories", "id", only_categories),
        ("annotations", "category_id", only_categories),
    ):
        if kept is not None:
            kept = set(kept)
            annotations[key] = [entry for entry in annotations[key] if entry[number] in kept]
    images = {image["id"] for image in annotations["images"]}
    categories = {category["id"] for category in annotations["categories"]}
    detections = [_detection(i, result, iou_type) for i, result in enumerate(results)]
    for key, known in (("image_id", images), ("category_id", categories)):
        unknown = [detection[key] for detection in detections if detection[key] not in known]
        if unknown:
            raise ValueError(
                f"results: {len(unknown)} of {len(detections)} detections are unknown to "
                f"{' and '.join(map(str, files))}, such as one of {key} {unknown[0]}"
            )
    try:
        ground_truth = COCO(annotations, print_function=_silent)
        evaluation = COCOeval_faster(
            ground_truth, ground_truth.loadRes(detections), iouType=iou_type, print_function=_silent
        )
        evaluation.run()
    except ValueError as error:  # masks whose runs do not match their size
        raise ValueError(f"results or {' and '.join(map(str, files))}: {error}") from error
    return _Evaluated(annotations, detections, evaluation)


def _confusion(
    evaluated: _Evaluated, labels: Mapping[int, int], classes: Sequence[str]
) -> Confusion:
    """The confusion matrix of objects and detections."""
    objects: dict[int, list[dict[str, Any]]] = {}
    detections: dict[int, list[dict[str, Any]]] = {}
    for entries, by_image in (
        (evaluated.annotations["annotations"], objects),
        (evaluated.detections, detections),
    ):
        for entry in entries:
            by_image.setdefault(entry["image_id"], []).append(entry)

    def boxes(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
        corners = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        return corners

    def column(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([labels[entry["category_id"]] for entry in entries], np.int64)

    # Images without objects may have detections.
    targets = {
        image: GroundTruth(boxes(own), column(own), np.array([e["iscrowd"] for e in own], bool))
        for image, own in ((image, objects.get(image, [])) for image in {*objects, *detections})
    }
    predictions = {
        image: Predictions(boxes(own), np.array([e["score"] for e in own], float), column(own))
        for image, own in detections.items()
    }
    return detection_confusion(targets, predictions, classes, crowds=True)


def _read(path: Path, iou_type: str) -> dict[str, list[dict[str, Any]]]:
    """The content of an annotation file that the evaluation needs."""
    try:
        content = read_json(path)
        annotations = []
        for annotation in content["annotations"]:
            if not isinstance(annotation, Mapping):
                raise ValueError(f"expected objects as annotations, but got {annotation!r:.200}")
            where, box = f"annotation {annotation.get('id')}", annotation["bbox"]
            if not _is_box(box):
                raise ValueError(_no_box(where, box))
            kept = {
                "image_id": _id(annotation["image_id"]),
                "category_id": _id(annotation["category_id"]),
                "bbox": box,
                "area": float(annotation.get("area", box[2] * box[3])),
                "iscrowd": int(bool(annotation.get("iscrowd", 0))),
            }
            if iou_type == "segm":
                mask = kept["segmentation"] = annotation["segmentation"]
                if not _is_rle(mask) and not _is_polygons(mask):
                    raise ValueError(
                        f"{where}: expected segmentation to be polygons or RLE, but got "
                        f"{str(mask)[:200]}"
                    )
            annotations.append(kept)
        return {
            "images": [
                {"id": _id(image["id"]), "height": image.get("height"), "width": image.get("width")}
                for image in content["images"]
            ],
            "categories": [{"id": _id(c["id"]), "name": c["name"]} for c in content["categories"]],
            "annotations": annotations,
        }
    except KeyError as error:
        raise UserError(f"{path}: expected COCO annotations, but there is no {error}") from error
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: expected COCO annotations ({error})") from error


def _id(value: object) -> int:
    """Returns an id after checking that the evaluation, written in C++, can represent it.

    Raises:
        ValueError: if it is not an integer, or too large.
    """
    if not isinstance(value, int) or abs(value) >= 2**63:
        raise ValueError(f"expected ids to be integers of at most 63 bits, but got {value!r}")
    return value


def _joined(files: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """The content of all files as of one, with new annotation ids.

    The evaluation would take id 0 for "not matched" and lose all but one of the annotations that
    share an id.
    """
    annotations = [annotation for content in files for annotation in content["annotations"]]
    return {
        "images": [image for content in files for image in content["images"]],
        "categories": files[0]["categories"],
        "annotations": [{"id": n, **entry} for n, entry in enumerate(annotations, start=1)],
    }


def _detection(number: int, result: Mapping[str, Any], iou_type: str) -> dict[str, Any]:
    """A checked copy of a detection, since the evaluation modifies its input."""
    where = f"results[{number}]"
    numbers = ("image_id", "category_id", "score")
    keys = (*numbers, "bbox" if iou_type == "bbox" else "segmentation")
    if not isinstance(result, Mapping) or any(key not in result for key in keys):
        raise ValueError(f"{where}: expected {', '.join(keys)}, but got {str(result)[:200]}")
    for key in numbers:
        if not _is_number(result[key]):
            raise ValueError(f"{where}: expected {key} to be a number, but got {result[key]}")
    if iou_type == "bbox":
        box = result["bbox"]
        if not _is_box(box) or min(box[2:]) < 0:
            raise ValueError(_no_box(where, box))
    elif not _is_rle(result["segmentation"]) or isinstance(result["segmentation"]["counts"], list):
        raise ValueError(
            f"{where}: expected segmentation to be compressed RLE, but got "
            f"{str(result['segmentation'])[:200]}"
        )
    return {key: result[key] for key in keys}


def _is_box(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 4 and all(map(_is_number, value))


def _no_box(where: str, value: object) -> str:
    return f"{where}: expected bbox to be [x, y, width, height], but got {str(value)[:200]}"


def _is_polygons(value: object) -> bool:
    """Whether a value is a list of polygons that can be drawn in reasonable time."""
    return isinstance(value, list) and all(
        isinstance(one, list)
        and len(one) >= 4
        and len(one) % 2 == 0
        and all(_is_number(number) and abs(number) <= _LARGEST_COORDINATE for number in one)
        for one in value
    )


def _is_rle(value: object) -> bool:
    """Whether a value is run-length encoded: its runs compressed to a string, or a list of them.

    The runs must fill the mask, or there are none; otherwise, the evaluation does not end.
    """
    if not isinstance(value, Mapping):
        return False
    size, runs = value.get("size"), value.get("counts")
    if isinstance(runs, str | bytes):
        runs = _decompressed(runs if isinstance(runs, bytes) else runs.encode())
    return (
        isinstance(size, Sequence)
        and len(size) == 2
        and isinstance(runs, list)
        and all(
            isinstance(number, int | np.integer) and 0 <= number < 2**32
            for number in (*size, *runs)
        )
        and (not runs or sum(runs) == size[0] * size[1])
    )


def _decompressed(text: bytes) -> list[int]:
    """The runs in COCO's compressed RLE: 5 bits a character, and differences from the third on."""
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return runs


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max


def _silent(*_: object) -> None:
    """Discards the output of the library."""
