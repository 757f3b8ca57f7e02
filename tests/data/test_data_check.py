"""The check of data sets: problems, remarks, official counts, resumption."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from deformnet._files import read_lines
from deformnet.data import items, open_detection
from deformnet.data.check import OFFICIAL_SETS, check_data, where_text
from deformnet.data.check import check as checking
from deformnet.data.files import IMAGE_SUFFIXES
from deformnet.data.items import has_area
from detection_sets import coco as coco_annotations
from detection_sets import coco_object, voc_object, voc_xml, write_coco, write_voc_images
from forks import Fork
from small_sets import one_line, save_city, save_image, save_labels, write_list

YEAR = "VOCdevkit/VOC2012"
LISTS = ("VOC2012/Main/train", "VOC2012/Main/trainval", "VOC2012/Segmentation/train")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/deformnet/data-check"


@pytest.fixture
def voc(tmp_path) -> Path:
    """A custom data set: boxes of a to d in trainval, a and b in train; masks of a (0), b (1)."""
    root = tmp_path / "voc"
    year = root / "VOCdevkit/VOC2012"
    write_voc_images(year, {name: [voc_object((2, 2, 9, 9))] for name in "abcd"})
    for label, name in enumerate("ab"):
        save_labels(year / f"SegmentationClass/{name}.png", label)
    write_list(year / "ImageSets/Main/trainval.txt", "abcd")
    write_list(year / "ImageSets/Main/train.txt", "ab")
    write_list(year / "ImageSets/Main/one_train.txt", ["a 1", "b -1"])
    write_list(year / "ImageSets/Segmentation/train.txt", "ab")
    write_list(root / "classes.txt", ["background", "one"])
    return root


@pytest.fixture
def coco(tmp_path) -> Path:
    """Images 1 to 4, with an object each, of split own in own/."""
    objects = [coco_object(i, i, 7, [1, 1, 5, 5]) for i in range(1, 5)]
    content = coco_annotations({i: f"{i}.jpg" for i in range(1, 5)}, {7: "one"}, objects)
    write_coco(tmp_path / "coco", content, "own", "own")
    return tmp_path / "coco"


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    root = tmp_path / "cityscapes"
    for number in range(3):
        save_city(root, "train", f"town_000000_{number:06d}", 7)
    return root


@pytest.fixture
def folders(tmp_path) -> Path:
    root = tmp_path / "folders"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            save_image(root / f"{split}/{name}/1.JPEG")
    return root


def check(root: Path, **options):
    return check_data(root, workers=0, progress=False, **options)


def rows(report) -> dict:
    return {one.name: (one.images, one.missing, one.faulty) for one in report.lists}


# Valid data sets of all layouts.


def test_valid_voc(voc, cache):
    report = check(voc)
    assert report.ok
    assert rows(report) == dict(zip(LISTS, [(2, 0, 0), (4, 0, 0), (2, 0, 0)], strict=True))
    assert (report.checked, report.remembered) == (6, 0)  # 4 with boxes, 2 with masks
    assert not report.problems
    assert not report.remarks
    assert "no problems" in str(report)
    assert report.file.parent == cache
    assert "VOC2012/Main/trainval" in report.file.read_text()


def test_other_valid_layouts(coco, cityscapes, folders):
    assert rows(check(coco)) == {"instances_own": (4, 0, 0)}
    assert rows(check(cityscapes)) == {"gtFine/train": (3, 0, 0)}
    assert rows(check(folders)) == {"train": (2, 0, 0), "val": (2, 0, 0)}
    assert all(check(root).ok for root in (coco, cityscapes, folders))


def test_data_sets_in_subfolders(voc, coco, cityscapes, folders, tmp_path):
    (coco / "own/3.jpg").write_text("no image")
    report = check(tmp_path)
    assert set(rows(report)) == {
        *("cityscapes/gtFine/train", "coco/instances_own", "folders/train", "folders/val"),
        *(f"voc/{name}" for name in LISTS),
    }
    (problem,) = report.problems
    assert problem.startswith("coco/own/3.jpg: not a readable image")
    assert rows(report)["coco/instances_own"] == (4, 0, 1)


def test_years_beside_other_data_sets(voc, coco, tmp_path):
    root = tmp_path / "all"
    voc.rename(root)
    shutil.move(coco, root / "VOC_in_json")
    (root / "lost+found").mkdir(mode=0)
    assert set(rows(check(root))) == {*LISTS, "VOC_in_json/instances_own"}


def test_all_levels_of_voc(voc):
    for place in ("VOCdevkit", "VOCdevkit/VOC2012"):
        assert check(voc / place).ok
        assert "VOC2012/Main/trainval" in rows(check(voc / place))


def test_several_processes_give_the_same_report(voc, coco):
    (coco / "own/3.jpg").write_text("no image")
    for root in (voc, coco):
        alone = check(root, record=root / "a")
        together = check_data(root, workers=2, record=root / "b", progress=False)
        assert together.problems == alone.problems
        assert together.lists == alone.lists
        assert together.checked == alone.checked


def test_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path):
        with one_line(
            FileNotFoundError, "VOCdevkit", "instances_<split>.json", "leftImg8bit", "train/<class>"
        ):
            check(root)
    with one_line(FileNotFoundError, "no such folder"):
        check(tmp_path / "nowhere")


# Missing files.


def test_missing_files_are_named_and_counted_by_folder(voc):
    year = voc / "VOCdevkit/VOC2012"
    for name in "bcd":
        (year / f"JPEGImages/{name}.jpg").unlink()
    (year / "Annotations/a.xml").unlink()
    report = check(voc)
    assert not report.ok
    assert report.summary == (
        "VOCdevkit/VOC2012/Annotations: 1 of 4 annotations of VOC2012/Main/trainval are missing, "
        "the first is a.xml",
        "VOCdevkit/VOC2012/JPEGImages: 3 of 4 images of VOC2012/Main/trainval are missing, "
        "the first is b.jpg",
    )
    files = [line.split(":")[0].rsplit("/")[-1] for line in report.problems]
    assert files == ["a.xml", "b.jpg", "c.jpg", "d.jpg"]
    assert rows(report) == dict(zip(LISTS, [(2, 2, 0), (4, 4, 0), (2, 1, 0)], strict=True))
    text = report.file.read_text()
    assert all(line in text for line in report.problems)


def test_missing_masks(voc):
    shutil.rmtree(voc / "VOCdevkit/VOC2012/SegmentationClass")
    (line,) = check(voc).summary
    assert "SegmentationClass: 2 of 2 label maps of VOC2012/Segmentation/train are missing" in line


def test_augmented_masks(voc):
    year = voc / YEAR
    write_list(year / "ImageSets/Segmentation/train_aug.txt", "abc")
    save_labels(year / "SegmentationClassAug/a.png", 1)
    (line,) = check(voc).summary
    assert "SegmentationClassAug: 1 of 3 label maps" in line
    assert line.endswith("the first is c.png")
    save_labels(year / "SegmentationClassAug/c.png", 2)
    (line,) = check(voc).summary
    assert "SegmentationClassAug/c.png: expected labels of the 2 classes" in line
    assert "but got label 2" in line


def test_cityscapes_without_labels_or_images(cityscapes):
    (cityscapes / "gtFine").rename(cityscapes / "labels")
    report = check(cityscapes)
    assert report.summary == (
        "gtFine/train: 3 of 3 label maps of gtFine/train are missing, the first is "
        "town/town_000000_000000_gtFine_labelIds.png",
    )
    assert report.checked == 3  # the images themselves
    (cityscapes / "labels").rename(cityscapes / "gtFine")
    shutil.rmtree(cityscapes / "leftImg8bit")
    (line,) = check(cityscapes).summary
    assert "leftImg8bit/train: 3 of 3 images" in line


@pytest.mark.parametrize("gone", ["1234", "1", "4"])
def test_coco_without_images(coco, gone):
    for number in gone:
        (coco / f"own/{number}.jpg").unlink()
    (line,) = check(coco).summary
    assert line == (
        f"own: {len(gone)} of 4 images of instances_own are missing, the first is {gone[0]}.jpg"
    )


def test_images_without_annotations(coco):
    path = coco / "annotations/instances_own.json"
    content = json.loads(path.read_text())
    del content["annotations"]
    names = ["person", *(f"class {number}" for number in range(78)), "toothbrush"]
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    (coco / "annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    path.unlink()
    (coco / "own").rename(coco / "test2017")
    report = check(coco, custom=True)
    assert rows(report) == {"image_info_test-dev2017": (4, 0, 0)}
    assert report.ok
    (line,) = check(coco).problems
    assert "but got 4" in line
    assert "20288" in line


# Faults.


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5])
@pytest.mark.parametrize("file", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
def test_damaged_files(voc, file, fraction):
    path = voc / "VOCdevkit/VOC2012" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    report = check(voc)
    (line,) = report.problems  # once, though several lists have it
    assert line.startswith(f"VOCdevkit/VOC2012/{file}: not a readable image")
    faulty = int("JPEG" in file), int("JPEG" in file), 1
    assert [one.faulty for one in report.lists] == [*faulty]
    assert not any(one.missing for one in report.lists)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", "not readable as XML"),
        (">one<", ">two<", "object 1: expected an object of one of the classes"),
        ("<xmax>9", "<xmax>x", "object 1: expected numbers as xmin"),
        ("16<", "17<", "expected the annotated size 17x12, but got 16x12"),
    ],
)
def test_wrong_annotations(voc, old, new, message):
    path = voc / YEAR / "Annotations/c.xml"
    path.write_text(path.read_text().replace(old, new))
    report = check(voc)
    (line,) = report.problems
    assert message in line
    assert rows(report)["VOC2012/Main/trainval"] == (4, 0, 1)
    assert rows(report)["VOC2012/Main/train"] == (2, 0, 0)


def test_every_wrong_object_is_named(voc):
    wrong = voc_xml(*[voc_object((2, 2, 9, 9), "two")] * 3)
    (voc / YEAR / "Annotations/c.xml").write_text(wrong)
    assert len(check(voc).problems) == 3


def test_boxes_without_area_are_remarks(voc, coco):
    text = voc_xml(voc_object((20, 2, 30, 9)))
    (voc / "VOCdevkit/VOC2012/Annotations/c.xml").write_text(text)
    path = coco / "annotations/instances_own.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["bbox"] = [1, 1, 0, 5]
    path.write_text(json.dumps(content))
    for root, name in ((voc, "c.xml: object 1"), (coco, "annotation 3")):
        for _ in range(2):  # also of recorded images
            report = check(root)
            assert report.ok
            (line,) = report.remarks
            assert name in line
            assert "no area" in line
            assert all(one.faulty == 0 for one in report.lists)


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((1, 1, 2, 2), (12, 16), True),
        ((-5, -5, 1, 1), (12, 16), True),
        ((-5, 1, 0, 5), (12, 16), False),
        ((1, -5, 5, 0), (12, 16), False),
        ((16, 1, 20, 5), (12, 16), False),
        ((1, 12, 5, 20), (12, 16), False),
        ((1, 12, 5, 20), None, True),
        ((5, 1, 5, 5), None, False),
        ((1, 1, float("nan"), 5), (12, 16), False),
        ((1, 1, float("inf"), 5), (12, 16), False),
    ],
)
def test_has_area(box, size, expected):
    assert has_area(box, size) is expected


def test_wrong_masks(voc, cityscapes):
    masks = voc / "VOCdevkit/VOC2012/SegmentationClass"
    save_labels(masks / "a.png", 9)
    save_labels(masks / "b.png", np.ones((13, 16)))
    lines = check(voc).problems
    assert "SegmentationClass/a.png: expected labels of the 2 classes" in lines[0]
    assert "but got label 9" in lines[0]
    text = "SegmentationClass/b.png: expected the size of its image b.jpg, 16x12, but got 16x13"
    assert lines[1].endswith(text)
    save_labels(next((cityscapes / "gtFine").glob("*/*/*000001*")), 40, mode="L")
    (line,) = check(cityscapes).problems
    assert "expected the ids of Cityscapes, 0 to 33, but got label 40" in line


def test_wrong_coco(coco):
    path = coco / "annotations/instances_own.json"
    content = json.loads(path.read_text())
    content["images"][0]["width"] = 17
    content["annotations"][1]["category_id"] = 8
    content["annotations"][3]["image_id"] = 9
    path.write_text(json.dumps(content))
    text = "\n".join(check(coco).problems)
    for pattern in (
        "annotation 2: expected the id of a listed category.* but got category 8",
        "annotation 4: expected the id of a listed image.* but got image 9",
        "own/1.jpg: expected the annotated size",
    ):
        assert re.search(pattern, text)
    assert text.count("\n") == 2
    path.write_text("{")
    (line,) = check(coco).problems
    assert "not readable as JSON" in line


def test_wrong_lists_of_voc(voc):
    lists = voc / "VOCdevkit/VOC2012/ImageSets"
    write_list(lists / "Main/train.txt", ["a", "a", "b 5"])
    write_list(lists / "Main/empty.txt", [])
    write_list(lists / "Segmentation/train.txt", ["a 1 2"])
    lines = check(voc).problems
    for part in ("lists a more than once", "'b 5'", "empty.txt: expected image ids", "'a 1 2'"):
        assert any(part in line for line in lines)
    (voc / "classes.txt").write_text("one\none\n")
    assert any("'one' more than once" in line for line in check(voc).problems)


@pytest.mark.parametrize("kind", ["pipe", "closed", "huge"])
def test_a_list_that_cannot_be_read_costs_itself(voc, kind):
    """`one_train` may be a list of one class, so its first lines are read."""
    path = voc / YEAR / "ImageSets/Main/one_train.txt"
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "huge":
        os.truncate(path, 0)
        os.truncate(path, 1 << 42)
    else:
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads every file")
    report = check(voc)
    expected = {"pipe": "a pipe or a device", "closed": "Permission denied", "huge": "bytes, but"}
    (problem,) = report.problems
    assert problem.startswith(f"{YEAR}/ImageSets/Main/one_train.txt: ")
    assert expected[kind] in problem
    assert {name for name in rows(report) if name in LISTS} == set(LISTS)
    assert len(open_detection(voc, "train")) == 2


def test_huge_files_cost_themselves(voc):
    for name in ("Annotations/a.xml", "JPEGImages/b.jpg", "SegmentationClass/b.png"):
        path = voc / YEAR / name
        path.write_bytes(b"")
        os.truncate(path, 1 << 42)
    report = check(voc)
    assert any("a.xml: expected a file of at most" in problem for problem in report.problems)
    assert rows(report) == dict(zip(LISTS, [(2, 0, 2), (4, 0, 2), (2, 0, 1)], strict=True))
    with one_line(ValueError, "a.xml: expected a file of at most", f"but got {1 << 42}"):
        open_detection(voc, "train")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_a_file_beyond_the_memory_costs_itself(voc, error, monkeypatch):
    read = items.read_image

    def limited(path: Path, **options: object) -> object:
        if path.stem == "c":
            raise error
        return read(path, **options)

    monkeypatch.setattr(items, "read_image", limited)
    report = check(voc)
    (problem,) = report.problems
    assert problem.startswith(f"{YEAR}/JPEGImages/c.jpg: {error or 'out of memory'}")
    assert rows(report)["VOC2012/Main/trainval"] == (4, 0, 1)
    monkeypatch.setattr(items, "read_image", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        check(voc)


def test_a_list_beyond_the_memory_costs_itself(voc, monkeypatch):
    def limited(path: Path) -> list[str]:
        if path.stem == "trainval":
            raise MemoryError(f"{path}: too large for the memory of this machine")
        return read_lines(path)

    monkeypatch.setattr("deformnet.data.voc.read_lines", limited)
    (problem,) = check(voc).problems
    assert problem.endswith("Main/trainval.txt: too large for the memory of this machine")


def test_wrong_image_folders(folders):
    save_image(folders / "val/cow/1.JPEG")
    (folders / "train/ant").mkdir()
    (folders / "train/.hidden").mkdir()
    (folders / "train/cat/.2.jpg").touch()
    lines = check(folders).problems
    assert lines == (
        f"val/cow: expected the classes of {folders}/train, which has no class cow",
        f"train/ant: expected images ({', '.join(IMAGE_SUFFIXES)}), but found none",
    )
    shutil.rmtree(folders / "val")
    save_image(folders / "val/1.JPEG")
    assert (
        "val: expected DIR/SPLIT/CLASS/IMAGE, but found no folder of a class"
        in check(folders).problems
    )


def test_terminal_shows_a_few_problems_and_the_file_all(folders):
    for number in range(20):
        (folders / f"train/cat/{number:02d}.jpg").write_text("no image")
    report = check(folders)
    assert len(report.problems) == 20
    assert len(report.summary) == 6
    assert report.summary[-1] == "... and 15 more in train/cat"
    text = report.file.read_text()
    assert all(line in text for line in report.problems)
    assert "20 problems" in str(report)


# Official data sets.


def write_2007(root: Path, count: int) -> None:
    """Images and masks of VOC2007's list Segmentation/train, all of one file."""
    year = root / "VOCdevkit/VOC2007"
    names = [f"{number:06d}" for number in range(count)]
    save_image(year / "one.jpg")
    save_labels(year / "one.png", 20)
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (year / folder).mkdir()
        for name in names:
            (year / folder / f"{name}.{ending}").hardlink_to(year / f"one.{ending}")
    write_list(year / "ImageSets/Segmentation/train.txt", names)


