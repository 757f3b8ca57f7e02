"""Small data sets on disk."""

from pathlib import Path

import numpy as np
import pytest
from small_sets import save_image, save_labels


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Images a, b (12 x 16, labels 0, 1) in train, c (label 2) in val of VOCdevkit/VOC2012."""
    folder = tmp_path / "set/VOCdevkit/VOC2012"
    for seed, name in enumerate("abc"):
        save_image(folder / f"JPEGImages/{name}.jpg", seed=seed)
        save_labels(folder / f"SegmentationClass/{name}.png", np.full((12, 16), seed))
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    (tmp_path / "set/classes.txt").write_text("background\none\ntwo\n")
    return tmp_path / "set"


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities in train, one in val; each image has one id: 7, 26, 33 and void 0."""
    root = tmp_path / "cityscapes"
    for split, city, frame, label in (
        ("train", "aachen", "000001", 7),
        ("train", "aachen", "000000", 26),
        ("train", "bochum", "000000", 33),
        ("val", "bonn", "000000", 0),
    ):
        name = f"{city}_000000_{frame}"
        save_image(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
        labels = np.full((12, 16), label)
        save_labels(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", labels, mode="L")
    return root
