"""The Cityscapes layout: files, the map of ids, and messages about bad input."""

import numpy as np
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes

from deformnet.data import CityscapesSegmentation
from deformnet.data.check import check_data
from small_sets import one_line, save_image, save_labels

TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9}
TRAIN_IDS |= {23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def labels_of(root, split="val"):
    return next((root / "gtFine" / split).glob("*/*_labelIds.png"))


def test_images_are_sorted_by_name(cityscapes):
    images = CityscapesSegmentation(cityscapes, "train")
    names = ["aachen_000000_000000", "aachen_000000_000001", "bochum_000000_000000"]
    assert [images.name(i) for i in range(len(images))] == names
    image, mask = images[2]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.shape == (3, 12, 16)
    assert [int(images[i][1].max()) for i in range(3)] == [13, 0, 18]


def test_all_ids_are_mapped(cityscapes):
    stored = np.arange(34).repeat(6)[:192].reshape(12, 16)
    stored[-1, -2:] = 255, 33
    save_labels(labels_of(cityscapes), stored, mode="L")
    _, mask = CityscapesSegmentation(cityscapes, "val")[0]
    expected = [TRAIN_IDS.get(label, 255) for label in stored.ravel().tolist()]
    assert mask.flatten().tolist() == expected


def test_classes_are_the_nineteen_in_train_id_order(cityscapes):
    classes = CityscapesSegmentation(cityscapes, "val").classes
    assert len(classes) == 19
    assert (classes[0], classes[13], classes[18]) == ("road", "car", "bicycle")


def test_unknown_id(cityscapes):
    save_labels(labels_of(cityscapes), 34, mode="L")
    with one_line(ValueError, "gtFine_labelIds.png", "label 34"):
        CityscapesSegmentation(cityscapes, "val")[0]


def test_no_labels_for_a_split(cityscapes):
    (cityscapes / "leftImg8bit/test/ulm").mkdir(parents=True)
    with one_line(FileNotFoundError, "gtFine/test"):
        CityscapesSegmentation(cityscapes, "test")


def test_empty_split(cityscapes):
    for part in ("leftImg8bit", "gtFine"):
        (cityscapes / part / "test/ulm").mkdir(parents=True)
    with one_line(ValueError, "leftImg8bit/test", "no <city>/*_leftImg8bit.png"):
        CityscapesSegmentation(cityscapes, "test")


def test_absent_labels(cityscapes):
    path = labels_of(cityscapes)
    path.unlink()
    with one_line(FileNotFoundError, f"needs bonn/{path.name}", cityscapes / "gtFine/val"):
        CityscapesSegmentation(cityscapes, "val")


def test_labels_of_another_size(cityscapes):
    save_image(next((cityscapes / "leftImg8bit/val").glob("*/*.png")), 10, 16)
    with one_line(ValueError, labels_of(cityscapes), "16x12", "16x10"):
        CityscapesSegmentation(cityscapes, "val")[0]


def test_color_labels(cityscapes):
    Image.new("RGB", (16, 12), "red").save(labels_of(cityscapes))
    with one_line(ValueError, labels_of(cityscapes), "class ids", "RGB"):
        CityscapesSegmentation(cityscapes, "val")[0]


def test_agrees_with_torchvision_on_real_images(real_data):
    root = real_data / "camvid_cityscapes"
    counts = {"train": 12, "val": 6, "test": 4}
    assert {s: len(CityscapesSegmentation(root, s)) for s in counts} == counts
    ours = CityscapesSegmentation(root, "train")
    theirs = Cityscapes(root, split="train", target_type="semantic")
    where = {path: i for i, path in enumerate(theirs.images)}
    for i in range(0, 12, 3):
        image, mask = ours[i]
        expected_image, expected_labels = theirs[where[str(ours.samples[i].image)]]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected_image))
        lookup = np.array([TRAIN_IDS.get(label, 255) for label in range(256)])
        np.testing.assert_array_equal(mask.numpy(), lookup[np.asarray(expected_labels)])


# Ids of one's own.


def own_ids(root):
    """Ids 0 and 1, which are void in Cityscapes."""
    for path in sorted((root / "gtFine").glob("*/*/*.png")):
        save_labels(path, np.eye(12, 16), mode="L")


def test_own_ids_are_void(cityscapes, tmp_path):
    own_ids(cityscapes)
    images = CityscapesSegmentation(cityscapes, "train")
    assert images[0][1].unique().tolist() == [255]
    advice = ("all pixels", "void", "0 to 6 are void in Cityscapes", cityscapes / "classes.txt")
    with one_line(ValueError, cityscapes, "split train", *advice):
        images.require_labels()
    report = check_data(cityscapes, workers=0, progress=False, record=tmp_path / "record")
    assert any("leftImg8bit/train: all pixels" in line for line in report.problems)


def test_own_ids_with_names(cityscapes):
    own_ids(cityscapes)
    (cityscapes / "classes.txt").write_text("grass\nweed\n")
    images = CityscapesSegmentation(cityscapes, "train")
    images.require_labels()
    assert images.classes == ("grass", "weed")
    assert images[0][1].unique().tolist() == [0, 1]


def test_other_suffixes_and_names_of_splits(cityscapes):
    image = next((cityscapes / "leftImg8bit/val").glob("*/*.png"))
    image.unlink()
    save_image(image.with_suffix(".JPG"))
    for part in ("leftImg8bit", "gtFine"):
        (cityscapes / part / "val").rename(cityscapes / part / "valid")
    assert CityscapesSegmentation(cityscapes, "val").name(0) == "bonn_000000_000000"


def test_orientation_by_the_labels(cityscapes):
    path = next((cityscapes / "leftImg8bit/val").glob("*/*.png"))
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (16, 12)).save(path, exif=exif)
    assert CityscapesSegmentation(cityscapes, "val")[0][0].shape == (3, 12, 16)
    save_labels(labels_of(cityscapes), np.full((16, 12), 7))
    assert CityscapesSegmentation(cityscapes, "val")[0][0].shape == (3, 16, 12)