def test_official_count(tmp_path):
    write_2007(tmp_path, 209)
    report = check(tmp_path)
    assert report.ok
    assert report.lists[0].official == 209
    assert any("VOC2007/Main/test" in line and "4952" in line for line in report.remarks)
    assert not any("VOC2012" in line for line in report.remarks)


def test_test_list_without_labels_is_valid(tmp_path):
    write_2007(tmp_path, 209)
    year = tmp_path / "VOCdevkit/VOC2007"
    ids = (year / "ImageSets/Segmentation/train.txt").read_text().split()
    (year / "ImageSets/Segmentation/test.txt").write_text("\n".join(ids[:3]))
    for name in ids[:3]:
        (year / f"SegmentationClass/{name}.png").rename(year / f"{name}.hidden")
    (year / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[3:]))
    report = check(tmp_path, custom=True)
    assert report.ok
    assert any("has no label maps: test images" in line for line in report.remarks)
    (year / f"{ids[0]}.hidden").rename(year / f"SegmentationClass/{ids[0]}.png")
    assert not check(tmp_path, custom=True).ok  # some exist, so the others are missing


def test_other_count_is_a_problem_unless_custom(tmp_path):
    write_2007(tmp_path, 208)
    report = check(tmp_path)
    (line,) = report.problems
    assert "train.txt: expected the 209 images" in line
    assert "but got 208" in line
    assert "--custom" in line
    report = check(tmp_path, custom=True)
    assert report.ok
    assert report.lists[0].official is None
    assert not any("absent" in line for line in report.remarks)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert check(tmp_path).lists[0].official is None


