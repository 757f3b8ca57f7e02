"""Image folders: reader, bad input, transforms, and the synthetic one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder

from deformnet.data import (
    ImageFolderClassification,
    classification_evaluation_transforms,
    classification_training_transforms,
    image_folder_splits,
)
from deformnet.data.check import check_data
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PCAColorJitter
from pictures import noise, save, turned
from small_sets import one_line, save_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes ant (2), bee (1) and cat (1) in train; bee and cat in val."""
    names = (
        *("train/ant/2.jpg", "train/ant/1.PNG", "train/bee/x.JPEG", "train/cat/deep/er/y.jpg"),
        *("val/cat/1.jpg", "val/bee/1.jpg"),
    )
    for seed, name in enumerate(names):
        save_image(tmp_path / "set" / name, seed=seed)
    return tmp_path / "set"


# The reader.


def test_labels_and_names(root):
    images = ImageFolderClassification(root, "train")
    assert images.classes == ("ant", "bee", "cat")
    assert [images.name(i) for i in range(len(images))] == [
        *("train/ant/1.PNG", "train/ant/2.jpg", "train/bee/x.JPEG", "train/cat/deep/er/y.jpg")
    ]
    assert [images[i][1] for i in range(4)] == [0, 0, 1, 2]
    # torchvision reads the same.
    theirs = ImageFolder(root / "train")
    for i, (image, label) in enumerate(theirs):
        assert label == images[i][1]
        np.testing.assert_array_equal(np.asarray(image), images[i][0].permute(1, 2, 0).numpy())


def test_split_lacking_a_class_has_the_labels_of_train(root):
    images = ImageFolderClassification(root, "val")
    assert images.classes == ("ant", "bee", "cat")
    assert [images[i][1] for i in range(len(images))] == [1, 2]


def test_classes_of_a_split_without_train(root):
    (root / "train").rename(root / "elsewhere")
    assert ImageFolderClassification(root, "val").classes == ("bee", "cat")


def test_splits_and_their_union(root):
    assert image_folder_splits(root) == ["train", "val"]
    both = ImageFolderClassification(root, "train+val")
    assert len(both) == 6
    assert [both[i][1] for i in range(6)] == [0, 0, 1, 2, 1, 2]
    assert both.name(5) == "val/cat/1.jpg"


def test_hidden_files_are_skipped(root):
    (root / ".cache").mkdir()
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/ant/._1.png").write_bytes(b"left by a Mac")
    (root / "train/ant/notes.txt").write_text("not an image")
    images = ImageFolderClassification(root, "train")
    assert images.classes == ("ant", "bee", "cat")
    assert len(images) == 4
    assert image_folder_splits(root) == ["train", "val"]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "I;16"])
def test_every_image_mode_becomes_rgb(root, mode):
    pixels = np.full((12, 16), 200, dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(pixels)
    image = image if mode == "I;16" else image.convert(mode)
    path = root / "val/bee" / ("1.jpg" if mode == "CMYK" else "2.png")
    image.save(path)
    images = ImageFolderClassification(root, "val")
    index = images.samples.index((str(path), 1))
    assert images[index][0].shape == (3, 12, 16)
    assert images[index][0].dtype == torch.uint8


def test_photographs_are_turned_upright(root):
    """As in prediction: no label depends on the stored pixels."""
    save(root / "val/bee/1.jpg", noise(12, 16), exif=turned())
    assert ImageFolderClassification(root, "val")[0][0].shape == (3, 16, 12)


def test_stored_pixels_on_request(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12)).save(root / "val/bee/1.jpg", exif=exif)
    images = ImageFolderClassification(root, "val", orientation="stored")
    assert images[0][0].shape == (3, 12, 16)


@pytest.mark.parametrize("suffix", ["gif", "PPM", "WebP", "TIF"])
def test_every_suffix_of_an_image(root, suffix):
    save_image(root / f"val/bee/an image.v2.{suffix}")
    assert len(ImageFolderClassification(root, "val")) == 3


