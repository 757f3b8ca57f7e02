"""What the check of data sets says of their content, and of files that attack their reader."""

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformnet._errors import UserError
from deformnet.cli import main
from deformnet.cli.data import check as check_command
from deformnet.data import DataFiles
from deformnet.data.check import check_data
from deformnet.data.files import MAX_PIXELS
from detection_sets import voc_object, voc_xml, write_coco
from small_sets import one_line, save_image, save_labels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(root, **options):
    return check_data(root, workers=0, progress=False, **options)


def counts(report) -> dict:
    return {one.name: one.class_counts() for one in report.lists}


def write_xml(root: Path, objects: dict[str, tuple], split: str = "", seed: int = 0) -> Path:
    """A folder of images (12 x 16) and XML files."""
    for number, (name, content) in enumerate(objects.items()):
        save_image(root / split / f"{name}.jpg", seed=seed + number)
        (root / split / f"{name}.xml").write_text(voc_xml(*content))
    return root


def write_masks(root: Path, masks: dict[str, np.ndarray], classes: str = "", seed: int = 0) -> Path:
    for number, (name, labels) in enumerate(masks.items()):
        save_image(root / f"images/{name}.jpg", *labels.shape, seed=seed + number)
        save_labels(root / f"masks/{name}.png", labels, mode="L")
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def halves(left: int, right: int) -> np.ndarray:
    labels = np.full((12, 16), left)
    labels[:, 8:] = right
    return labels


CAT, DOG = voc_object((2, 2, 9, 9), "cat"), voc_object((4, 4, 12, 9), "dog")


@pytest.fixture
def boxes(tmp_path) -> Path:
    root = write_xml(tmp_path / "boxes", {"a": (CAT, CAT), "b": (CAT, DOG)}, "train")
    return write_xml(root, {"c": (CAT,), "d": (DOG,)}, "val", seed=9)


# What is there.


def test_classes_and_their_objects(boxes):
    report = check(boxes)
    assert report.ok
    assert not report.remarks
    assert counts(report) == {"train": {"cat": 3, "dog": 1}, "val": {"cat": 1, "dog": 1}}
    assert [(one.images, one.empty, one.rotated) for one in report.lists] == [(2, 0, 0), (2, 0, 0)]
    text = str(report)
    assert re.search(r"^cat +3 +1$", text, re.MULTILINE)
    assert re.search(r"^train +2 +0 +0 +4$", text, re.MULTILINE)
    assert len(text.splitlines()) <= 14
    assert check(boxes).checked == 0
    assert counts(check(boxes)) == counts(report)  # from the record


def test_classes_and_their_pixels(tmp_path):
    root = write_masks(tmp_path / "set", {"a": halves(0, 2), "b": halves(1, 255)}, "x\ny\nz\n")
    report = check(root)
    assert counts(report) == {"train (masks)": {"x": 96, "y": 96, "z": 96}}
    assert re.search(r"^z +33\.33$", str(report), re.MULTILINE)


def test_images_without_objects_are_counted(tmp_path):
    root = write_xml(tmp_path / "set", {"a": (CAT,), "b": ()})
    save_image(root / "c.jpg", seed=5)
    (one,) = check(root).lists
    assert (one.images, one.empty) == (3, 2)
    content = json.loads(json.dumps(coco_of(4, objects=1)))
    report = check(write_coco(tmp_path / "coco", content).parents[1])
    assert [it.empty for it in report.lists] == [3]


def coco_of(images: int, objects: int, box=(2, 2, 5, 5), **entry) -> dict:
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 12, "width": 16}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": list(box), **entry}
            for i in range(1, objects + 1)
        ],
    }


