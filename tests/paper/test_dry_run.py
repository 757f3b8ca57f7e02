"""Rows of the paper: dry runs, and training on tiny data sets with the right classes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deformnet.data import open_detection, open_segmentation
from deformnet.data.image_folder import ImageFolderClassification
from deformnet.engine import Hardware
from deformnet.paper import reproduce as reproducing
from deformnet.paper.dry_run import dry_run_rows, dry_run_table
from deformnet.paper.reproduce import reproduce, require_runnable
from deformnet.paper.rows import (
    CITYSCAPES,
    COCO,
    IMAGENET,
    VOC_DETECTION,
    VOC_SEGMENTATION,
    find_rows,
)
from deformnet.paper.settings import DryRun, Splits
from deformnet.paper.synthetic import write_synthetic_data
from deformnet.recipes import TestTimeAugmentation


def named(name):
    (row,) = find_rows([name])
    return row


QUICK = {"backbone": "resnet18", "norm": "trained", "iterations": 2}
QUICK |= {"short_side": 64, "max_side": 96}


def small(row):
    """The row on a network that trains in seconds."""
    recipe = dataclasses.replace(row.recipe, **QUICK, init=None, warmup=0)
    return dataclasses.replace(row, recipe=recipe)


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (VOC_SEGMENTATION, open_segmentation),
        (CITYSCAPES, open_segmentation),
        (VOC_DETECTION, open_detection),
        (COCO, open_detection),
        (IMAGENET, ImageFolderClassification),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_synthetic_data_have_the_splits_and_classes_of_the_data_set(tmp_path, data, read):
    write_synthetic_data(data, tmp_path, 64, 96)
    for split in (data.train, data.test):
        images = read(tmp_path, split)
        assert len(images.classes) == data.classes
        assert len(images) >= (1 if data is IMAGENET else 2)
        assert images[0][0].shape == (3, 64, 96)


def test_dry_run_reports_size_time_and_memory(tmp_path):
    rows = find_rows(["table1/deeplab-voc-3", "table3/deeplab-voc-conv"])
    dry = DryRun(batch=1, scale=0.15)
    out = tmp_path / "dry-run.json"
    first, second = dry_run_rows(rows, dry, out=out)
    assert (first["row"], second["row"]) == tuple(row.name for row in rows)
    assert first["run"] == second["run"]
    assert first["parameters"] == 44_868_747  # 44.619861 M and three times 18 channels on 512
    assert 0 < first["seconds_per_step"] < 600
    assert first["peak_memory_bytes"] > 4 * 4 * first["parameters"]
    assert (first["batch"], first["short_side"]) == (1, 54)
    table = dry_run_table([first, second])
    assert "table1/deeplab-voc-3" in table
    assert "44.869" in table
    # Results in the file are not measured again, nor mixed with other settings.
    content = json.loads(out.read_text())
    content["runs"][first["run"]]["seconds_per_step"] = -1.0
    out.write_text(json.dumps(content))
    assert dry_run_rows(rows[:1], dry, out=out)[0]["seconds_per_step"] == -1.0
    with pytest.raises(
        ValueError, match=r"expected a dry run with scale 0.2, but got one with scale 0.15"
    ):
        dry_run_rows(rows, DryRun(batch=1, scale=0.2), out=out)


def test_row_with_stored_proposals(tmp_path, monkeypatch):
    data, out = tmp_path / "voc", tmp_path / "out"
    write_synthetic_data(VOC_DETECTION, data, 64, 96)
    rpn = reproducing.proposal_recipe

    def quick(recipe):
        return dataclasses.replace(rpn(recipe), **QUICK)

    monkeypatch.setattr(reproducing, "proposal_recipe", quick)
    row = small(named("table3/rfcn-conv-pool"))
    result = reproduce(row, data, out, hardware=Hardware(workers=0))
    assert set(result["measured"]) == {"mAP@0.5", "mAP@0.7"}
    assert result["paper"] == {"mAP@0.5": 82.6, "mAP@0.7": 68.5}
    assert json.loads((out / "results/table3/rfcn-conv-pool.json").read_text()) == result
    stored = sorted(path.name for path in (out / "proposals").iterdir())
    assert [name.rpartition("-")[0] for name in stored] == [
        "voc-VOC2007_test",
        "voc-VOC2007_trainval+VOC2012_trainval",
    ]
    checkpoint = out / "runs" / row.run / "checkpoints/last.ckpt"
    written = checkpoint.stat().st_mtime_ns
    reproduce(row, data, out, hardware=Hardware(workers=0))
    assert checkpoint.stat().st_mtime_ns == written  # it was finished


def test_row_on_coco_writes_a_submission(tmp_path):
    data, out = tmp_path / "coco", tmp_path / "out"
    write_synthetic_data(COCO, data, 64, 96)
    row = small(named("table5/class-aware-rpn-deformable"))
    result = reproduce(row, data, out, hardware=Hardware(workers=0))
    assert result["measured"] == {}
    found = json.loads(Path(result["metrics"]["submission"]).read_text())
    # Another row of the same run has its own file.
    other = dataclasses.replace(
        row, name="table5/other", augmentation=TestTimeAugmentation(flip=True)
    )
    again = reproduce(other, data, out, hardware=Hardware(workers=0))
    assert again["run"] == result["run"]
    assert again["metrics"]["submission"] != result["metrics"]["submission"]
    assert {entry["image_id"] for entry in found} <= {4, 5}
    # Labeled images are scored here.
    splits = Splits(train_split="train2017", test_split="val2017")
    other = reproduce(row, data, tmp_path / "home", splits=splits, hardware=Hardware(workers=0))
    assert set(other["paper"]) <= set(other["measured"])


def test_data_with_other_classes_are_rejected(tmp_path):
    write_synthetic_data(VOC_DETECTION, tmp_path, 64, 96)
    (tmp_path / "classes.txt").write_text("cat\ndog\naeroplane\nbicycle\nbird\nboat\nbottle\nbus\n")
    row = named("table1/rfcn-3")
    with pytest.raises(
        ValueError,
        match=r"expected PASCAL VOC 2007 \+ 2012 with 20 classes for table1/rfcn-3, .* 8 ",
    ):
        require_runnable([row], tmp_path, Splits(train_split="VOC2007/test"))
    with pytest.raises((FileNotFoundError, ValueError), match="expected a data set with"):
        require_runnable(
            [named("table5/rfcn-plain")], tmp_path / "VOCdevkit/VOC2007/JPEGImages", Splits()
        )


def test_row_that_starts_from_another_row(tmp_path):
    write_synthetic_data(COCO, tmp_path, 64, 96)
    with pytest.raises(FileNotFoundError, match=r"train it first .*, or pass --init"):
        reproduce(named("table5/rfcn-aligned-plain"), tmp_path, tmp_path / "out")
    base = named("table7/aligned-inception-resnet")
    checkpoint = tmp_path / "out/runs" / base.run / "checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    content = {key: {} for key in ("model", "optimizer", "precision")}
    described = {"deformnet": {"recipe": {}, "data": {}}}
    torch.save({**content, **described, "iteration": 200}, checkpoint)
    with pytest.raises(ValueError, match=r"has done 200 of 600000 iterations: finish it first"):
        reproduce(named("table5/rfcn-aligned-plain"), tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"not implemented: a network of Szegedy"):
        reproduce(named("table7/inception-resnet-v2"), tmp_path, tmp_path / "out")