@pytest.mark.parametrize("name", ["valid", "Validation", "dev", "test"])
def test_usual_names_of_splits(root, name):
    (root / "val").rename(root / name)
    images = ImageFolderClassification(root, "val")
    assert images.name(0) == f"{name}/bee/1.jpg"
    assert images.classes == ("ant", "bee", "cat")


def test_val_is_test_only_if_nothing_else_is(root):
    save_image(root / "test/bee/9.jpg")
    assert ImageFolderClassification(root, "val").name(0) == "val/bee/1.jpg"
    (root / "val").rename(root / "dev")
    assert ImageFolderClassification(root, "val").name(0) == "dev/bee/1.jpg"


# Without splits: DIR/CLASS/IMAGE.


@pytest.mark.parametrize("names", ["ant bee", "bus train tram", "test ant bee"])
def test_classes_without_splits(tmp_path, names):
    for name in names.split():
        save_image(tmp_path / name / "1.jpg")
        save_image(tmp_path / name / "2.JPG")
    assert image_folder_splits(tmp_path) == ["train"]
    images = ImageFolderClassification(tmp_path, "train")
    assert images.classes == tuple(sorted(names.split()))
    assert len(images) == 2 * len(images.classes)
    assert images.name(0) == f"{images.classes[0]}/1.jpg"
    with one_line(FileNotFoundError, tmp_path / "val", "so all images are in the split", "'train'"):
        ImageFolderClassification(tmp_path, "val")
    report = check_data(tmp_path, workers=0, progress=False, record=tmp_path / "record")
    assert report.ok
    assert report.checked == len(images)


@pytest.mark.parametrize("names", ["train val", "train2017 val2017", "images masks", "ant"])
def test_folders_of_images_that_are_no_classes(tmp_path, names):
    for name in names.split():
        save_image(tmp_path / name / "1.jpg")
    with one_line((ValueError, FileNotFoundError), "DIR/SPLIT/CLASS/IMAGE"):
        ImageFolderClassification(tmp_path, "train")


def test_links_in_circles(root):
    (root / "train/ant/again").symlink_to(root / "train/ant")
    with one_line(ValueError, root / "train/ant/again", "link"):
        ImageFolderClassification(root, "train")


# Bad input.


def test_missing_split_lists_the_others(root):
    with one_line(FileNotFoundError, root / "test", "train, val"):
        ImageFolderClassification(root, "test")
    with one_line(FileNotFoundError, root / "nowhere", "no such folder"):
        ImageFolderClassification(root / "nowhere", "train")
    with one_line(NotADirectoryError, root / "train/bee/x.JPEG"):
        ImageFolderClassification(root / "train/bee/x.JPEG", "train")


def test_only_a_few_of_many_names_are_listed(tmp_path):
    for number in range(30):
        (tmp_path / f"n{number:02}").mkdir()
    with one_line(FileNotFoundError, "n00, n01, n02, n03, n04 and 25 more"):
        ImageFolderClassification(tmp_path, "train")


def test_class_without_images(root):
    (root / "train/bee/x.JPEG").rename(root / "train/bee/x.heic")
    with one_line(ValueError, root / "train/bee", "expected images", "found none"):
        ImageFolderClassification(root, "train")


def test_split_without_classes(root):
    (root / "test").mkdir()
    save_image(root / "test/1.jpg")
    with one_line(ValueError, root / "test", "no folder of a class"):
        ImageFolderClassification(root, "test")


def test_class_that_train_lacks(root):
    save_image(root / "val/dog/1.jpg")
    with one_line(ValueError, root / "val/dog", root / "train", "no class dog"):
        ImageFolderClassification(root, "val")


def test_unreadable_images_are_named(root):
    path = root / "val/bee/1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    images = ImageFolderClassification(root, "val")
    with one_line(ValueError, path, "not a readable image"):
        images[0]


# Transforms.