def write_yolo(root: Path) -> Path:
    for number, split in enumerate(("train", "val")):
        save_image(root / f"images/{split}/{split}.jpg", seed=number)
        labels = root / f"labels/{split}/{split}.txt"
        labels.parent.mkdir(parents=True)
        labels.write_text("0 0.5 0.5 0.4 0.4\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    return root


def write_labelme(root: Path, names: Sequence[str] = ("a",)) -> Path:
    shape = {"label": "cat", "points": [[2, 2], [9, 9]], "shape_type": "rectangle"}
    for name in names:
        save_image(root / f"{name}.jpg")
        size = {"imageHeight": 12, "imageWidth": 16}
        content = {"shapes": [shape], "imagePath": f"{name}.jpg", **size}
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def write_folders(root: Path) -> Path:
    for number, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        save_image(root / f"{name}/1.JPEG", seed=number)
    return root


@pytest.mark.parametrize(
    ("write", "layout", "advice"),
    [
        (write_yolo, "YOLO", "rfcn"),
        (write_labelme, "labelme", "rfcn"),
        (write_folders, "image folder", "classifier"),
        (lambda root: write_xml(root, {"a": (CAT,)}), "VOC's XML", "rfcn"),
        (lambda root: write_masks(root, {"a": halves(0, 1)}, "x\ny\n"), "masks", "deeplab"),
        (lambda root: write_coco(root, coco_of(2, 2)).parents[1], "COCO", "rfcn"),
    ],
)
def test_every_layout_is_named_and_what_to_train(tmp_path, write, layout, advice):
    root = write(tmp_path / "set")
    report = check(root)
    assert report.ok, report.problems
    assert report.layouts == (layout,)
    line = report.advice[0]
    assert line.startswith(f"train with: deformnet train {advice} --data {root} --out RUN")
    has_val = any(one.name.startswith("val") for one in report.lists)
    assert line.endswith("RUN" if has_val else "RUN --val-fraction 0.2")
    assert str(report).startswith(f"Found {layout}\n")
    assert str(report).endswith(report.advice[-1])
    assert sum(sum(one.values()) for one in counts(report).values()) > 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_script(path: Path) -> None:
    Image.new("RGB", (16, 12)).save(path, format="EPS")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        replace_by_pipe,
        replace_by_folder,
        replace_by_link_to_nothing,
        replace_by_script,
    ],
)
def test_one_bad_image_costs_itself_in_every_layout(tmp_path, damage):
    halved = halves(0, 1)
    for name, (root, image) in {
        "yolo": (write_yolo(tmp_path / "yolo"), "images/train/train.jpg"),
        "labelme": (write_labelme(tmp_path / "labelme", ("a", "b")), "a.jpg"),
        "folders": (write_folders(tmp_path / "folders"), "train/cat/1.JPEG"),
        "xml": (write_xml(tmp_path / "xml", {"a": (CAT,), "b": (DOG,)}), "a.jpg"),
        "masks": (
            write_masks(tmp_path / "masks", {"a": halved, "b": halved}, "x\ny\n"),
            "images/a.jpg",
        ),
        "coco": (write_coco(tmp_path / "coco", coco_of(2, 2)).parents[1], "train/1.jpg"),
    }.items():
        good = check(root)
        assert good.ok, name
        damage(root / image)
        report = check(root)
        assert not report.ok, name
        assert all(Path(image).stem in line for line in report.problems), report.problems
        assert sum(it.images - it.faulty - it.missing for it in report.lists) >= 1
        assert str(report).count("\n") < 40


def test_names_that_are_not_text(boxes, tmp_path, capsys):
    odd = boxes / "train" / os.fsdecode(b"\xff.jpg")
    (boxes / "train/a.jpg").rename(odd)
    (boxes / "train/a.xml").rename(odd.with_suffix(".xml"))
    truncate(odd)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(boxes), "--workers", "0", "--report", str(tmp_path / "r.txt")])
    assert ended.value.code == 2
    assert "\\udcff.jpg: not a readable image" in capsys.readouterr().out
    assert b"\xff.jpg: not a readable image" in (tmp_path / "r.txt").read_bytes()


def test_images_and_annotations_apart(tmp_path, capsys):
    root = write_masks(tmp_path / "set", {"a": halves(0, 1)}, "x\ny\n")
    place = DataFiles(root / "images", root / "masks")
    report = check(place)
    assert report.ok
    assert f"--images {root}/images --annotations {root}/masks --out RUN" in report.advice[0]
    (root / "images/a.jpg").write_text("no image")
    with pytest.raises(SystemExit):
        check_command(images=root / "images", annotations=root / "masks", workers=0)
    assert "1 problems" in capsys.readouterr().out
    for options in ({}, {"images": root}, {"root": root, "annotations": root}):
        with one_line(UserError, "expected DIR, or both --images and --annotations"):
            check_command(**options)


