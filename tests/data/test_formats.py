"""Data sets in the formats of common tools are read as what their authors meant."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from formats import FORMATS, VOID, Format, binary_masks, blood, labelimg, table, write
from PIL import Image

from deformnet._errors import UserError
from deformnet.data import open_detection, open_segmentation
from deformnet.data.check import check_data
from deformnet.data.files import read_image
from small_sets import one_line

PAGE = Path(__file__).parents[2] / "docs/own-data.md"
READ = [it for it in FORMATS if not it.message]
REFUSED = [it for it in FORMATS if it.message]


def by_title(it):
    return it.folder


@pytest.fixture(scope="module")
def written(real_data, tmp_path_factory):
    """Writes a format when it is first needed."""
    out, known = tmp_path_factory.mktemp("formats"), {}

    def write_once(it: Format):
        if it not in known:
            known[it] = write(it, out, real_data)
        return out, known[it]

    return write_once


@pytest.mark.parametrize("it", READ, ids=by_title)
def test_splits_classes_and_annotations(it, written):
    out, expected = written(it)
    assert it.splits(out) == sorted(expected.splits)
    for split, samples in expected.splits.items():
        images = it.open(out, split)
        assert images.classes == expected.classes
        names = [images.name(index) for index in range(len(images))]
        assert sorted(names) == sorted(samples)
        for index, name in enumerate(names):
            compare(it, images, index, samples[name])


def compare(it, images, index, sample):
    image, target = images[index]
    assert tuple(image.shape[1:]) == sample.size
    if index == 0:  # what is turned was saved again as JPEG
        difference = image.int() - read_image(sample.image).int()
        assert difference.abs().float().mean() < (4 if it.title == "Phone photographs" else 1e-9)
    if it.network == "classifier":
        assert images.classes[target] == sample.names[0]
    elif it.network == "deeplab":
        mask = np.asarray(target)
        assert (mask != sample.mask).mean() <= it.tolerance
        assert set(np.unique(mask)) == set(np.unique(sample.mask))
        assert set(np.unique(mask)) <= {*range(len(images.classes)), VOID}
    else:
        assert tuple(images.classes[label] for label in target.labels) == sample.names
        np.testing.assert_allclose(np.asarray(target.boxes), sample.boxes, atol=1e-3)


@pytest.mark.parametrize("it", READ, ids=by_title)
def test_validation_split(it, written):
    """There is one by another name, or a fifth is held out."""
    out, expected = written(it)
    if it.val:
        assert len(it.open(out, "val")) == len(expected.splits[it.val])
    else:
        parts = [it.open(out, f"train[{kind}=0.2]") for kind in ("held-out", "without")]
        names = [[part.name(index) for index in range(len(part))] for part in parts]
        (samples,) = expected.splits.values()
        assert len(names[0]) == round(0.2 * len(samples))
        assert sorted(names[0] + names[1]) == sorted(samples)


@pytest.mark.parametrize("it", [it for it in READ if not it.is_apart], ids=by_title)
def test_data_check_finds_all_and_no_problems(it, written, tmp_path):
    out, expected = written(it)
    record = tmp_path / "record.jsonl"
    custom = it.title == "Cityscapes"  # has the folders of the official data set
    folder = out / it.folder
    report = check_data(folder, custom=custom, workers=0, record=record, progress=False)
    assert report.ok, report
    images = {images.images for images in report.lists}
    assert images == {len(samples) for samples in expected.splits.values()}


@pytest.mark.parametrize("it", REFUSED, ids=by_title)
def test_refusals_say_what_to_do(it, written):
    out, _ = written(it)
    with pytest.raises((ValueError, OSError)) as caught:
        it.open(out, "train")
    message, expected = str(caught.value), it.message.format(root=out / it.folder)
    assert "\n" not in message
    # What data sets are expected to hold is the end of some messages.
    assert message.startswith(expected) if "a data set with" in expected else message == expected


def test_classes_txt_is_all_that_yolo_lacks(written, tmp_path):
    it = next(it for it in FORMATS if it.title == "YOLO, no names")
    out, expected = written(it)
    shutil.copytree(out / it.folder, tmp_path / it.folder)
    (tmp_path / it.folder / "classes.txt").write_text("\n".join(expected.classes))
    assert len(it.open(tmp_path, "train")) == 12


def test_binary_masks_saved_as_jpeg(real_data, tmp_path):
    binary_masks(tmp_path, real_data)
    (tmp_path / "classes.txt").unlink()
    for mask in (tmp_path / "masks").iterdir():
        Image.open(mask).save(mask.with_suffix(".jpg"), quality=80)
        mask.unlink()
    with one_line(UserError, "JPEG changes values"):
        open_segmentation(tmp_path, "train")


def test_misspelled_class(real_data, tmp_path):
    labelimg(tmp_path / "set", real_data)
    xml = min((tmp_path / "set").glob("*.xml"))
    xml.write_text(xml.read_text().replace(">RBC<", ">rbc<", 1))
    report = check_data(tmp_path / "set", workers=0, record=tmp_path / "record", progress=False)
    assert any("rbc" in remark and "RBC" in remark for remark in report.remarks)


def test_script_of_the_documentation(written, real_data, tmp_path):
    """It converts a table of boxes."""
    it = next(it for it in FORMATS if it.title == "Table of boxes")
    out, _ = written(it)
    folder = shutil.copytree(out / it.folder, tmp_path / "table")
    script = next(block for block in PAGE.read_text().split("```") if "import csv" in block)
    code = script.removeprefix("python")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    images = open_detection(folder, "train")
    samples = {sample.image.stem: sample for sample in blood(real_data).all}
    assert len(images) == len(samples)
    for index in range(len(images)):
        boxes = np.asarray(images.annotations(index).boxes)
        np.testing.assert_allclose(boxes, samples[images.name(index)].boxes)


def test_table_of_the_documentation(written):
    for it in FORMATS:
        out, _ = written(it)
    assert table(out) in PAGE.read_text()
