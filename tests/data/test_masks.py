"""Folders of images and masks: arrangements, names, how masks store classes, bad input."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformnet.data import DataFiles, open_segmentation, segmentation_splits
from deformnet.data.check import check_data
from deformnet.data.files import read_stored_mask
from deformnet.data.mask_reader import SAMPLED
from deformnet.data.masks import FolderSegmentation, MaskFolders, find_folders
from deformnet.data.voc_files import VOC_CLASSES, color_map
from small_sets import one_line, save_image, save_labels

SHAPE = 12, 16


def write(root: Path, *pairs: tuple[str, str], labels: object = (0, 1), mode: str = "L") -> Path:
    """Writes images and masks; mask number i holds the labels from the i-th on, in turn."""
    values = np.asarray(labels)
    for number, (image, mask) in enumerate(pairs):
        save_image(root / image, *SHAPE, seed=number)
        content = np.roll(values, -number)[np.arange(192) % len(values)].reshape(SHAPE)
        save_labels(root / mask, content, mode=mode)
    return root


def save_colors(path: Path, colors: list, mode: str = "RGB") -> None:
    """Writes a mask of equal columns of colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(colors, np.uint8)[np.arange(16) * len(colors) // 16]
    image = Image.fromarray(np.tile(pixels, (12, 1, 1)))
    (image.quantize(16) if mode == "P" else image.convert(mode)).save(path)


def columns(mask: torch.Tensor, count: int) -> list[int]:
    return mask[0, (np.arange(count) * 16 + 8) // count].tolist()


@pytest.fixture
def root(tmp_path):
    """Images a, b with masks of 0 and 1."""
    root = tmp_path / "set"
    write(root, ("images/a.jpg", "masks/a.png"), ("images/b.jpg", "masks/b.png"))
    (root / "classes.txt").write_text("background\nnucleus\n")
    return root


# Arrangements and names.


@pytest.mark.parametrize(
    ("pairs", "splits"),
    [
        ([("images/a.jpg", "masks/a.png")], ["train"]),
        ([("Images/a.JPG", "Masks/a.PNG")], ["train"]),
        ([("JPEGImages/a.jpg", "SegmentationClass/a.png")], ["train"]),
        ([("images/a.tif", "labels/a.tif")], ["train"]),
        ([("img/a.jpg", "annotations/a.png")], ["train"]),
        ([("images/a.b c.jpg", "masks/a.b c.png")], ["train"]),
        ([("images/a.jpg", "masks/a_mask.png")], ["train"]),
        ([("images/a.jpg", "masks/a-mask.png")], ["train"]),
        ([("images/a.jpg", "masks/a_label.gif")], ["train"]),
        ([("images/a.jpg", "masks/a_L.png")], ["train"]),
        ([("images/a.jpg", "masks/a.jpg.png")], ["train"]),
        ([("images/img_001.jpg", "masks/mask_001.png")], ["train"]),
        ([("images/image1.jpg", "masks/mask1.png")], ["train"]),
        ([("images/1_sat.jpg", "masks/1_mask.png")], ["train"]),
        ([("images/x/a.jpg", "masks/x/a.png"), ("images/y/a.jpg", "masks/y/a.png")], ["train"]),
        ([("images/a.jpg", "annotations/trimaps/a.png")], ["train"]),
        ([("images/train/a.jpg", "masks/train/a.png")], ["train"]),
        (
            [
                ("images/training/a.jpg", "annotations/training/a.png"),
                ("images/validation/b.jpg", "annotations/validation/b.png"),
            ],
            ["training", "validation"],
        ),
        (
            [
                ("train/images/a.jpg", "train/masks/a.png"),
                ("valid/images/b.jpg", "valid/masks/b_mask.png"),
            ],
            ["train", "valid"],
        ),
        (
            [("train/a.jpg", "train_masks/a_mask.gif"), ("test/b.png", "test_masks/b_mask.gif")],
            ["test", "train"],
        ),
        ([("train/a.png", "trainannot/a.png")], ["train"]),
        (
            [("train/a.jpg", "train/a_mask.png"), ("valid/b.jpg", "valid/b_mask.png")],
            ["train", "valid"],
        ),
        ([("a.jpg", "a_mask.png"), ("b.jpg", "b_mask.png")], ["train"]),
    ],
)
def test_arrangements(tmp_path, pairs, splits):
    root = write(tmp_path, *pairs)
    assert segmentation_splits(root) == splits
    both = FolderSegmentation(root, "+".join(splits))
    assert len(both) == len(pairs)
    assert both.classes == ("background", "object")
    files = {str(s.image.relative_to(root)): str(s.labels.relative_to(root)) for s in both.samples}
    assert files == dict(pairs)
    for i, name in enumerate(sorted(pairs)):
        _, mask = open_segmentation(root, "+".join(splits))[i]
        number = pairs.index(name)
        assert mask[0, 0] == number % 2


def test_usual_names_of_splits(tmp_path):
    pairs = [
        (f"images/{name}/{name}.jpg", f"masks/{name}/{name}.png") for name in ("Train", "test")
    ]
    root = write(tmp_path, *pairs)
    assert FolderSegmentation(root, "train").name(0) == "Train"
    assert FolderSegmentation(root, "val").name(0) == "test"
    write(tmp_path, ("images/valid/x.jpg", "masks/valid/x.png"))
    assert FolderSegmentation(root, "val").name(0) == "x"
    with one_line(FileNotFoundError, root, "'extra'", "Train, test, valid"):
        FolderSegmentation(root, "extra")


def test_no_split_but_train(root):
    with one_line(FileNotFoundError, root, "'val'", "the splits are: train"):
        open_segmentation(root, "val")


def test_folders_that_are_no_splits(tmp_path):
    """Several data sets in a folder; and one whose folders have its own names."""
    for name in ("cars", "cats"):
        write(tmp_path / "sets", (f"{name}/images/a.jpg", f"{name}/masks/a.png"))
    assert find_folders(tmp_path / "sets") == {}
    assert list(find_folders(tmp_path / "sets/cars")) == ["train"]
    root = write(tmp_path / "one", ("cars/a.jpg", "cars_masks/a.png"))
    assert find_folders(root) == {"train": MaskFolders(root / "cars", root / "cars_masks")}


def test_names_of_samples(tmp_path):
    root = write(tmp_path, ("images/x/a.jpg", "masks/x/a.png"), ("images/b.jpg", "masks/b.png"))
    images = FolderSegmentation(root, "train")
    assert [images.name(i) for i in range(2)] == ["b", "x__a"]


def test_folders_that_lie_apart(tmp_path):
    write(tmp_path, ("here/a.jpg", "there/deep/a.png"))
    files = DataFiles(tmp_path / "here", tmp_path / "there/deep")
    images = FolderSegmentation(files, "train")
    assert images[0][1].unique().tolist() == [0, 1]


def test_folders_of_boxes_are_not_masks(tmp_path):
    save_image(tmp_path / "images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 1 1\n")
    assert find_folders(tmp_path) == {}


def test_can_be_pickled(root):
    images = pickle.loads(pickle.dumps(FolderSegmentation(root, "train")))
    assert images[1][1].unique().tolist() == [0, 1]


def test_large_sets_stay_lazy(root, monkeypatch):
    """No image is opened, and of the masks only the first few."""
    for number in range(300):
        (root / f"images/{number}.jpg").touch()
        (root / f"masks/{number}.png").touch()
    opened = []
    real_open = Image.open

    def counting_open(file, **options):
        opened.append(Path(file.name))
        return real_open(file, **options)

    monkeypatch.setattr(Image, "open", counting_open)
    assert len(FolderSegmentation(root, "train")) == 302
    assert len(opened) <= SAMPLED
    assert all(path.parent.name == "masks" for path in opened)


# Ids.


def test_ids(root):
    images = FolderSegmentation(root, "train")
    assert images.classes == ("background", "nucleus")
    save_labels(root / "masks/a.png", np.full(SHAPE, 255), mode="L")
    assert images[0][1].unique().tolist() == [255]
    save_labels(root / "masks/a.png", np.full(SHAPE, 2), mode="L")
    with one_line(
        ValueError, "a.png", "label 2", "2 classes in", root / "classes.txt", "add the class"
    ):
        images[0]


def test_masks_of_one_bit(tmp_path):
    write(tmp_path, ("images/a.jpg", "masks/a.png"))
    Image.fromarray(np.eye(12, 16) > 0).save(tmp_path / "masks/a.png")
    with Image.open(tmp_path / "masks/a.png") as image:
        assert image.mode == "1"
    assert FolderSegmentation(tmp_path, "train")[0][1].sum() == 12


def test_ids_that_nothing_names(tmp_path):
    write(tmp_path, ("images/a.jpg", "masks/a.png"), labels=(0, 3))
    with one_line(ValueError, tmp_path / "classes.txt", "ids up to 3"):
        FolderSegmentation(tmp_path, "train")


def test_ids_of_roboflow(tmp_path):
    root = write(tmp_path, ("train/a.jpg", "train/a_mask.png"), labels=(0, 5))
    (root / "train/_classes.csv").write_text("Pixel Value, Class\n0, background\n5, cat\n")
    images = FolderSegmentation(root, "train")
    assert images.classes == ("background", "cat")
    assert images[0][1].unique().tolist() == [0, 1]
    save_labels(root / "train/a_mask.png", np.full(SHAPE, 1), mode="L")
    with one_line(ValueError, "a_mask.png", "ids in", "_classes.csv", "label 1"):
        images[0]


def test_background_is_prepended(tmp_path):
    root = write(tmp_path, ("images/a.jpg", "masks/a.png"), labels=(0, 1, 2))
    (root / "classes.txt").write_text("cat\ndog\n")
    assert FolderSegmentation(root, "train").classes == ("background", "cat", "dog")


# 0 and 255.


@pytest.mark.parametrize("names", [None, "background nucleus", "nucleus", "no yes"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_binary_masks(tmp_path, names, mode, caplog):
    """The commonest kind: read as void, they would train on nothing and score 100."""
    root = write(tmp_path, ("images/a.jpg", "masks/a.png"), ("images/b.jpg", "masks/b.png"))
    for name in "ab":
        image = Image.fromarray((np.eye(12, 16) > 0).astype(np.uint8) * 255)
        image.convert(mode).save(root / f"masks/{name}.png")
    if names:
        (root / "classes.txt").write_text(names.replace(" ", "\n"))
    with caplog.at_level(logging.INFO):
        images = FolderSegmentation(root, "train")
        FolderSegmentation(root, "train")
    assert len(images.classes) == 2
    assert images.classes[1] == {None: "object", "no yes": "yes"}.get(names, "nucleus")
    assert images[0][1].unique().tolist() == [0, 1]
    assert images[0][1].sum() == 12
    notes = [record for record in caplog.records if "only 0 and 255" in record.message]
    assert [record.levelno for record in notes] == [logging.INFO]


def test_other_values_in_binary_masks(tmp_path):
    root = write(tmp_path, ("images/a.jpg", "masks/a.png"), labels=(0, 255))
    images = FolderSegmentation(root, "train")
    save_labels(root / "masks/a.png", np.full(SHAPE, 1), mode="L")
    with one_line(ValueError, "a.png", "only 0 and 255", "label 1"):
        images[0]


def test_lossy_masks(tmp_path):
    root = write(tmp_path, ("images/a.png", "masks/a.png"), labels=(0, 255))
    images = FolderSegmentation(root, "train")
    save_image(tmp_path / "c.jpg")
    (root / "masks/a.png").unlink()
    (tmp_path / "c.jpg").rename(root / "masks/a.jpg")
    (root / "classes.txt").write_text("a\nb\nc\n")
    with one_line(ValueError, "a.jpg", "color"):
        FolderSegmentation(root, "train")
    assert images.classes == ("background", "object")


def test_binary_masks_with_more_classes(root):
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    for name in "ab":
        save_labels(root / f"masks/{name}.png", np.eye(*SHAPE) * 255, mode="L")
    with one_line(ValueError, "classes.txt", "only 0 and 255", "255 is void", "3 classes"):
        FolderSegmentation(root, "train")
    # A single mask with a class shows that 255 is void: also beyond the first ones.
    for number in range(SAMPLED):
        save_labels(root / f"masks/c{number}.png", np.eye(*SHAPE) * 255, mode="L")
        save_image(root / f"images/c{number}.jpg", *SHAPE)
    write(root, ("images/d.jpg", "masks/d.png"), labels=(0, 1, 2, 255))
    assert FolderSegmentation(root, "train")[0][1].unique().tolist() == [0, 255]


def test_binary_masks_in_the_voc_layout(voc):
    for path in (voc / "VOCdevkit/VOC2012/SegmentationClass").glob("*.png"):
        save_labels(path, np.eye(*SHAPE) * 255, mode="L")
    with one_line(ValueError, voc / "classes.txt", "only 0 and 255", "255 is void"):
        open_segmentation(voc, "train")
    (voc / "classes.txt").write_text("background\nperson\n")
    images = open_segmentation(voc, "train")
    assert images[0][1].unique().tolist() == [0, 1]
    (voc / "classes.txt").unlink()
    assert open_segmentation(voc, "train").classes == ("background", "object")


# Void.


def test_all_void(root):
    """Masks of 255 alone: refused where they are to be trained on."""
    for name in "ab":
        save_labels(root / f"masks/{name}.png", np.full(SHAPE, 255), mode="L")
    images = FolderSegmentation(root, "train")
    with one_line(ValueError, root, "split train", "all pixels of its 2 label maps are void"):
        images.require_labels()
    write(root, ("images/b.jpg", "masks/b.png"))
    FolderSegmentation(root, "train").require_labels()


# Colors.


COLORS = [(0, 0, 0), (250, 50, 83), (50, 183, 250)]


@pytest.fixture
def colored(root):
    """Masks of the colors of a labelmap.txt."""
    lines = ["# label:color_rgb:parts:actions"]
    for name, color in zip(("background", "cat", "dog"), COLORS, strict=True):
        lines.append(f"{name}:{','.join(map(str, color))}::")
    (root / "labelmap.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").unlink()
    save_colors(root / "masks/a.png", COLORS)
    save_colors(root / "masks/b.png", COLORS[::-1])
    return root


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_of_a_labelmap(colored, mode):
    save_colors(colored / "masks/a.png", COLORS, mode)
    images = FolderSegmentation(colored, "train")
    assert images.classes == ("background", "cat", "dog")
    assert columns(images[0][1], 3) == [0, 1, 2]
    assert columns(images[1][1], 3) == [2, 1, 0]
    assert images[0][1].dtype == torch.uint8


def test_colors_in_classes_txt(colored):
    (colored / "classes.txt").write_text("dog 50 183 250\ncat 250 50 83\nvoid 0 0 0\n")
    images = FolderSegmentation(colored, "train")
    assert images.classes == ("dog", "cat")
    assert columns(images[0][1], 3) == [255, 1, 0]


def test_unknown_color(colored):
    images = FolderSegmentation(colored, "train")
    save_colors(colored / "masks/a.png", [*COLORS, (1, 2, 3)])
    parts = (colored / "masks/a.png", "(1, 2, 3) in 48 pixels", "3 classes in", "labelmap.txt")
    with one_line(ValueError, *parts):
        images[0]
    save_colors(colored / "masks/a.png", [(1, 2, 3), (1, 2, 4), (1, 2, 5)])
    with one_line(ValueError, "and 2 more colors"):
        images[0]


def test_colors_without_a_palette(colored):
    (colored / "labelmap.txt").unlink()
    parts = (
        colored / "masks/a.png",
        "color (50, 183, 250) in 60 pixels",
        "classes.txt",
        "labelmap",
    )
    with one_line(ValueError, *parts):
        FolderSegmentation(colored, "train")


def test_colors_of_voc(root):
    (root / "classes.txt").unlink()
    colors = color_map()[[0, 15, 7, 255]].tolist()
    for name in "ab":
        save_colors(root / f"masks/{name}.png", colors)
    images = FolderSegmentation(root, "train")
    assert images.classes == VOC_CLASSES
    assert columns(images[0][1], 4) == [0, 15, 7, 255]


def test_colors_of_voc_for_other_classes(root):
    """As labelme and Datumaro write them."""
    (root / "classes.txt").rename(root / "class_names.txt")
    (root / "class_names.txt").write_text("_background_\ncat\ndog\n")
    save_colors(root / "masks/a.png", color_map()[:3].tolist())
    images = FolderSegmentation(root, "train")
    assert images.classes == ("background", "cat", "dog")
    assert columns(images[0][1], 3) == [0, 1, 2]


def test_ids_beside_a_labelmap(colored):
    for name in "ab":
        save_labels(colored / f"masks/{name}.png", np.arange(192).reshape(SHAPE) % 3, mode="P")
    assert FolderSegmentation(colored, "train")[0][1].unique().tolist() == [0, 1, 2]


def test_cvat_in_the_voc_layout(colored, tmp_path):
    year = tmp_path / "cvat"
    (year / "ImageSets/Segmentation").mkdir(parents=True)
    (year / "ImageSets/Segmentation/default.txt").write_text("a\nmy b\n")
    (colored / "images").rename(year / "JPEGImages")
    (colored / "masks").rename(year / "SegmentationClass")
    (colored / "labelmap.txt").rename(year / "labelmap.txt")
    (year / "JPEGImages/b.jpg").rename(year / "JPEGImages/my b.JPG")
    (year / "SegmentationClass/b.png").rename(year / "SegmentationClass/my b.png")
    images = open_segmentation(year, "default")
    assert [images.name(i) for i in range(2)] == ["a", "my b"]
    assert columns(images[1][1], 3) == [2, 1, 0]


# EXIF orientation.


@pytest.mark.parametrize("upright", [False, True])
def test_orientation_by_the_mask(root, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 12)).save(root / "images/a.jpg", exif=exif)
    shape = (16, 12) if upright else (12, 16)
    save_labels(root / "masks/a.png", np.ones(shape))
    image, mask = FolderSegmentation(root, "train")[0]
    assert image.shape[1:] == mask.shape == shape
    other = FolderSegmentation(root, "train", orientation="stored" if upright else "upright")
    with one_line(ValueError, "a.png", "EXIF", "'auto'"):
        other[0]


# Bad input.


def test_image_without_mask(root):
    save_image(root / "images/c.jpg")
    save_image(root / "images/d.jpg")
    with one_line(FileNotFoundError, root / "images", "c.png", root / "masks", "and 1 more"):
        FolderSegmentation(root, "train")


def test_masks_of_other_names(root):
    for name in "ab":
        (root / f"masks/{name}.png").rename(root / f"masks/other{name}.png")
    with one_line(
        ValueError, root / "images", "2 images (a.jpg", "2 masks (othera.png", "NAME_mask"
    ):
        FolderSegmentation(root, "train")


def test_images_of_the_same_name(root):
    save_image(root / "images/a.png")
    with one_line(ValueError, root / "images/a.png", "a.jpg"):
        FolderSegmentation(root, "train")


def test_size_of_the_mask(root):
    save_labels(root / "masks/a.png", np.ones((5, 5)))
    with one_line(ValueError, "a.png", "16x12", "5x5"):
        FolderSegmentation(root, "train")[0]


def test_mask_that_ends_early(root):
    from test_image_files import png

    (root / "masks/a.png").write_bytes(png(16, 12, 1, color=0))
    with one_line(ValueError, "a.png", "last rows"):
        FolderSegmentation(root, "train")[0]


# The check of data sets.


def test_check(root, tmp_path):
    def check():
        return check_data(root, workers=0, progress=False, record=tmp_path / "record")

    assert check().ok
    save_labels(root / "masks/b.png", np.full(SHAPE, 9), mode="L")
    save_image(root / "images/c.jpg")
    report = check()
    assert any("b.png" in line and "label 9" in line for line in report.problems)
    assert any("c.png: missing" in line for line in report.problems)


def test_check_of_binary_and_void_masks(root, tmp_path):
    def check():
        return check_data(root, workers=0, progress=False, record=tmp_path / "record")

    for name in "ab":
        save_labels(root / f"masks/{name}.png", np.eye(*SHAPE) * 255, mode="L")
    report = check()
    assert report.ok
    assert any("only 0 and 255" in line for line in report.remarks)
    for name in "ab":
        save_labels(root / f"masks/{name}.png", np.full(SHAPE, 255), mode="L")
    report = check()
    assert any("all pixels of its masks are void" in line for line in report.problems)
    assert any("a.png: all pixels are void" in line for line in report.remarks)


def test_real_nuclei_as_binary_masks(real_data, tmp_path):
    """PennFudan's masks of 0 and 1, written as 0 and 255."""
    year = real_data / "pennfudan_voc/VOCdevkit/VOC2007"
    for path in sorted((year / "SegmentationClass").glob("*.png"))[:3]:
        target = tmp_path / f"masks/{path.stem}_mask.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray((read_stored_mask(path).pixels == 1).astype(np.uint8) * 255).save(target)
        image = next((year / "JPEGImages").glob(f"{path.stem}.*"))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / image.name).symlink_to(image)
    images = open_segmentation(tmp_path, "train")
    originals = open_segmentation(real_data / "pennfudan_voc", "train+val")
    by_name = {originals.name(i): i for i in range(len(originals))}
    for i in range(3):
        stored = originals[by_name[images.name(i)]]
        assert images[i][0].equal(stored[0])
        assert images[i][1].equal((stored[1] == 1).byte())