def test_boxes_and_masks_are_both_trained_on(tmp_path):
    report = check(write_labelme(tmp_path / "set"))
    assert [line.split()[4] for line in report.advice] == ["rfcn", "deeplab"]


def test_many_classes_stay_short(tmp_path):
    objects = [voc_object((2, 2, 9, 9), f"class{i:03d}") for i in range(150)]
    report = check(write_xml(tmp_path / "set", {"a": tuple(objects), "b": (objects[70],)}))
    text = str(report)
    assert len(text.splitlines()) < 35
    assert "class070" in text
    assert re.search(r"^129 more +129$", text, re.MULTILINE)
    assert "class149" in report.file.read_text()


# Nothing, or not all, to learn from.


@pytest.mark.parametrize(
    "objects",
    [(), (voc_object((2, 2, 9, 9), "cat", difficult=1),), (voc_object((30, 2, 40, 9), "cat"),)],
)
def test_boxes_with_nothing_to_learn_from(boxes, objects):
    for path in (boxes / "train").glob("*.xml"):
        path.write_text(voc_xml(*objects))
    report = check(boxes)
    (problem,) = report.problems
    assert problem.startswith("train: nothing to learn from: its 2 images have no objects")


def test_coco_with_nothing_to_learn_from(tmp_path):
    for name, content in {
        "none": coco_of(2, 0),
        "crowds": coco_of(2, 2, iscrowd=1),
        "outside": coco_of(2, 2, box=(20, 2, 5, 5)),
    }.items():
        root = write_coco(tmp_path / name, content).parents[1]
        (problem,) = check(root).problems
        assert "nothing to learn from: its 2 images have no objects" in problem
    content = coco_of(2, 0)
    del content["annotations"]
    path = write_coco(tmp_path / "test", content)
    path.rename(path.with_name("image_info_train.json"))
    assert check(tmp_path / "test").ok  # test images are not to be learned from


def test_a_class_in_no_box_or_mask(boxes, tmp_path):
    (boxes / "classes.txt").write_text("cat\ndog\ncow\n")
    assert check(boxes).remarks == ("train, val: 1 of 3 classes is in no box: cow",)
    shutil.rmtree(boxes / "val")
    for path in (boxes / "train").glob("*.xml"):
        path.write_text(voc_xml(CAT))
    (line,) = check(boxes).remarks
    assert line.startswith("train: 2 of 3 classes are in no box: dog, cow")
    masks = write_masks(tmp_path / "masks", {"a": halves(0, 1)}, "background\nperson\ncow\n")
    (line,) = check(masks).remarks
    assert line.endswith("in no mask: cow")


def test_masks_of_background_alone(tmp_path):
    root = write_masks(tmp_path / "set", {"a": halves(0, 255)}, "background\nperson\ncow\n")
    (root / "masks/a.png").unlink()
    save_labels(root / "masks/a.png", np.zeros((12, 16)), mode="L")
    (problem,) = check(root).problems
    assert "nothing to learn from: all pixels of its masks are background or void" in problem


def test_masks_all_void(tmp_path):
    masks = {"a": np.full((12, 16), 255), "b": halves(255, 1)}
    root = write_masks(tmp_path / "set", masks, "background\nperson\ncow\n")
    report = check(root)
    assert any("a.png: all pixels are void" in line for line in report.remarks)
    assert [one.empty for one in report.lists] == [1]
    save_labels(root / "masks/b.png", masks["a"], mode="L")
    assert any("all pixels of its masks are void" in line for line in check(root).problems)


def test_own_ids_in_cityscapes_layout(tmp_path):
    root = tmp_path / "set"
    save_image(root / "leftImg8bit/train/town/a_leftImg8bit.png")
    save_labels(root / "gtFine/train/town/a_gtFine_labelIds.png", halves(0, 1), mode="L")
    (problem,) = check(root).problems
    assert "all pixels of its masks are void" in problem
    assert "classes.txt" in problem


# Masks and boxes in other units.


