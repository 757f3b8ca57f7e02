"""Detections on disk: every format, scores from files, and bad files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deformnet import UserError
from deformnet.data.opening import open_detection
from deformnet.metrics.detections import Record, read_detections, to_line, write_detections
from deformnet.tasks.scoring import coco_ids, ground_truth_of, score, submission_path
from detection_sets import coco as coco_annotations
from detection_sets import coco_object, voc_object, write_coco, write_voc_images
from small_sets import one_line, write_list


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def voc(tmp_path):
    """Images a (a cell and a difficult one) and b (a clean_cell), split test_clean; c apart."""
    root = tmp_path / "voc"
    year = root / "VOCdevkit/VOC2007"
    cells = voc_object((11, 21, 30, 40), "cell"), voc_object((51, 51, 60, 60), "cell", difficult=1)
    contents = {"a": cells, "b": [voc_object((1, 1, 10, 10), "clean_cell")], "c": []}
    write_voc_images(year, contents, 80, 100)
    write_list(year / "ImageSets/Main/test_clean.txt", "ab")
    write_list(year / "ImageSets/Main/other.txt", "c")
    write_list(root / "classes.txt", ["cell", "clean_cell"])
    return root


@pytest.fixture
def coco(tmp_path):
    """Images a and b (ids 20 and 10), split val; one dog in each, and a cat in b."""
    objects = [
        coco_object(1, 20, 5, [10, 20, 20, 20]),
        coco_object(2, 10, 5, [0, 0, 20, 20]),
        coco_object(3, 10, 3, [50, 50, 20, 20]),
    ]
    names, classes = {20: "a.jpg", 10: "b.jpg"}, {5: "dog", 3: "cat"}
    content = coco_annotations(names, classes, objects, size=(80, 100))
    write_coco(tmp_path / "coco", content, "val", "val")
    return tmp_path / "coco"


def record(image, *rows):
    """From rows of class, score, x1, y1, x2, y2."""
    boxes = np.array([row[2:] for row in rows], dtype=np.float32).reshape(-1, 4)
    return Record(image, boxes, np.array([row[1] for row in rows]), [row[0] for row in rows])


def score_records(records, dataset):
    return ground_truth_of(dataset, methods=["area"]).score(records)


def write_submission(folder, records, dataset, name):
    path = submission_path(folder, dataset, name)
    coco_ids(dataset).write_submission(path, records)
    return path


VOC_RECORDS = [
    record("a", ("cell", 0.9, 10, 20, 30, 40), ("cell", 0.8, 50, 50, 60, 60)),
    record("b", ("clean_cell", 0.7, 0, 0, 10, 10), ("cell", 0.95, 0, 0, 10, 10)),
]
"""All right but one cell, which comes first: AP 0.5 and 1."""

COCO_RECORDS = [
    record("a", ("dog", 0.9, 10, 20, 30, 40)),
    record("b", ("dog", 0.8, 0, 0, 20, 20), ("cat", 0.7, 50, 50, 70, 70)),
]
"""All right."""


def check_voc(scores):
    assert scores["images"] == scores["images_with_detections"] == 2
    assert scores["detections"] == 4
    for of_method in scores["voc"].values():
        assert of_method["ap"]["0.5"] == {"cell": 0.5, "clean_cell": 1.0}
        assert of_method["mean_ap"] == {"0.5": 0.75, "0.7": 0.75}
        assert of_method["objects"] == {"cell": 1, "clean_cell": 1}


# The published vectors.


def test_lines_are_not_read_without_bound(tmp_path, monkeypatch):
    path = tmp_path / "detections.jsonl"
    write_detections(path, [Record("a", np.zeros((9, 4)), np.zeros(9), ["cat"] * 9)])
    assert len(read_detections(path)) == 1
    monkeypatch.setattr("deformnet.metrics.detections.MAX_ANNOTATION_BYTES", 20)
    with one_line(UserError, path, "line 1"):
        read_detections(path)


def test_published_voc_numbers(real_data):
    folder = real_data / "eval_vectors/voc_padilla_7img"
    expected = json.loads((folder / "expected.json").read_text())
    ious = [float(iou) for iou in expected["11_point"]]
    scored = score(folder / "detections", folder / "groundtruths", ious=ious)
    scores = scored.json
    assert scores["images"] == scores["images_with_detections"] == 7
    assert scores["detections"] == 24
    for theirs, ours in (("11_point", "11-point"), ("every_point", "area")):
        assert scores["voc"][ours]["mean_ap"] == pytest.approx(expected[theirs], abs=1e-9)
    assert scores["voc"]["area"]["objects"] == {"object": 15}
    assert "26.84" in str(scored)


def test_published_coco_numbers(real_data):
    folder = real_data / "eval_vectors/coco_val2014_100"
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    boxes = folder / "instances_val2014_fakebbox100_results.json"
    scored = score(boxes, folder / "instances_val2014_100.json")
    scores = scored.json
    assert scores["coco"] == pytest.approx(expected, abs=1e-12)
    assert (scores["images"], scores["detections"]) == (100, 734)
    assert "50.46" in str(scored)


def test_ground_truth_as_detections_is_perfect(real_data, tmp_path):
    for name, split in (("voc2012_mini", "val"), ("coco_tiny", "val2017")):
        dataset = open_detection(real_data / name, split)
        records = []
        for i in range(len(dataset)):
            boxes, labels, ignored = dataset.annotations(i)
            names = [dataset.classes[label] for label in labels[~ignored].tolist()]
            records.append(Record(dataset.name(i), boxes[~ignored], torch.ones(len(names)), names))
        write_detections(tmp_path / "all.jsonl", records)
        scores = score(tmp_path / "all.jsonl", real_data / name, split=split).json
        if "coco" in scores:
            assert scores["coco"]["AP"] == 1
        else:
            assert scores["voc"]["area"]["mean_ap"] == {"0.5": 1, "0.7": 1}


# Our own format.


def test_line_has_the_documented_form():
    line = to_line(record("a.jpg", ("cell", 0.1, 1.5, 2, 3, 40.1)))
    assert line == (
        '{"image": "a.jpg", "boxes": [[1.5, 2.0, 3.0, 40.1]], "scores": [0.1], "classes": ["cell"]}'
    )
    assert to_line(record("ü")) == (
        '{"image": "\\u00fc", "boxes": [], "scores": [], "classes": []}'
    )


def test_what_is_written_is_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(50, 4, generator=generator) * 1000
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(50, generator=generator)
    records = [Record("one", boxes, scores, ["x"] * 50), record("zwei ü")]
    write_detections(tmp_path / "some.jsonl", iter(records))
    one, two = read_detections(tmp_path / "some.jsonl")
    assert (one.image, two.image) == ("one", "zwei ü")
    assert np.array_equal(one.boxes, boxes.numpy())
    assert np.array_equal(np.float32(one.scores), scores.numpy())
    assert list(one.classes) == ["x"] * 50
    assert one.boxes.dtype == np.float32
    assert (two.boxes.shape, two.scores.shape, list(two.classes)) == ((0, 4), (0,), [])


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "some.jsonl"
    write_detections(path, VOC_RECORDS)
    before = path.read_bytes()

    def broken():
        yield VOC_RECORDS[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_detections(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Every format against every layout.


def test_scores_of_our_format_for_voc_data(voc, tmp_path):
    path = tmp_path / "all.jsonl"
    write_detections(path, VOC_RECORDS)
    scored = score(path, voc, split="test_clean")
    scores = scored.json
    check_voc(scores)
    assert list(scores["voc"]) == ["11-point", "area"]
    assert json.loads(json.dumps(scores)) == scores
    in_memory = score_records(VOC_RECORDS, open_detection(voc, "test_clean"))
    assert in_memory.json == scores | {"voc": {"area": scores["voc"]["area"]}}
    text = str(scored)
    assert "4 detections in 2 of 2 images" in text
    assert "11-point" in text
    assert "area" in text
    assert "75.00" in text


def test_file_names_serve_as_names(voc, tmp_path):
    path = tmp_path / "all.jsonl"
    write_detections(path, [r._replace(image=f"{r.image}.JPG") for r in VOC_RECORDS])
    check_voc(score(path, voc, split="test_clean").json)


VOC_RESULTS = {
    "comp4_det_test_cell.txt": "a 0.9 11 21 30 40\na 0.8 51 51 60 60\nb 0.95 1 1 10 10\n",
    "comp4_det_test_clean_cell.txt": "b 0.7 1 1 10 10\n",
}


def test_voc_results(voc, tmp_path):
    folder = write(tmp_path / "results", VOC_RESULTS)
    check_voc(score(folder, voc, split="test_clean").json)
    read = {r.image: r for r in read_detections(folder, ["cell", "clean_cell"])}
    assert sorted(read) == ["a", "b"]
    # Pixels count from 1.
    assert read["a"].boxes.tolist() == [[10, 20, 30, 40], [50, 50, 60, 60]]
    assert read["a"].scores.tolist() == [0.9, 0.8]
    assert read["b"].classes == ["cell", "clean_cell"]
    # Where no class is known, it follows the last underscore.
    folder = write(tmp_path / "one", {"comp4_det_test_clean_cell.txt": "b 0.7 1 1 10 10\n"})
    assert read_detections(folder)[0].classes == ["cell"]


def test_two_voc_results_of_one_class(tmp_path):
    folder = write(tmp_path / "results", VOC_RESULTS)
    message = "clean_cell.txt: expected one file for each class"
    with one_line(UserError, folder, message, "class 'cell'", "comp4_det_test_cell.txt"):
        read_detections(folder)


def test_text_files_against_text_files_and_voc(voc, tmp_path):
    detections = write(
        tmp_path / "detections",
        {
            "a.txt": "cell 0.9 11 21 19 19\ncell 0.8 51 51 9 9\n",
            "b.txt": "clean_cell .7 1 1 9 9\ncell 0.95 1 1 9 9\n",
        },
    )
    check_voc(score(detections, voc, split="test_clean").json)
    target = write(
        tmp_path / "target",
        {"a.txt": "red blood cell 11 21 19 19\n", "b.txt": "", "c.txt": "other 1 1 3 3\n"},
    )
    detections = write(tmp_path / "named", {"a.txt": "red blood cell 0.9 11 21 19 19\n"})
    scores = score(detections, target).json
    assert (scores["images"], scores["images_with_detections"], scores["detections"]) == (3, 1, 1)
    assert scores["voc"]["area"]["ap"]["0.5"] == {"other": 0.0, "red blood cell": 1.0}


def test_inclusive_pixels_make_the_difference(tmp_path):
    # In pixels 0..9 against 0..4 half of the union is common: 50 of 100, not (4 * 9) / (9 * 9).
    target = write(tmp_path / "target", {"a.txt": "x 1 1 9 9\n"})
    detections = write(tmp_path / "detections", {"a.txt": "x 0.5 1 1 4 9\n"})
    for iou, expected in ((0.499, 1.0), (0.501, 0.0)):
        scores = score(detections, target, ious=[iou]).json
        assert list(scores["voc"]["area"]["mean_ap"].values()) == [expected]


@pytest.mark.parametrize("form", ["jsonl", "coco results", "text"])
@pytest.mark.parametrize("data", ["folder", "json alone"])
def test_coco_data(coco, tmp_path, form, data):
    path = tmp_path / "detections.jsonl"
    if form == "jsonl":
        write_detections(path, COCO_RECORDS)
    elif form == "text":
        path = write(
            tmp_path / "detections",
            {"a.txt": "dog 0.9 11 21 19 19", "b.txt": "dog .8 1 1 19 19\ncat .7 51 51 19 19"},
        )
    else:
        path = tmp_path / "detections.json"
        objects = json.loads((coco / "annotations/instances_val.json").read_text())["annotations"]
        path.write_text(json.dumps([one | {"score": 0.5} for one in objects]))
    if data == "folder":
        scored = score(path, coco, split="val")
    else:
        scored = score(path, coco / "annotations/instances_val.json")
    scores = scored.json
    assert scores["coco"]["AP"] == scores["coco"]["APsmall"] == 1
    assert scores["coco"]["APlarge"] is None
    assert (scores["images"], scores["images_with_detections"], scores["detections"]) == (2, 2, 3)
    assert "APsmall" in str(scored)


@pytest.mark.parametrize("published", [True, False], ids=["published", "withheld"])
def test_submission(coco, tmp_path, published):
    instances = coco / "annotations/instances_val.json"
    split = "val" if published else "test-dev2017"
    if not published:
        content = json.loads(instances.read_text())
        del content["annotations"]
        write(coco, {"annotations/image_info_test-dev2017.json": json.dumps(content)})
        (coco / "val").rename(coco / "test2017")
    dataset = open_detection(coco, split)
    path = write_submission(tmp_path / "out", COCO_RECORDS, dataset, "R-FCN_1.0")
    assert path == tmp_path / f"out/detections_{split}_R-FCN_1.0_results.json"
    results = json.loads(path.read_text())
    box = [10, 20, 20, 20]
    assert results[0] == {"image_id": 20, "category_id": 5, "bbox": box, "score": 0.9}
    assert [(one["image_id"], one["category_id"]) for one in results[1:]] == [(10, 5), (10, 3)]
    # What was written is what the benchmark reads.
    assert score(path, instances).json["coco"]["AP"] == 1
    if not published:
        detections = tmp_path / "detections.jsonl"
        write_detections(detections, COCO_RECORDS)
        with one_line(UserError, "test-dev2017", "not published", "submission"):
            score(detections, coco, split=split)
        with one_line(UserError, "test-dev2017", "not published", "submission"):
            score_records(COCO_RECORDS, dataset)
    assert json.loads(write_submission(tmp_path, [], dataset, "nothing").read_text()) == []
    with one_line(UserError, "not in the ground truth", "'x'"):
        write_submission(tmp_path, [record("x")], dataset, "other")
    for name in ("", "a/b", "a b"):
        with one_line(UserError, "name", repr(name)):
            write_submission(tmp_path, COCO_RECORDS, dataset, name)


def test_submission_of_tensors_has_short_numbers(coco, tmp_path):
    boxes = torch.tensor([[0.1, 0.2, 10.3, 20.7]])
    detections = Record("a", boxes, torch.tensor([0.1]), ["dog"])
    (result,) = json.loads(
        write_submission(tmp_path, [detections], open_detection(coco, "val"), "x").read_text()
    )
    assert result["bbox"] == pytest.approx([0.1, 0.2, 10.2, 20.5], abs=1e-6)
    assert len(json.dumps(result)) < 100


def test_only_images_held_out_count(coco):
    whole = open_detection(coco, "val")
    part = open_detection(coco, "val[held-out=0.5]")
    assert 0 < len(part) < len(whole)
    records = []
    for index in range(len(part)):
        boxes, labels, ignored = part.annotations(index)
        names = [part.classes[label] for label in labels[~ignored]]
        boxes = boxes[~ignored].as_subclass(torch.Tensor)
        records.append(Record(part.name(index), boxes, torch.ones(len(boxes)), names))
    scores = ground_truth_of(part).score(records)
    assert scores.json["coco"]["AP"] == 1
    assert ground_truth_of(whole).score(records).json["coco"]["AR100"] < 1


def test_coco_records_in_memory(coco):
    dataset = open_detection(coco, "val")
    assert score_records(COCO_RECORDS, dataset).json["coco"]["AP"] == 1
    # The cat's class is missed altogether, the dogs' is complete.
    only_dogs = [COCO_RECORDS[0], record("b", ("dog", 0.8, 0, 0, 20, 20))]
    assert score_records(only_dogs, dataset).json["coco"]["AP"] == 0.5


# Bad files.


def good_line(**changes):
    content = {"image": "a", "boxes": [[1, 2, 3, 4]], "scores": [0.5], "classes": ["cell"]}
    return json.dumps(content | changes) + "\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty"]),
        (good_line() + good_line(image="b")[:-20], ["line 2"]),
        (good_line() * 2, ["line 2", "each image once, but got 'a' again"]),
        ("\n[1]\n", ["line 2", "expected image, boxes, scores, classes, but got"]),
        ('{"image": "a"}', ["line 1", "expected image, boxes, scores, classes, but got"]),
        (good_line(image=3), ["line 1", "expected image to be a name, but got 3"]),
        (good_line(classes="cell"), ["expected classes to be a list of names"]),
        (good_line(classes=[3]), ["expected classes to be a list of names"]),
        (good_line(classes=["cell", "cell"]), ["a: expected boxes [n, 4]", "[1, 4], [1] and 2"]),
        (good_line(boxes=[[1, 2, 3]]), ["a: expected boxes [n, 4]", "[1, 3]"]),
        (good_line(boxes=[[1, 2, 3, 4], [1]]), ["a: expected boxes and scores to be numbers"]),
        (good_line(boxes=[["x", 2, 3, 4]]), ["a: expected boxes and scores to be numbers"]),
        (good_line(boxes=[[1, 2, float("nan"), 4]]), ["expected finite numbers, but got NaN"]),
        (good_line(boxes=[[5, 2, 3, 4]]), ["box [5.0, 2.0, 3.0, 4.0] ends before it begins"]),
        (good_line(scores=[float("nan")]), ["expected finite numbers, but got NaN"]),
        (good_line(scores=[None]), ["a: "]),
        (good_line(scores=0.5), ["a: expected boxes"]),
    ],
)
def test_bad_json_lines(tmp_path, text, parts):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with one_line(UserError, path, *parts):
        read_detections(path)


def test_other_encodings_and_binary_files(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with one_line(UserError, path, "line 1"):
        read_detections(path)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00\x80")
    with one_line(UserError, folder / "a.txt"):
        read_detections(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "cell 0.9 1 2 3"),
        ("a.txt", "cell 0.9 1 2 3 4\ncell 0.8 1"),
        ("a.txt", "cell nan 1 2 3 4"),
        ("a.txt", "cell 0.9 1 2 inf 4"),
        ("a.txt", "cell high 1 2 3 4"),
        ("comp4_det_test_cell.txt", "a 0.9 1 2 3"),
        ("comp4_det_test_cell.txt", "a 0.9 1 2 3 nan"),
    ],
)
def test_bad_text_lines(tmp_path, name, text):
    folder = write(tmp_path / "texts", {name: text})
    with one_line(UserError, folder / name, "expected lines like", text.splitlines()[-1]):
        read_detections(folder)


def test_boxes_the_wrong_way_round(tmp_path):
    folder = write(tmp_path / "texts", {"a.txt": "cell 0.9 10 10 -5 4"})
    with one_line(UserError, folder / "a.txt", "ends before it begins"):
        read_detections(folder)
    folder = write(tmp_path / "voc", {"comp4_det_test_cell.txt": "a 0.9 10 10 5 5"})
    with one_line(UserError, folder, "a: expected boxes", "ends before it begins"):
        read_detections(folder)


def test_names_of_voc_results(tmp_path):
    folder = write(tmp_path, {"comp4_det_test_cell.txt": "", "notes.txt": ""})
    with one_line(UserError, folder / "notes.txt", "_det_"):
        read_detections(folder)
    (folder / "notes.txt").rename(folder / "comp4_det_cell.txt")
    with one_line(UserError, folder / "comp4_det_cell.txt", "<split>_<class>"):
        read_detections(folder)


def test_missing_and_unknown_files(tmp_path):
    with one_line(FileNotFoundError, tmp_path / "none.jsonl"):
        read_detections(tmp_path / "none.jsonl")
    with one_line(FileNotFoundError, tmp_path, "no .txt file"):
        read_detections(tmp_path)
    write(tmp_path, {"boxes.csv": "1,2"})
    with one_line(UserError, tmp_path / "boxes.csv", ".jsonl"):
        read_detections(tmp_path / "boxes.csv")


def test_detections_that_are_not_in_the_ground_truth(voc, coco, tmp_path):
    path = tmp_path / "all.jsonl"
    first, second = VOC_RECORDS
    for records, *parts in (
        ([first, second, record("c"), record("x.y.jpg")], "2 of 4 images are not", "such as 'c'"),
        ([first, record("b", ("dog", 0.5, 0, 0, 1, 1))], "1 of 3", "'dog'", "cell, clean_cell"),
        ([first, second, record("a.jpg")], "each image once, but got 'a' again"),
    ):
        write_detections(path, records)
        with one_line(UserError, path, *parts):
            score(path, voc, split="test_clean")
    write_detections(path, VOC_RECORDS[:1])
    with one_line(UserError, path, "2 of 2 detections", "'cell'", "cat, dog"):
        score(path, coco, split="val")
    with one_line(UserError, "detections: 1 of 1 images", "'c'"):
        score_records([record("c")], open_detection(voc, "test_clean"))


def test_bad_coco_results(voc, coco, tmp_path):
    path = tmp_path / "results.json"
    detection = {"image_id": 20, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5}
    for content, parts in (
        ({"annotations": []}, ["expected COCO results"]),
        ([detection, detection | {"image_id": 99}], ["1 of 2", "image_id 99"]),
        ([detection | {"category_id": 99}], ["1 of 1", "category_id 99"]),
        ([detection | {"score": float("nan")}], ["expected finite numbers, but got NaN"]),
        ([{"image_id": 20}], ["results[0]"]),
    ):
        path.write_text(json.dumps(content))
        with one_line(UserError, path, *parts):
            score(path, coco, split="val")
    path.write_text(json.dumps([detection])[:-9])
    with one_line(UserError, path, "not readable as JSON"):
        score(path, coco, split="val")
    path.write_text("[]")
    assert score(path, coco, split="val").json["coco"]["AP"] == 0
    with one_line(UserError, path, "is not COCO data"):
        score(path, voc, split="test_clean")
    with one_line(FileNotFoundError, "none.json"):
        score(tmp_path / "none.json", coco, split="val")


def test_bad_ground_truth(voc, coco, tmp_path):
    path = tmp_path / "all.jsonl"
    write_detections(path, VOC_RECORDS)
    with one_line(UserError, voc, "expected a split", "other, test_clean"):
        score(path, voc)
    with one_line(FileNotFoundError, "nope", "other, test_clean"):
        score(path, voc, split="nope")
    with one_line(FileNotFoundError, tmp_path / "none"):
        score(path, tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with one_line(FileNotFoundError, empty, "expected a data set with"):
        score(path, empty)
    texts = write(tmp_path / "texts", {"a.txt": ""})
    with one_line(UserError, texts, "no object in any of the 1 text files"):
        score(path, texts)
    with one_line(UserError, texts, "expected no split", "but got 'val'"):
        score(path, texts, split="val")
    write(texts, {"a.txt": "cell 0.9 1 2 3 4"})  # with a score: reads as class "cell 0.9"
    with one_line(UserError, path, "not in the ground truth"):
        score(path, texts)
    for text in ("[]", "{", '{"images": [{}], "categories": []}'):
        file = tmp_path / "annotations.json"
        file.write_text(text)
        with one_line(UserError, file):
            score(path, file)


def test_categories_without_objects_above_the_others_do_not_count(tmp_path):
    objects = [coco_object(1, 1, 1, [0, 0, 9, 9]), coco_object(2, 1, 2, [2, 2, 9, 9])]
    content = coco_annotations({1: "a.jpg"}, {0: "things", 1: "x", 2: "y"}, objects)
    for category in content["categories"]:
        category["supercategory"] = "none" if category["id"] == 0 else "things"
    write_coco(tmp_path, content, "val", "val")
    dataset = open_detection(tmp_path, "val")
    assert dataset.classes == ("x", "y")
    scores = ground_truth_of(dataset).score([record("a", ("x", 0.9, 0, 0, 9, 9))])
    assert scores.json["classes"] == 2
    assert list(scores.json["per_class"]) == ["x", "y"]