def image_of(height: int, width: int) -> tv_tensors.Image:
    """Red is the row, green the column."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    return tv_tensors.Image(torch.stack([rows, columns, rows * 0]).to(torch.uint8))


def training(*, resize, crop, flip=True, color_jitter=False):
    options = {"flip": flip, "color_jitter": color_jitter}
    return classification_training_transforms(resize=resize, crop=crop, **options)


def in_pixels(prepared: torch.Tensor) -> torch.Tensor:
    """Inverts the normalization, to values from 0 to 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return 255 * (prepared * std + mean)


def test_evaluation_crops_the_center():
    prepare = classification_evaluation_transforms(short_side=20, crop=10)
    seen = in_pixels(prepare(image_of(20, 40)))
    assert type(prepare(image_of(20, 40))) is torch.Tensor
    assert seen.shape == (3, 10, 10)
    torch.testing.assert_close(seen[0, :, 0], torch.arange(5.0, 15), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[1, 0], torch.arange(15.0, 25), atol=1e-3, rtol=0)


def test_training_draws_all_sizes_places_and_flips():
    prepare = training(resize=(20, 24), crop=10)
    ramp = tv_tensors.Image(6 * image_of(40, 40))
    sizes, tops, flipped = set(), set(), set()
    torch.manual_seed(0)
    for _ in range(300):
        seen = in_pixels(prepare(ramp)) / 6  # position in the original
        assert seen.shape == (3, 10, 10)
        step = float(seen[1, 0, 8] - seen[1, 0, 1]) / 7
        flipped.add(step < 0)
        size = round(40 / abs(step))
        sizes.add(size)
        # The second row of the crop: resizing distorts the border of the image.
        tops.add((size, round((float(seen[0, 1, 0]) + 0.5) * size / 40 - 0.5) - 1))
    assert sizes == {20, 21, 22, 23, 24}
    assert flipped == {False, True}
    assert tops <= {(size, top) for size in sizes for top in range(size - 9)}
    assert len(tops) > 50  # of 65


def test_crop_as_large_as_the_image_always_fits():
    """Also where rounding makes a side times its scale smaller than the crop."""
    for side in range(20, 140, 7):
        prepare = training(resize=(16, 16), crop=16, flip=False)
        assert prepare(image_of(side, side + 3)).shape == (3, 16, 16)


def test_randomness_is_from_the_global_generator():
    prepare = training(resize=(20, 40), crop=16, color_jitter=True)
    torch.manual_seed(3)
    first = prepare(image_of(50, 60))
    other = prepare(image_of(50, 60))
    torch.manual_seed(3)
    assert torch.equal(prepare(image_of(50, 60)), first)
    assert not torch.equal(first, other)


def test_color_moves_along_the_principal_components():
    torch.manual_seed(0)
    gray = tv_tensors.Image(torch.full((3, 2, 2), 0.5))
    shifts = []
    for _ in range(4000):
        shift = PCAColorJitter()(gray) - 0.5
        assert (shift == shift[:, :1, :1]).all(), "one shift for all pixels"
        shifts.append(shift[:, 0, 0])
    drawn = torch.stack(shifts)
    # The standard deviation along each direction is 0.1 times the variance.
    variances, directions = np.linalg.eigh(np.cov(drawn.numpy().T))
    np.testing.assert_allclose(
        np.sqrt(variances[::-1]), 0.1 * np.array([0.2175, 0.0188, 0.0045]), rtol=0.05
    )
    assert abs(directions[:, -1] @ np.array([-0.5675, -0.5808, -0.5836])) > 0.999
    assert abs(directions[:, 0] @ np.array([0.4009, -0.8140, 0.4203])) > 0.999
    assert abs(drawn.mean(0)).max() < 1e-3


def test_bad_sizes():
    with one_line(ValueError, "expected crop to be at most", "(20)", "but got 21"):
        classification_evaluation_transforms(short_side=20, crop=21)
    with one_line(ValueError, "expected crop to be at most", "(20)", "but got 21"):
        training(resize=(20, 30), crop=21)
    with one_line(ValueError, "resize", (30, 20)):
        training(resize=(30, 20), crop=8)
    with one_line(ValueError, "expected crop to be at least 1, but got 0"):
        classification_evaluation_transforms(short_side=20, crop=0)