def test_cities_and_synsets_identify_official_data_sets(cityscapes, folders):
    for root in (cityscapes, folders):
        assert all(one.official is None for one in check(root).lists)
    (cityscapes / "leftImg8bit/train/town").rename(cityscapes / "leftImg8bit/train/aachen")
    (cityscapes / "gtFine/train/town").rename(cityscapes / "gtFine/train/aachen")
    assert check(cityscapes).lists[0].official == 2975
    for split in ("train", "val"):
        (folders / split / "cat").rename(folders / split / "n01440764")
    report = check(folders)
    assert [one.official for one in report.lists] == [1281167, 50000]
    assert any(
        "expected the 1281167 images of the official train" in line for line in report.problems
    )
    assert check(folders, custom=True).ok  # a part of ImageNet


def test_official_data_sets():
    counts = {name: count for one in OFFICIAL_SETS for name, count in one.counts.items()}
    assert counts["VOC2007/Main/trainval"] + counts["VOC2012/Main/trainval"] == 16551
    for lists in ("2007/Main", "2007/Segmentation", "2012/Main", "2012/Segmentation"):
        train, val, both = (counts[f"VOC{lists}/{name}"] for name in ("train", "val", "trainval"))
        assert train + val == both
    assert counts["instances_train2014"] + counts["instances_val2014"] == 123287
    assert counts["instances_train2017"] + counts["instances_val2017"] == 123287
    text = where_text()
    for one in OFFICIAL_SETS:
        assert one.name in text
        assert one.page in text
        assert all(file in text for file in one.files)
    assert "VOC2012/Segmentation/train_aug 10582" in text
    assert max(map(len, text.splitlines())) <= 100


