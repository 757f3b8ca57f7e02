"""Small data sets on disk."""

from pathlib import Path

import pytest

from small_sets import save_city, save_image, save_labels, write_list


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Images a, b (12 x 16, labels 0, 1) in train, c (label 2) in val of VOCdevkit/VOC2012."""
    folder = tmp_path / "set/VOCdevkit/VOC2012"
    for seed, name in enumerate("abc"):
        save_image(folder / f"JPEGImages/{name}.jpg", seed=seed)
        save_labels(folder / f"SegmentationClass/{name}.png", seed)
    write_list(folder / "ImageSets/Segmentation/train.txt", "ab")
    write_list(folder / "ImageSets/Segmentation/val.txt", "c")
    write_list(tmp_path / "set/classes.txt", ["background", "one", "two"])
    return tmp_path / "set"


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities in train, one in val; each image has one id: 7, 26, 33 and void 0."""
    root = tmp_path / "cityscapes"
    save_city(root, "train", "aachen_000000_000001", 7)
    save_city(root, "train", "aachen_000000_000000", 26)
    save_city(root, "train", "bochum_000000_000000", 33)
    save_city(root, "val", "bonn_000000_000000", 0)
    return root
