"""Recognition of the layout of a segmentation data set."""

import pytest
from small_sets import one_line

from deformnet.data import CityscapesSegmentation, VOCSegmentation, open_segmentation


def test_recognizes_both(voc, cityscapes):
    assert isinstance(open_segmentation(voc, "train"), VOCSegmentation)
    assert isinstance(open_segmentation(cityscapes, "train"), CityscapesSegmentation)


def test_root_as_string(voc):
    assert len(open_segmentation(str(voc), "train")) == 2


def test_passes_transforms(voc, cityscapes):
    for root in (voc, cityscapes):
        assert open_segmentation(root, "val", lambda image, mask: "transformed")[0] == "transformed"


def test_unknown_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    with one_line(FileNotFoundError, tmp_path, "VOCdevkit", "leftImg8bit", "holds photos"):
        open_segmentation(tmp_path, "train")


def test_missing_folder(tmp_path):
    with one_line(FileNotFoundError, tmp_path / "nowhere", "no such folder"):
        open_segmentation(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_missing_split(kind, request):
    with one_line(FileNotFoundError, "other", "train, val"):
        open_segmentation(request.getfixturevalue(kind), "other")
