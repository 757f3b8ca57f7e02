"""COCO AP: the published numbers, what the library would get wrong or print, and bad input."""

import copy
import json
import math

import numpy as np
import pytest

from box_sets import naive_iou
from deformnet.metrics import coco_ap, coco_scores, coco_table
from deformnet.metrics.coco import NAMES
from detection_sets import coco, coco_object

SMALL, MEDIUM = [10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 60.0, 40.0]


def content():
    """Two images; one small and one medium object in the first one."""
    objects = [coco_object(1, 1, 7, SMALL), coco_object(2, 1, 7, MEDIUM)]
    return coco({1: "1.jpg", 2: "2.jpg"}, {7: "cat"}, objects, size=(200, 300))


def corners(box):
    x, y, width, height = box
    return [x, y, x + width, y + height]


def detection(box=SMALL, score=0.9, image=1, category=7):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.fixture
def file(tmp_path):
    def write(annotations):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(annotations))
        return path

    return write


@pytest.mark.parametrize(("iou_type", "name"), [("bbox", "fakebbox"), ("segm", "fakesegm")])
def test_published_numbers(real_data, iou_type, name):
    folder = real_data / "eval_vectors/coco_val2014_100"
    results = json.loads((folder / f"instances_val2014_{name}100_results.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())[iou_type]
    scores = coco_ap(folder / "instances_val2014_100.json", results, iou_type)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert list(scores) == list(expected)


def test_a_set_in_several_files_scores_as_in_one(tmp_path):
    whole = content()
    parts = [whole | {"images": [entry]} for entry in whole["images"]]
    whole["annotations"].append(coco_object(3, 2, 7, SMALL))
    # Each file counts its annotations from 1.
    parts[0]["annotations"] = whole["annotations"][:2]
    parts[1]["annotations"] = [coco_object(1, 2, 7, SMALL)]
    for name, annotations in (("1", parts[0]), ("2", parts[1]), ("whole", whole)):
        (tmp_path / f"{name}.json").write_text(json.dumps(annotations))
    parts = [tmp_path / "1.json", tmp_path / "2.json"]
    detections = [detection(), detection(MEDIUM, 0.5), detection(MEDIUM, 0.7, image=2)]
    both = coco_ap(parts, detections)
    assert both["AP"] == coco_ap(tmp_path / "whole.json", detections)["AP"]
    assert both["AR100"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"unknown to .*1\.json and .*2\.json"):
        coco_ap(parts, [detection(image=3)])


def test_scores_of_each_class(real_data):
    """Their means are the published numbers, which are means over classes."""
    folder = real_data / "eval_vectors/coco_val2014_100"
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    scores = coco_scores(folder / "instances_val2014_100.json", results)
    assert scores.numbers == pytest.approx(expected, abs=1e-12)
    assert len(scores.per_class) == 80
    for name in (*NAMES[:6], "AR100"):
        values = [of_class[name] for of_class in scores.per_class.values()]
        counted = [value for value in values if not math.isnan(value)]
        assert sum(counted) / len(counted) == pytest.approx(expected[name], abs=1e-12)
    content = scores.to_json()
    json.dumps(content, allow_nan=False)
    scored = sum(count > 0 for count in scores.objects.values())
    assert (content["classes_scored"], content["classes"]) == (scored, 80)
    means, by_class = scores.tables()
    assert means.title == f"COCO AP and AR, means over {scored} of 80 classes"
    assert len(by_class.rows) == 80
    # Every object that is no crowd is in one row and column.
    assert scores.confusion.counts[:-1].sum() == sum(scores.objects.values())
    assert scores.confusion.counts.trace() > 300


def naive_curve(objects, found, threshold):
    """Recall, precision and score after each detection of a class; rows of image, box, score."""
    points, taken = [], set()
    for number, (image, box, score) in enumerate(sorted(found, key=lambda row: -row[2]), start=1):
        near = [
            (naive_iou(box, other), k)
            for k, (where, other) in enumerate(objects)
            if where == image and k not in taken and naive_iou(box, other) >= threshold
        ]
        taken |= {max(near)[1]} if near else set()
        points.append((len(taken) / len(objects), len(taken) / number, score))
    return points


def test_each_class_agrees_with_loops(file):
    rng = np.random.default_rng(0)
    rows = {7: ([], []), 3: ([], []), 5: ([], [])}  # objects and detections by category
    for image in range(1, 9):
        for category in (7, 3):
            for _ in range(3):
                box = [*rng.uniform(0, 100, 2), *rng.uniform(20, 60, 2)]
                rows[category][0].append((image, corners(box), box))
                moved = [float(value) for value in box + rng.normal(0, 5, 4)]
                rows[category][1].append((image, corners(moved), float(rng.random()), moved))
    annotations = content() | {
        "images": [{"id": k, "file_name": f"{k}.jpg"} for k in range(1, 9)],
        "categories": [{"id": k, "name": name} for k, name in ((7, "cat"), (3, "dog"), (5, "cow"))],
        "annotations": [
            coco_object(100 * category + k, image, category, box)
            for category, (objects, _) in rows.items()
            for k, (image, _, box) in enumerate(objects)
        ],
    }
    results = [
        detection(box, score, image, category)
        for category, (_, found) in rows.items()
        for image, _, score, box in found
    ]
    scores = coco_scores(file(annotations), results)
    assert scores.curves.classes == ("dog", "cow", "cat")
    assert scores.objects == {"dog": 24, "cow": 0, "cat": 24}
    assert np.isnan(scores.curves.precision[1]).all()
    for category, name, row in ((3, "dog", 0), (7, "cat", 2)):
        objects, found = (
            [entry[:size] for entry in rows[category][k]] for k, size in ((0, 2), (1, 3))
        )
        precision = []
        for threshold in np.linspace(0.5, 0.95, 10):
            points = naive_curve(objects, found, threshold)
            later = [[point for point in points if point[0] >= k / 100] for k in range(101)]
            precision.append([max((p for _, p, _ in some), default=0) for some in later])
            if threshold == 0.5:
                reached = [some[0][2] if some else 0 for some in later]
        assert scores.per_class[name]["AP"] == pytest.approx(np.mean(precision))
        assert scores.per_class[name]["AP50"] == scores.curves.ap[row]
        assert scores.curves.ap[row] == pytest.approx(np.mean(precision[0]))
        assert 0.1 < scores.curves.ap[row] < 0.95
        np.testing.assert_allclose(scores.curves.precision[row], precision[0])
        np.testing.assert_allclose(scores.curves.scores[row], reached)


def test_confusion_counts_no_detection_on_a_crowd(file):
    annotations = content()
    annotations["annotations"][1]["iscrowd"] = 1
    inside = [60.0, 60.0, 10.0, 10.0]
    results = [detection(SMALL), detection(inside), detection(inside, image=2)]
    scores = coco_scores(file(annotations), results)
    assert scores.confusion.classes == ("cat", "background")
    assert scores.confusion.counts.tolist() == [[1, 0], [1, 0]]


def test_all_found_half_found_none_found(file):
    path = file(content())
    everything = [detection(SMALL), detection(MEDIUM, 0.8)]
    scores = coco_ap(path, everything)
    assert scores["AP"] == scores["AP50"] == scores["APsmall"] == scores["AR10"] == 1
    assert scores["AR1"] == 0.5
    assert math.isnan(scores["APlarge"])
    assert math.isnan(scores["ARlarge"])
    # Found exactly, one of two: precision 1 at 51 of the 101 recalls.
    assert coco_ap(path, everything[:1])["AP"] == pytest.approx(51 / 101)
    assert coco_ap(path, [])["AP"] == 0


def test_ids_of_annotations_do_not_matter(file):
    """The library takes id 0 for "not matched" and keeps one annotation of an id."""
    everything = [detection(SMALL), detection(MEDIUM, 0.8)]
    annotations = content()
    for ids in ((0, 1), (5, 5)):
        for annotation, number in zip(annotations["annotations"], ids, strict=True):
            annotation["id"] = number
        assert coco_ap(file(annotations), everything)["AP"] == 1


def test_crowds_are_ignored_and_fields_may_be_missing(file):
    annotations = content()
    annotations["annotations"][1]["iscrowd"] = 1
    del annotations["annotations"][0]["iscrowd"], annotations["annotations"][0]["area"]
    inside = [60.0, 60.0, 10.0, 10.0]  # of the crowd: neither right nor wrong
    scores = coco_ap(file(annotations), [detection(inside, 0.99), detection(SMALL)])
    assert scores["AP"] == scores["APsmall"] == 1
    assert math.isnan(scores["APmedium"])


def test_is_silent_and_leaves_the_results_alone(file, capfd, caplog):
    results = [detection()]
    before = copy.deepcopy(results)
    with caplog.at_level("INFO"):
        coco_ap(file(content()), results)
    assert results == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_table():
    lines = str(coco_table({"AP": 0.50458, "APlarge": math.nan})).splitlines()
    assert [line.split() for line in lines[1:]] == [["AP", "50.46"], ["APlarge", "-"]]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([detection(), detection(image=9)], "1 of 2 detections are unknown to .* image_id 9"),
        ([detection(category=8)], "1 of 1 detections are unknown to .* category_id 8"),
        ([detection(score=math.nan)], r"results\[0\]: expected score to be a number, but got nan"),
        ([detection(), detection(score="0.5")], r"results\[1\]: expected score to be a number"),
        ([detection(image=None)], r"results\[0\]: expected image_id to be a number, but got None"),
        ([detection(box=[1, 2, 3])], r"results\[0\]: expected bbox to be \[x, y, width, height\]"),
        ([detection(box=[1, 2, math.inf, 3])], r"results\[0\]: expected bbox"),
        ([detection(box=[1, 2, 10**400, 3])], r"results\[0\]: expected bbox"),
        ([detection(box=[5, 5, -1, 3])], r"results\[0\]: expected bbox"),
        ([{"image_id": 1}], r"results\[0\]: expected image_id, category_id, score, bbox, but got"),
        ([3], r"results\[0\]: expected image_id"),
    ],
)
def test_bad_results_are_named(file, results, message):
    with pytest.raises(ValueError, match=message) as caught:
        coco_ap(file(content()), results)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"images": [',
        "[]",
        "{}",
        '{"images": [], "categories": [], "annotations": [{}]}',
        '{"images": [{"id": "x"}], "categories": [], "annotations": []}',
        '{"images": [{"id": 1.5}], "categories": [], "annotations": []}',
        '{"images": [], "categories": [], "annotations": [3]}',
        '{"images": [], "categories": [], "annotations": [null]}',
        '{"images": [{"id": 9223372036854775808}], "categories": [], "annotations": []}',
    ],
)
def test_bad_annotations_are_named(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: expected COCO annotations") as caught:
        coco_ap(path, [])
    assert "\n" not in str(caught.value)


def test_missing_annotations_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        coco_ap(tmp_path / "none.json", [])


@pytest.mark.parametrize("box", [[], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [0] * 8, [1, 2, 3, "4"]])
def test_boxes_of_annotations_have_four_numbers(file, box):
    """Even if `area` makes the box look unnecessary."""
    annotations = content()
    annotations["annotations"][1] |= {"bbox": box, "area": 4}
    with pytest.raises(ValueError, match=r"annotation 2: expected bbox to be \[x, y"):
        coco_ap(file(annotations), [detection()])


RLE = {"size": [40, 48], "counts": "Y15S10000000_d1"}
TRIANGLE = [[1, 1, 6, 1, 6, 6]]


def score_masks(file, annotated, found):
    annotations = content()
    for entry in annotations["annotations"]:
        entry["segmentation"] = annotated
    for entry in annotations["images"]:
        entry |= {"height": 40, "width": 48}
    results = [{"image_id": 1, "category_id": 7, "score": 0.5, "segmentation": found}]
    return coco_ap(file(annotations), results, "segm")["AP"]


def test_masks_of_annotations_are_rle_or_polygons(file):
    """Two objects and a detection of one: AP is 51/101, as recall 0.5 is the 51st of 101."""
    runs = RLE | {"counts": [41, *(5, 35) * 4, 5, 1714]}  # the same mask
    assert [score_masks(file, mask, RLE) for mask in (RLE, runs)] == pytest.approx([51 / 101] * 2)
    assert score_masks(file, TRIANGLE, RLE) < 51 / 101


@pytest.mark.parametrize(
    "mask",
    [
        *(None, 3, "text", {}, [None], [[1, 2, 3]], [["a"] * 6], [[1, 1, 1e300, 1, 6, 6]]),
        *(RLE | {"counts": None}, RLE | {"counts": [-1, 3]}, RLE | {"counts": ["1"]}),
        *(RLE | {"counts": [41, 5]}, RLE | {"counts": "Y15"}, RLE | {"counts": "@@@@"}),
        *(RLE | {"size": [40]}, RLE | {"size": "ab"}, RLE | {"size": [40, -48]}),
    ],
)
def test_malformed_masks_are_named(file, mask):
    with pytest.raises(ValueError, match="annotation 1: expected segmentation to be polygons"):
        score_masks(file, mask, RLE)
    with pytest.raises(ValueError, match=r"results\[0\]: expected segmentation to be compressed"):
        score_masks(file, TRIANGLE, mask)