# Resumption.


def test_valid_files_are_recorded(voc, cache):
    assert check(voc).checked == 6
    report = check(voc)
    assert (report.checked, report.remembered) == (0, 6)
    assert report.ok
    assert len(list(cache.glob("*.jsonl"))) == 1
    # Another folder has another record.
    shutil.copytree(voc, voc.parent / "copy")
    assert check(voc.parent / "copy").remembered == 0


def test_changed_files_are_checked_again(voc):
    check(voc)
    path = voc / "VOCdevkit/VOC2012/JPEGImages/c.jpg"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert check(voc).checked == 1
    xml = voc / "VOCdevkit/VOC2012/Annotations/d.xml"
    xml.write_text(xml.read_text() + " ")
    assert check(voc).checked == 1
    (voc / "classes.txt").write_text("background\ntwo\n")
    assert len(check(voc).problems) == 4


def test_faulty_files_are_checked_every_time(voc):
    path = voc / "VOCdevkit/VOC2012/JPEGImages/c.jpg"
    good = path.read_bytes()
    path.write_text("no image")
    for checked in (6, 1):
        report = check(voc)
        assert (len(report.problems), report.checked) == (1, checked)
    path.write_bytes(good)
    assert check(voc).ok


def test_record_with_a_partial_line(voc, tmp_path):
    record = tmp_path / "there/record"
    check(voc, record=record)
    text = record.read_text()
    record.write_bytes(text[:-20].encode() + b"\xff\x00")
    assert check(voc, record=record).checked == 1
    assert check(voc, record=record).remembered == 6


