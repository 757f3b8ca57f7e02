"""Conversion between layouts."""

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from test_labelme import write as write_labelme
from test_yolo import write as write_yolo

from deformnet._files import locked_folder
from deformnet.cli import main
from deformnet.data import (
    detection_splits,
    open_detection,
    open_segmentation,
    segmentation_splits,
)
from deformnet.data.check import check_data
from deformnet.data.convert import convert
from detection_sets import coco_content, voc_object, voc_xml, write_coco, write_voc
from small_sets import one_line, save_image

LAYOUTS = ("coco", "voc", "yolo")
BCCD = Path(os.environ.get("DEFORMNET_DATA", "nowhere")) / "bccd_voc"


def content(root, split, ignored=True):
    """Objects by the bytes of their image, as boxes, class names and whether they are ignored."""
    images = open_detection(root, split)
    found = {}
    for index in range(len(images)):
        boxes, labels, flags = images.annotations(index)
        rows = zip(boxes.tolist(), labels.tolist(), flags.tolist(), strict=True)
        data = images.image_path(index).read_bytes()
        found[data] = [(b, images.classes[label], f) for b, label, f in rows if ignored or not f]
    return found


def same(one, other, *, ignored=True):
    names = detection_splits(one)
    assert names
    assert set(detection_splits(other)) == set(names)
    for split in names:
        assert content(one, split, ignored) == content(other, split, ignored)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc")