def test_binary_masks(tmp_path):
    masks = {"a": halves(0, 255), "b": halves(255, 0)}
    root = write_masks(tmp_path / "set", masks, "background\nperson\n")
    report = check(root)
    assert report.ok
    assert counts(report) == {"train (masks)": {"background": 192, "person": 192}}
    (line,) = report.remarks
    assert line.endswith("masks contain only 0 and 255: 255 is read as label 1, person")
    (root / "classes.txt").write_text("background\nperson\ncow\n")
    (problem,) = check(root).problems
    assert "they contain only 0 and 255, and 255 is void" in problem


@pytest.mark.parametrize(
    ("box", "remark"),
    [((0.2, 0.2, 0.9, 0.9), "is within 0 to 1"), ((2, 2, 90, 9), "extends far outside")],
)
def test_boxes_in_other_units(tmp_path, box, remark):
    x1, y1, x2, y2 = box
    root = write_xml(tmp_path / "xml", {"a": (CAT, voc_object(box, "cat"))})
    content = coco_of(2, 2, box=(x1, y1, x2 - x1, y2 - y1))
    coco = write_coco(tmp_path / "coco", content).parents[1]
    for report in (check(root), check(coco)):
        assert report.ok
        assert any(remark in line for line in report.remarks)


# Images.


def turn(path: Path, orientation: int, height: int = 12, width: int = 16) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def test_rotated_images_are_counted(boxes):
    turn(boxes / "train/a.jpg", 6)  # annotated as stored
    turn(boxes / "train/b.jpg", 8, 16, 12)  # as upright
    for _ in range(2):  # also from the record
        report = check(boxes)
        assert report.ok
        assert [one.rotated for one in report.lists] == [2, 0]
        (line,) = report.remarks
        assert line.startswith("train: 2 of 2 images have an EXIF orientation")
    assert re.search(r"^train +2 +0 +0 +2 +4$", str(report), re.MULTILINE)


def test_images_of_extreme_sizes(tmp_path):
    root = write_masks(
        tmp_path / "set",
        {"a": halves(0, 1), "b": np.ones((3, 9)), "c": np.ones((10, 300))},
        "x\ny\n",
    )
    report = check(root)
    assert report.ok
    assert any("b.jpg: its size, 9x3, is tiny" in line for line in report.remarks)
    assert any("c.jpg: its size, 300x10, is long and narrow" in line for line in report.remarks)


def test_images_of_gigabytes(boxes):
    side = int(MAX_PIXELS**0.5) + 1

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    (boxes / "train/a.jpg").write_bytes(data + chunk(b"IEND", b""))
    (problem,) = check(boxes).problems
    assert problem.startswith("train/a.jpg: ")
    assert f"{MAX_PIXELS} pixels" in problem


def test_png_that_ends_early(tmp_path):
    root = write_folders(tmp_path / "set")
    save_image(root / "train/cat/2.png", 60, 60)
    data = (root / "train/cat/2.png").read_bytes()
    start = data.index(b"IDAT") - 4
    rows = zlib.compress(zlib.decompress(data[start + 8 : -16])[: 30 * 181])
    body = b"IDAT" + rows
    idat = struct.pack(">I", len(rows)) + body + struct.pack(">I", zlib.crc32(body))
    (root / "train/cat/2.png").write_bytes(data[:start] + idat + data[-12:])
    (problem,) = check(root).problems
    assert problem.startswith("train/cat/2.png: not a readable image")


# Files that lack a counterpart.


def test_images_without_annotations_and_the_other_way_round(boxes):
    save_image(boxes / "train/bare.jpg", seed=50)
    (boxes / "val/lonely.xml").write_text(voc_xml(CAT))
    report = check(boxes)
    assert any("1 images have no XML file" in line for line in report.remarks)
    (problem,) = report.problems
    assert problem == "val/lonely.jpg: missing, listed in val"


def test_images_that_two_splits_share(boxes):
    shutil.copy(boxes / "train/a.jpg", boxes / "val/c.jpg")
    shutil.copy(boxes / "train/b.jpg", boxes / "train/b2.jpg")  # within a split
    (boxes / "train/b2.xml").write_text(voc_xml(CAT))
    report = check(boxes)
    assert report.ok
    (line,) = report.remarks
    assert line == (
        "train and val have 1 images in common, which makes scores too good: a.jpg = c.jpg"
    )