def test_record_on_a_full_disk(voc, tmp_path, monkeypatch):
    record, usual = tmp_path / "record", Path.open

    def opened(path, *mode, **options):
        return usual(Path("/dev/full") if path == record else path, *mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space") as error:
        check(voc, record=record)
    assert error.value.filename == str(record)


def test_paths_of_record_and_report(voc, tmp_path, cache):
    report = check(voc, record=tmp_path / "x/record", report=tmp_path / "y/report.txt")
    assert report.file == tmp_path / "y/report.txt"
    assert report.file.is_file()
    assert (tmp_path / "x/record").is_file()
    assert not cache.exists()
    with pytest.raises(ValueError, match="expected workers to be at least 0, but got -1"):
        check_data(voc, workers=-1)
    for name in (".", "/", ".."):
        with pytest.raises(ValueError, match="expected a regular file for the record"):
            check_data(voc, record=name)


def stopped_check(root: Path, record: Path, end: int) -> None:
    """A check that sends itself a signal after 20 images."""
    add = checking.Record.add

    def stopping(self: object, key: object, result: object) -> None:
        add(self, key, result)
        if len(record.read_text().splitlines()) == 20:
            os.kill(os.getpid(), end)

    checking.Record.add = stopping
    check_data(root, workers=2, record=record)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_stopped_check_resumes(tmp_path, end):
    count = 60
    root = tmp_path / "large"
    save_image(root / "train/cat/0.png", 40, 40)
    for number in range(1, count):
        (root / f"train/cat/{number}.png").hardlink_to(root / "train/cat/0.png")
    record = tmp_path / "record"
    running = Fork(tmp_path / "printed.txt", stopped_check, root, record, int(end))
    running.communicate(600)
    assert running.returncode != 0
    known = len(record.read_text().splitlines())
    assert 0 < known < count
    report = check(root, record=record)
    assert report.ok
    assert known - 1 <= report.remembered <= known  # the last line may be half written
    assert report.checked == count - report.remembered


# Real data sets.


def test_real_data_sets(real_data, tmp_path):
    expected = {
        "voc2012_mini": (True, 2, 193),
        "bccd_voc": (True, 2, 364),
        "nuclei_coco": (True, 0, 664),
        "camvid_cityscapes": (True, 1, 22),
    }
    for name, numbers in expected.items():
        report = check_data(real_data / name, workers=2, progress=False)
        assert (report.ok, len(report.remarks), report.checked) == numbers
    report = check(real_data / "coco_tiny")
    assert len(report.problems) == 2
    assert all("images of the official" in line for line in report.problems)
    assert check(real_data / "coco_tiny", custom=True).ok