@pytest.fixture
def labelme(tmp_path):
    root = tmp_path / "labelme"
    for name, points in (("a b", [[1, 2], [9.25, 8.5]]), ("é", [[0, 0], [16, 12]])):
        write_labelme(root / "train" / f"{name}.json", ("x & <y>", "rectangle", points))
        save_image(root / "train" / f"{name}.jpg", seed=len(points[0]))
    write_labelme(root / "val/a b.json", ("no", "polygon", [[1, 1], [9, 1], [9, 9]]))
    save_image(root / "val/a b.jpg", seed=9)
    (root / "classes.txt").write_text("no\nx & <y>\n")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_of_voc(voc, tmp_path, layout):
    result = convert(voc, tmp_path / "out", layout, progress=False)
    same(voc, tmp_path / "out", ignored=layout != "yolo")
    assert result.splits == {"train": 2, "val": 1}
    assert result.boxes == (2 if layout == "yolo" else 3)
    assert ("1 difficult" in str(result)) == (layout == "yolo")
    report = check_data(tmp_path / "out", record=tmp_path / "record", workers=0, progress=False)
    (problem,) = report.problems  # of val, which has but a difficult object
    assert "nothing to learn from" in problem
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_of_coco(tmp_path, layout):
    write_coco(tmp_path / "coco", coco_content())
    convert(tmp_path / "coco", tmp_path / "out", layout, progress=False)
    same(tmp_path / "coco", tmp_path / "out", ignored=layout != "yolo")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_fractions_of_labelme(labelme, tmp_path, layout):
    convert(labelme, tmp_path / "out", layout, progress=False)
    same(labelme, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*.jpg")} >= {"é.jpg", "a b.jpg"}


@pytest.mark.parametrize(("one", "other"), list(product(LAYOUTS, LAYOUTS)))
def test_conversions_in_turn(labelme, tmp_path, one, other):
    convert(labelme, tmp_path / "one", one, progress=False)
    convert(tmp_path / "one", tmp_path / "other", other, progress=False)
    same(labelme, tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_box_is_exact(tmp_path, layout):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, 2, generator=generator) * torch.tensor([14.0, 10.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[:20] = boxes[:20].round()
    boxes[:20, 2:] += 1  # a single pixel is a box without area in VOC
    shapes = [("a", "rectangle", [box[:2], box[2:]]) for box in boxes.tolist()]
    write_labelme(tmp_path / "set/a.json", *shapes)
    save_image(tmp_path / "set/a.jpg")
    convert(tmp_path / "set", tmp_path / "out", layout, progress=False)
    same(tmp_path / "set", tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_that_overlap(voc, tmp_path, layout):
    (voc / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt").write_text("a\nb\nc\n")
    convert(voc, tmp_path / "out", layout, progress=False)
    same(voc, tmp_path / "out", ignored=layout != "yolo")
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 3


def test_several_years(voc, tmp_path):
    year = voc / "VOCdevkit/VOC2007"
    save_image(year / "JPEGImages/a.jpg", seed=77)
    (year / "Annotations").mkdir()
    (year / "Annotations/a.xml").write_text(voc_xml(voc_object((1, 1, 4, 4))))
    (year / "ImageSets/Main").mkdir(parents=True)
    (year / "ImageSets/Main/test.txt").write_text("a\n")
    result = convert(voc, tmp_path / "out", "coco", progress=False)
    assert set(result.splits) == {"VOC2007_test", "VOC2012_train", "VOC2012_val"}
    assert len(list((tmp_path / "out/images").iterdir())) == 4
    assert content(tmp_path / "out", "VOC2007_test") == content(voc, "VOC2007/test")


def test_masks(tmp_path):
    write_coco(tmp_path / "coco", coco_content())
    result = convert(tmp_path / "coco", tmp_path / "out", "voc", progress=False)
    assert (result.boxes, result.masks) == (4, 3)
    before = open_segmentation(tmp_path / "coco", "train")
    after = open_segmentation(tmp_path / "out", "train")
    assert after.classes == before.classes
    masks = {after.name(i): after[i][1] for i in range(len(after))}
    assert all(masks[before.name(i)].equal(before[i][1]) for i in range(len(before)))
    result = convert(tmp_path / "out", tmp_path / "yolo", "yolo", progress=False)
    assert "label maps are left out" in str(result)


@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_masks_alone(request, tmp_path, kind):
    (tmp_path / "masks").mkdir()
    root = request.getfixturevalue(f"{kind}_masks")
    result = convert(root, tmp_path / "out", "voc", progress=False)
    assert result.boxes == 0
    for split in segmentation_splits(root):
        before, after = open_segmentation(root, split), open_segmentation(tmp_path / "out", split)
        assert after.classes == before.classes
        names = [after.name(i) for i in range(len(after))]
        for index in range(len(before)):
            assert after[names.index(before.name(index))][1].equal(before[index][1])
    with one_line((FileNotFoundError, ValueError), root, "expected a data set with"):
        convert(root, tmp_path / "coco", "coco", progress=False)


@pytest.fixture
def voc_masks(tmp_path):
    folder = tmp_path / "masks"
    write_labelme(folder / "train/a.json", ("x", "rectangle", [[1, 1], [5, 5]]))
    save_image(folder / "train/a.jpg")
    convert(folder, tmp_path / "voc_masks", "voc", progress=False)
    for path in (tmp_path / "voc_masks/ImageSets/Main").iterdir():
        path.unlink()
    for path in (tmp_path / "voc_masks/Annotations").iterdir():
        path.unlink()
    return tmp_path / "voc_masks"


@pytest.fixture
def cityscapes_masks(request):
    return request.getfixturevalue("cityscapes")


def test_same_names_in_splits(tmp_path):
    files = {f"{split}/images/a.jpg": "" for split in ("train", "valid")} | {
        f"{split}/labels/a.txt": f"0 0.5 0.5 0.{size} 0.5"
        for split, size in (("train", 2), ("valid", 4))
    }
    write_yolo(tmp_path / "yolo", files | {"classes.txt": "x"})
    for split, seed in (("train", 1), ("valid", 2)):
        save_image(tmp_path / f"yolo/{split}/images/a.jpg", seed=seed)
    for layout in LAYOUTS:
        convert(tmp_path / "yolo", tmp_path / "out" / layout, layout, progress=False)
        same(tmp_path / "yolo", tmp_path / "out" / layout)


def test_single_pixels_are_counted(tmp_path):
    write_labelme(tmp_path / "set/a.json", ("x", "rectangle", [[1, 1], [2, 2]]))
    save_image(tmp_path / "set/a.jpg")
    result = convert(tmp_path / "set", tmp_path / "out", "voc", progress=False)
    assert "1 boxes of a single pixel" in str(result)


def test_hard_links(voc, tmp_path):
    convert(voc, tmp_path / "out", "yolo", hard_links=True, progress=False)
    images = list((tmp_path / "out").rglob("*.jpg"))
    assert len(images) == 3
    assert all(path.stat().st_nlink == 2 for path in images)


def test_what_a_killed_process_left_is_removed(voc, tmp_path):
    left, used = (tmp_path / f"out.partial-{digit * 16}" for digit in "0f")
    for folder in (left, used, tmp_path / "out.partial-1", tmp_path / "put.partial-0"):
        (folder / "images").mkdir(parents=True)
    with locked_folder(used):  # as another conversion does
        convert(voc, tmp_path / "out", "coco", progress=False)
    same(voc, tmp_path / "out")
    assert not left.exists()
    assert len(list(tmp_path.glob("?ut.partial-*"))) == 3


def test_without_locks_a_folder_may_be_in_use(voc, tmp_path, monkeypatch):
    monkeypatch.setattr("deformnet._files.fcntl", None)
    (used := tmp_path / f"out.partial-{'0' * 16}").mkdir()
    convert(voc, tmp_path / "out", "coco", progress=False)
    assert used.exists()


def test_rotated_images_for_yolo(voc, tmp_path):
    from PIL import Image

    path = voc / "VOCdevkit/VOC2012/JPEGImages/a.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    for layout in ("coco", "voc"):
        convert(voc, tmp_path / "out" / layout, layout, progress=False)
        same(voc, tmp_path / "out" / layout)
    with one_line(ValueError, path, "EXIF"):
        convert(voc, tmp_path / "out/yolo", "yolo", progress=False)
    assert not (tmp_path / "out/yolo").exists()
    assert not list(tmp_path.rglob("*partial*"))


def test_images_without_annotations(voc, tmp_path):
    write_coco(tmp_path / "coco", coco_content(), "val", "val")
    path = write_coco(tmp_path / "coco", coco_content(), "test", "test")
    path.rename(path.with_name("image_info_test.json"))
    result = convert(tmp_path / "coco", tmp_path / "out", "yolo", progress=False)
    assert "Split test is left out" in str(result)
    assert list(result.splits) == ["val"]


def test_folders_that_are_refused(voc, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for out in ("full", "full/file"):
        with one_line(FileExistsError, tmp_path / out, "new or empty"):
            convert(voc, tmp_path / out, "coco", progress=False)
    with one_line(ValueError, voc / "out", "outside"):
        convert(voc, voc / "out", "coco", progress=False)
    with one_line(FileNotFoundError, tmp_path / "full", "expected a data set"):
        convert(tmp_path / "full", tmp_path / "out", "coco", progress=False)
    (tmp_path / "empty").mkdir()
    convert(voc, str(tmp_path / "empty"), "coco", progress=False)
    same(voc, tmp_path / "empty")


def test_nothing_is_left_after_an_error(voc, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match=r"No space left.*images/"):
        convert(voc, tmp_path / "out", "coco", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["voc"]


def test_files_that_other_programs_read(voc, tmp_path):
    for layout in LAYOUTS:
        convert(voc, tmp_path / "out" / layout, layout, progress=False)
    entries = json.loads((tmp_path / "out/coco/annotations/instances_train.json").read_text())
    assert entries["categories"] == [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    assert entries["annotations"][0]["bbox"] == [2, 1, 7, 9]
    assert entries["annotations"][0]["area"] == 63
    assert (tmp_path / "out/yolo/data.yaml").read_text() == (
        'path: .\ntrain: images/train\nval: images/val\nnames:\n  0: "one"\n  1: "two"\n'
    )
    first = (tmp_path / "out/yolo/labels/train/a.txt").read_text().splitlines()[0].split()
    assert list(map(float, first)) == pytest.approx([0, 5.5 / 16, 5.5 / 12, 7 / 16, 9 / 12])
    assert (tmp_path / "out/yolo/labels/train/b.txt").read_text() == ""
    assert (tmp_path / "out/voc/ImageSets/Main/train.txt").read_text() == "a\nb\n"
    assert "<xmin>3</xmin>" in (tmp_path / "out/voc/Annotations/a.xml").read_text()


def test_command(voc, tmp_path, capsys):
    main(["data", "convert", str(voc), str(tmp_path / "out"), "--layout", "yolo"])
    assert "train (2 images), val (1 images)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "convert", str(voc), str(tmp_path / "out"), "--layout", "coco"])
    assert "new or empty" in capsys.readouterr().err


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs DEFORMNET_DATA")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bccd_there_and_back(tmp_path, layout):
    convert(BCCD, tmp_path / "there", layout, hard_links=False, progress=False)
    convert(tmp_path / "there", tmp_path / "back", "voc", hard_links=True, progress=False)
    ignored = layout != "yolo"
    same(BCCD, tmp_path / "there", ignored=ignored)
    same(BCCD, tmp_path / "back", ignored=ignored)
