"""Stored data sets that there is nothing to learn from, and what is said of others."""

import numpy as np
import pytest

from deformnet import UserError
from deformnet.data.voc_files import VOC_CLASSES
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, RFCNRecipe
from deformnet.tasks import task_of
from detection_sets import voc_object, write_voc, write_voc_images
from small_sets import save_city, save_image, save_labels, write_list

DETECTOR, SEGMENTER = RFCNRecipe(backbone="resnet18"), DeepLabRecipe(backbone="resnet18")


def boxes(root, *objects):
    """An image with these objects, in VOC's layout."""
    year = root / "VOCdevkit/VOC2012"
    write_voc_images(year, {"a": objects})
    write_list(year / "ImageSets/Main/train.txt", "a")
    write_list(root / "classes.txt", ["one", "two"])
    return root


def masks(root, *labels, classes=None):
    """Images with constant masks, in VOC's layout."""
    year = root / "VOCdevkit/VOC2012"
    names = [f"{k:03}" for k in range(len(labels))]
    for name, label in zip(names, labels, strict=True):
        save_image(year / f"JPEGImages/{name}.jpg")
        save_labels(year / f"SegmentationClass/{name}.png", label)
    write_list(year / "ImageSets/Segmentation/train.txt", names)
    if classes:
        write_list(root / "classes.txt", classes)
    return root


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([], ""),
        ([voc_object((3, 2, 9, 10), difficult=1)], r": all 1 are ignored \(difficult, or crowds\)"),
        ([voc_object((20, 2, 30, 10))], ": all 1 boxes have no area inside their image"),
    ],
)
def test_images_without_objects_are_refused(tmp_path, objects, reason):
    root = boxes(tmp_path, *objects)
    message = f"{root}: expected objects to train on, .* none in any of the 1 images{reason}$"
    with pytest.raises(UserError, match=message):
        task_of(DETECTOR).training_set(root, "train")


def test_masks_of_void_are_refused(tmp_path):
    root = masks(tmp_path / "voc", *[255] * 60, classes=["background", "person"])
    message = "expected labeled pixels in split train, but all pixels of its 60 label maps are void"
    with pytest.raises(UserError, match=f"{root}: .*{message}"):
        task_of(SEGMENTER).training_set(root, "train")
    # Own ids, which mean nothing in Cityscapes.
    for number in range(2):
        save_city(tmp_path / "city", "train", f"aachen_00000{number}_000000", number)
    with pytest.raises(UserError, match="all pixels of its 2 label maps are void"):
        task_of(SEGMENTER).training_set(tmp_path / "city", "train")


def test_classes_that_never_occur_are_named(tmp_path):
    images = task_of(DETECTOR).training_set(write_voc(tmp_path / "boxes"), "train")
    assert images.summary() == ["objects: 2 (one 1, two 1); images without objects: 1"]
    root = boxes(tmp_path / "one", voc_object((3, 2, 9, 10), "two"))
    assert task_of(DETECTOR).training_set(root, "train").summary() == [
        "objects: 1 (two 1)",
        "warning: no object of class one",
    ]
    labels = np.full((12, 16), 255)
    labels[:6] = 0
    root = masks(tmp_path / "binary", labels, labels, 0, classes=["background", "person"])
    binary = task_of(SEGMENTER).training_set(root, "train").summary()
    assert binary == ["pixels in all 3 masks: background 66.7 %, person 33.3 %"]
    root = masks(tmp_path / "empty", 0, 0, classes=["background", "person"])
    assert task_of(SEGMENTER).training_set(root, "train").summary() == [
        "pixels in all 2 masks: background 100 %",
        "warning: no pixel of class person",
    ]
    root = masks(tmp_path / "voc", *[1] * 60)
    first, *others = task_of(SEGMENTER).training_set(root, "train").summary()
    assert first == "pixels in 50 of 60 masks: aeroplane 100 %"
    assert others == [
        f"warning: no pixel of class background, {', '.join(VOC_CLASSES[2:13])} and 8 more "
        "in these masks"
    ]


def test_images_by_class(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        save_image(tmp_path / "train" / name)
    recipe = ClassifierRecipe(backbone="resnet18")
    summary = task_of(recipe).training_set(tmp_path, "train").summary()
    assert summary == ["images by class: cat 2, dog 1"]


def test_broken_masks_are_left_to_training(tmp_path):
    root = masks(tmp_path, 1, 2)
    (root / "VOCdevkit/VOC2012/SegmentationClass/000.png").write_text("broken")
    images = task_of(SEGMENTER).training_set(root, "train")
    assert "pottedplant" not in images.summary()[0]
    with pytest.raises(UserError, match=r"000\.png"):
        images.batch([0], [0])
