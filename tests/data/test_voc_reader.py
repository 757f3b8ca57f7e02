"""Masks in the VOC layout: content, and messages about bad input."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation as TorchvisionVOC

from deformnet.data import VOCSegmentation, segmentation_evaluation_transforms
from deformnet.data.files import read_image, read_labels
from deformnet.data.voc_files import VOC_CLASSES, color_map
from pictures import noise, save, turned
from small_sets import one_line, save_image, save_labels

YEAR = "VOCdevkit/VOC2012"


def test_reads_pixels_and_labels(voc):
    images = VOCSegmentation(voc, "train")
    assert len(images) == 2
    assert [images.name(i) for i in range(2)] == ["a", "b"]
    assert images.classes == ("background", "one", "two")
    image, mask = images[1]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    expected = np.asarray(Image.open(voc / YEAR / "JPEGImages/b.jpg"))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert mask.shape == (12, 16)
    assert (mask == 1).all()


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_level(voc, inside):
    images = VOCSegmentation(voc / inside, "val")
    assert images.name(0) == "c"
    assert images.classes == ("background", "one", "two")


def test_last_year_is_the_default(voc):
    other = voc / "VOCdevkit/VOC2007/ImageSets/Segmentation"
    other.mkdir(parents=True)
    (other / "train.txt").write_text("nothing\n")
    assert len(VOCSegmentation(voc, "train")) == 2


def test_transforms_receive_image_and_mask(voc):
    images = VOCSegmentation(voc, "train", lambda image, mask: (mask, image))
    mask, image = images[0]
    assert mask.ndim == 2
    assert image.ndim == 3


def test_gray_masks_and_images_and_png_images(voc):
    save_labels(voc / YEAR / "SegmentationClass/c.png", 2, mode="L")
    (voc / YEAR / "JPEGImages/c.jpg").unlink()
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(voc / YEAR / "JPEGImages/c.png")
    image, mask = VOCSegmentation(voc, "val")[0]
    assert (image == 9).all()
    assert image.shape == (3, 12, 16)
    assert (mask == 2).all()


def test_void_and_the_highest_class_are_valid(voc):
    labels = np.full((12, 16), 255)
    labels[0] = 2
    save_labels(voc / YEAR / "SegmentationClass/c.png", labels)
    _, mask = VOCSegmentation(voc, "val")[0]
    assert mask.unique().tolist() == [2, 255]


def test_exif_orientation_is_not_applied(voc):
    save(voc / YEAR / "JPEGImages/c.jpg", noise(12, 16), exif=turned())
    assert VOCSegmentation(voc, "val")[0][0].shape == (3, 12, 16)


def test_can_be_pickled(voc):
    images = VOCSegmentation(
        voc, "train", segmentation_evaluation_transforms(short_side=8, max_side=None)
    )
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy[1][0], images[1][0])


# The augmented list.


@pytest.fixture
def voc_aug(voc) -> Path:
    """a has both masks (0 and 2), b one in SegmentationClass alone."""
    save_labels(voc / YEAR / "SegmentationClassAug/a.png", 2)
    (voc / YEAR / "ImageSets/Segmentation/train_aug.txt").write_text("a\nb\n")
    return voc


def test_augmented_masks_come_first_and_image_by_image(voc_aug):
    images = VOCSegmentation(voc_aug, "train_aug")
    assert [int(images[i][1].max()) for i in range(2)] == [2, 1]


def test_other_splits_do_not_see_augmented_masks(voc_aug):
    assert int(VOCSegmentation(voc_aug, "train")[0][1].max()) == 0


def test_augmented_list_of_paths(voc_aug):
    (voc_aug / YEAR / "ImageSets/Segmentation/train_aug.txt").write_text(
        "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n"
        "/JPEGImages/b.jpg /SegmentationClass/b.png\n"
    )
    images = VOCSegmentation(voc_aug, "train_aug")
    assert [images.name(i) for i in range(2)] == ["a", "b"]
    assert [int(images[i][1].max()) for i in range(2)] == [2, 1]


# Names in lists.


def write_list(voc, text):
    (voc / YEAR / "ImageSets/Segmentation/train.txt").write_text(text)


def rename(voc, old, new, suffix=".jpg"):
    for folder, old_suffix, new_suffix in (
        ("JPEGImages", ".jpg", suffix),
        ("SegmentationClass", ".png", ".png"),
    ):
        target = voc / YEAR / folder / f"{new}{new_suffix}"
        target.parent.mkdir(exist_ok=True)
        (voc / YEAR / folder / f"{old}{old_suffix}").rename(target)


def test_whole_lines_are_names(voc):
    """`cat 1` is an image of its own, not `cat` with a flag."""
    rename(voc, "a", "cat")
    rename(voc, "b", "cat 1")
    write_list(voc, "cat 1\ncat\n")
    images = VOCSegmentation(voc, "train")
    assert [images.name(i) for i in range(2)] == ["cat 1", "cat"]
    assert [int(images[i][1].max()) for i in range(2)] == [1, 0]
    (voc / YEAR / "JPEGImages/cat 1.jpg").unlink()
    with one_line(FileNotFoundError, "train.txt", "needs cat 1.jpg"):
        VOCSegmentation(voc, "train")


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".Png", ".bmp", ".tif", ".webp"])
def test_suffixes_of_images(voc, suffix):
    rename(voc, "a", "a.v1.0", ".jpg")
    path = voc / YEAR / "JPEGImages/a.v1.0.jpg"
    path.unlink()
    save_image(path.with_suffix(suffix))
    write_list(voc, "a.v1.0\n")
    assert VOCSegmentation(voc, "train").name(0) == "a.v1.0"


def test_names_in_subfolders(voc):
    rename(voc, "a", "sub/a")
    write_list(voc, "sub/a\nb.jpg\n")
    images = VOCSegmentation(voc, "train")
    assert [images.name(i) for i in range(2)] == ["sub__a", "b"]


@pytest.mark.parametrize("line", ["../a", "/JPEGImages/../../x.jpg /SegmentationClass/a.png"])
def test_lists_that_lead_out_of_the_folder(voc, line):
    write_list(voc, f"{line}\n")
    with one_line(ValueError, "train.txt", "inside the data folder"):
        VOCSegmentation(voc, "train")


def test_usual_orientation(voc):
    """A mask drawn on the upright image decides so."""
    path = voc / YEAR / "JPEGImages/c.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).copy().save(path, exif=exif)
    save_labels(voc / YEAR / "SegmentationClass/c.png", np.full((16, 12), 2))
    assert VOCSegmentation(voc, "val")[0][0].shape == (3, 16, 12)
    with one_line(ValueError, "c.png", "EXIF"):
        VOCSegmentation(voc, "val", orientation="stored")[0]


# classes.txt.


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (None, VOC_CLASSES),
        ("one two", ("background", "one", "two")),  # there is a mask with label 2
        (" ".join(VOC_CLASSES[1:]), VOC_CLASSES),
        ("sky road car", ("sky", "road", "car")),  # id 0 may be a real class
    ],
)
def test_classes(voc, names, classes):
    path = voc / "classes.txt"
    path.write_text(names.replace(" ", "\n")) if names else path.unlink()
    for split in ("train", "val"):
        assert VOCSegmentation(voc, split).classes == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "expected class names, one per line, but found none"),
        ("a\nb\na\n", "'a' more than once"),
    ],
)
def test_bad_classes_file(voc, content, message):
    (voc / "classes.txt").write_text(content)
    with one_line(ValueError, "classes.txt", message):
        VOCSegmentation(voc, "train")


# Bad input, found at construction.


def test_file_instead_of_a_folder(voc):
    with one_line(NotADirectoryError, voc / "classes.txt", "expected a folder"):
        VOCSegmentation(voc / "classes.txt", "train")


def test_unknown_layout(tmp_path):
    with one_line(FileNotFoundError, tmp_path, "VOCdevkit/VOC*/ImageSets/"):
        VOCSegmentation(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n  \n", "empty"), (b"\xff\xfe\x00a", "expected UTF-8 text"), (b"a 1 2\n", "'a 1 2'")],
)
def test_bad_list(voc, content, message):
    (voc / YEAR / "ImageSets/Segmentation/train.txt").write_bytes(content)
    with one_line(ValueError, "train.txt", message):
        VOCSegmentation(voc, "train")


def test_list_with_windows_newlines_and_byte_order_mark(voc):
    path = voc / YEAR / "ImageSets/Segmentation/train.txt"
    path.write_bytes("\ufeffa\r\nb\r\n".encode())
    images = VOCSegmentation(voc, "train")
    assert [images.name(i) for i in range(len(images))] == ["a", "b"]


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClass"])
def test_list_names_an_absent_file(voc, folder):
    next((voc / YEAR / folder).glob("b.*")).unlink()
    with one_line(FileNotFoundError, "train.txt", "needs b.", folder):
        VOCSegmentation(voc, "train")


def test_augmented_list_names_an_absent_mask(voc_aug):
    (voc_aug / YEAR / "SegmentationClass/b.png").unlink()
    with one_line(
        FileNotFoundError, "needs b.png", "SegmentationClassAug or ", "SegmentationClass"
    ):
        VOCSegmentation(voc_aug, "train_aug")


# Bad input, found on reading.


def test_mask_of_another_size(voc):
    save_labels(voc / YEAR / "SegmentationClass/c.png", np.zeros((12, 15)))
    with one_line(ValueError, "c.png", "15x12", "16x12", "c.jpg"):
        VOCSegmentation(voc, "val")[0]


def test_label_above_the_classes(voc):
    labels = np.zeros((12, 16))
    labels[3, 4] = 7
    save_labels(voc / YEAR / "SegmentationClass/c.png", labels)
    with one_line(
        ValueError, "c.png", "label 7", "3 classes in", voc / "classes.txt", "add the class"
    ):
        VOCSegmentation(voc, "val")[0]


def test_missing_background_is_suggested(voc):
    (voc / "classes.txt").write_text("one\ntwo\n")
    images = VOCSegmentation(voc, "val")
    assert images.classes[0] == "background"
    save_labels(voc / YEAR / "SegmentationClass/c.png", np.zeros((12, 16)))
    images = VOCSegmentation(voc, "val")  # now no mask shows it
    save_labels(voc / YEAR / "SegmentationClass/c.png", 2)
    with one_line(ValueError, "c.png", "label 2", "background"):
        images[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_mask_with_colors_beside_masks_with_ids(voc, mode):
    """The first masks, a and b, hold ids; c is another kind."""
    images = VOCSegmentation(voc, "val")
    Image.new(mode, (16, 12), "red").save(voc / YEAR / "SegmentationClass/c.png")
    with one_line(ValueError, "c.png", "class ids", f"mode {mode}", "(255, 0, 0)", "classes.txt"):
        images[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "LA"])
def test_gray_masks_of_any_mode_hold_ids(voc, mode):
    Image.new("L", (16, 12), 1).convert(mode).save(voc / YEAR / "SegmentationClass/c.png")
    assert (VOCSegmentation(voc, "val")[0][1] == int(mode != "1")).all()


def test_mask_of_16_bits(voc):
    labels = Image.fromarray(np.zeros((12, 16), dtype=np.uint16))
    labels.save(voc / YEAR / "SegmentationClass/c.png")
    with one_line(ValueError, "c.png", "8-bit", "mode I;16"):
        VOCSegmentation(voc, "val")[0]


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("path", ["JPEGImages/c.jpg", "SegmentationClass/c.png"])
def test_truncated_file(voc, path, fraction):
    save_image(voc / YEAR / "JPEGImages/c.jpg", 60, 80)
    save_labels(voc / YEAR / "SegmentationClass/c.png", np.arange(4800).reshape(60, 80) % 3)
    file = voc / YEAR / path
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    images = VOCSegmentation(voc, "val")
    with one_line(ValueError, file, "not a readable image"):
        images[0]


def test_file_deleted_after_construction(voc):
    images = VOCSegmentation(voc, "val")
    (voc / YEAR / "JPEGImages/c.jpg").unlink()
    with one_line(FileNotFoundError, "c.jpg"):
        images[0]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_flipped_bytes_are_read_or_rejected(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"x.{suffix}"
    save_image(path, 24, 32)
    if suffix == "png":
        save_labels(path, rng.integers(0, 3, (24, 32)))
    content = path.read_bytes()
    messages = []
    for _ in range(300):
        broken = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_image(path) if suffix == "jpg" else read_labels(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


# Against torchvision, and on real images.


def test_color_map():
    colors = color_map()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 5: (128, 0, 128), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(colors[label].tolist()) for label in known} == known


def test_agrees_with_torchvision_on_voc2012(real_data):
    root = real_data / "voc2012_mini"
    ours = VOCSegmentation(root, "val")
    theirs = TorchvisionVOC(root, year="2012", image_set="val")
    assert len(ours) == len(theirs) == 50
    assert ours.classes == VOC_CLASSES
    for i in range(0, 50, 7):
        image, mask = ours[i]
        expected_image, expected_mask = theirs[i]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected_image))
        np.testing.assert_array_equal(mask.numpy(), np.asarray(expected_mask))
    assert len(VOCSegmentation(root, "train")) == 43


def test_camvid(real_data):
    root = real_data / "camvid_voc"
    sizes = {split: len(VOCSegmentation(root, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 367, "val": 101, "test": 233}
    images = VOCSegmentation(root, "test")
    assert len(images.classes) == 11
    assert images.classes[0] == "Sky"
    seen = set()
    for i in range(0, len(images), 20):
        image, mask = images[i]
        assert image.shape == (3, 360, 480)
        seen |= set(mask.unique().tolist())
    assert seen == {*range(11), 255}


def test_pennfudan(real_data):
    images = VOCSegmentation(real_data / "pennfudan_voc", "train")
    assert images.classes == ("background", "person")
    assert len(images) == 119