def test_lists_that_share_images(tmp_path):
    year = tmp_path / "set/VOC2012"
    for number, name in enumerate("abc"):
        save_image(year / f"JPEGImages/{name}.jpg", seed=number)
        (year / "Annotations").mkdir(exist_ok=True)
        (year / f"Annotations/{name}.xml").write_text(voc_xml(CAT))
    lists = year / "ImageSets/Main"
    lists.mkdir(parents=True)
    for name, ids in {"train": "ab", "val": "c", "trainval": "abc"}.items():
        (lists / f"{name}.txt").write_text("\n".join(ids))
    (year / "classes.txt").write_text("cat\n")
    assert not check(tmp_path / "set").remarks
    (lists / "test.txt").write_text("c\nb\n")
    remarks = check(tmp_path / "set").remarks
    assert sorted(line.partition(" have ")[0] for line in remarks) == [
        f"VOC2012/Main/{one} and VOC2012/Main/{other}"
        for one, other in (("test", "train"), ("test", "val"), ("trainval", "test"))
    ]


# Attacks.


def test_xml_with_entities(boxes):
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>' + voc_xml(CAT)
    (boxes / "train/a.xml").write_text(bomb)
    report = check(boxes)
    (problem,) = report.problems
    assert (
        problem
        == "train/a.xml: expected XML without DOCTYPE and entities, but found one; remove it"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [NaN]}', "but got NaN"),
        ('{"images": [1e999]}', "expected numbers below 1e308"),
        ('{"images":' + "[" * 100_000, "nested too deeply"),
        ('{"images": {}, "annotations": []}', "expected a list of objects under 'images'"),
    ],
)
def test_hostile_json(tmp_path, text, message):
    path = write_coco(tmp_path / "set", coco_of(2, 2))
    path.write_text(text)
    (problem,) = check(tmp_path / "set").problems
    assert problem.startswith("annotations/instances_train.json: ")
    assert message in problem


def test_names_that_lead_out(tmp_path):
    content = coco_of(2, 2)
    path = write_coco(tmp_path / "set", content)
    content["images"][0]["file_name"] = "../../../etc/x.jpg"
    path.write_text(json.dumps(content))
    assert any(
        "expected a path inside the data folder" in it for it in check(path.parents[1]).problems
    )
    lists = tmp_path / "voc/VOC2012/ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("../../../../secret\n")
    assert any("inside the data folder" in line for line in check(tmp_path / "voc").problems)


def test_links_in_a_circle(tmp_path):
    root = write_folders(tmp_path / "set")
    (root / "train/cat/again").symlink_to(root / "train")
    masks = write_masks(tmp_path / "masks", {"a": halves(0, 1)}, "x\ny\n")
    (masks / "images/again").symlink_to(masks / "images")
    for place in (root, masks):
        try:
            problems = check(place).problems
        except UserError as error:
            problems = [str(error)]
        assert any("link to a folder that contains it" in line for line in problems)
        assert all("\n" not in line for line in problems)


# Files that the check writes.


@pytest.mark.parametrize("content", ["", "my thesis\n", "# deformnet\n"])
def test_other_files_are_not_overwritten(boxes, tmp_path, content):
    other = tmp_path / "other.txt"
    other.write_text(content)
    with one_line(UserError, other, "expected a new file or the report of an earlier check"):
        check(boxes, report=other)
    assert other.read_text() == content
    if content:
        with one_line(UserError, other, "expected a new file or the record of an earlier check"):
            check(boxes, record=other)
        assert other.read_text() == content
    with one_line(UserError, boxes):
        check(boxes, report=boxes)
    with one_line(UserError, tmp_path / "x.txt", "expected different files for the report"):
        check(boxes, record=tmp_path / "x.txt", report=tmp_path / "x.txt")
    with pytest.raises(OSError, match="other"):  # before the check, not after
        check(boxes, report=other / "report.txt")


def test_a_former_report_is_replaced(boxes, tmp_path):
    path = tmp_path / "report.txt"
    check(boxes, report=path)
    first = path.read_text()
    assert first.startswith(f"# deformnet data check of {boxes}\n")
    (boxes / "train/a.jpg").unlink()
    check(boxes, report=path)
    assert "train/a.jpg: missing" in path.read_text()
    assert check(boxes, record=tmp_path / "record.txt").file == tmp_path / "record.report.txt"
