"""Recognition of the layout of a detection data set."""

import pytest
from detection_sets import coco_content, write_coco, write_voc
from small_sets import one_line

from deformnet.data import COCODetection, VOCDetection, detection_splits, open_detection


@pytest.fixture
def voc_boxes(tmp_path):
    return write_voc(tmp_path / "voc_boxes")


@pytest.fixture
def coco(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", coco_content(), split, split)
    return tmp_path / "coco"


def test_recognizes_both(voc_boxes, coco):
    assert isinstance(open_detection(voc_boxes, "train"), VOCDetection)
    assert isinstance(open_detection(voc_boxes / "VOCdevkit/VOC2012", "train"), VOCDetection)
    assert isinstance(open_detection(coco, "train"), COCODetection)


def test_splits(voc_boxes, coco):
    assert detection_splits(voc_boxes) == detection_splits(coco) == ["train", "val"]


def test_root_as_string(voc_boxes):
    assert len(open_detection(str(voc_boxes), "train")) == 2
    assert detection_splits(str(voc_boxes)) == ["train", "val"]


def test_passes_transforms(voc_boxes, coco):
    for root in (voc_boxes, coco):
        assert (
            open_detection(root, "val", lambda image, annotations: "transformed")[0]
            == "transformed"
        )


@pytest.mark.parametrize("call", [detection_splits, lambda root: open_detection(root, "train")])
def test_unknown_layout(tmp_path, call):
    with one_line(FileNotFoundError, tmp_path, "VOCdevkit", "annotations/instances_*.json"):
        call(tmp_path)
    with one_line(FileNotFoundError, tmp_path / "nowhere", "no such folder"):
        call(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["voc_boxes", "coco"])
def test_missing_split(kind, request):
    with one_line(FileNotFoundError, "other", "train, val"):
        open_detection(request.getfixturevalue(kind), "other")


def test_segmentation_data_set_without_boxes(voc):
    assert detection_splits(voc) == []
    with one_line(FileNotFoundError, "ImageSets/Main/train.txt", "none"):
        open_detection(voc, "train")
