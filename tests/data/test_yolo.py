"""The layout of YOLO: where its files are, and their content."""

import os

import numpy as np
import pytest
import torch

from deformnet.data import detection_splits, open_detection, open_segmentation, segmentation_splits
from deformnet.data.check import check_data
from deformnet.data.yolo import YOLODetection, YOLOSegmentation
from small_sets import one_line, save_image

# Images are 12 x 16 (height, width).
BOX = "1 0.5 0.5 0.25 0.5\n"  # 6 to 10, 3 to 9
OUTLINE = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"  # 4 to 12, 3 to 9


def write(root, files: dict[str, str]):
    """Writes texts, and an image for every name that ends in an image's suffix."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".png", ".bmp"):
            save_image(path, seed=len(name))
        else:
            path.write_text(text)
    return root


ORDERS = {
    "images first": ("images/{}/{}.jpg", "labels/{}/{}.txt"),
    "splits first": ("{}/images/{}.jpg", "{}/labels/{}.txt"),
    "side by side": ("{}/{}.jpg", "{}/{}.txt"),
}


def write_splits(root, image, label, **files):
    pairs = {"train": ("a", "b"), "val": ("c",)}
    content = {}
    for split, names in pairs.items():
        for name in names:
            content[image.format(split, name)] = ""
            content[label.format(split, name)] = "" if name == "b" else BOX
    return write(root, content | files)


@pytest.fixture
def one(tmp_path):
    """One image with a box."""
    return write(
        tmp_path / "one", {"images/a.jpg": "", "labels/a.txt": BOX, "classes.txt": "cat\ndog\n"}
    )


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_folders(tmp_path, order):
    root = write_splits(tmp_path, *ORDERS[order], **{"classes.txt": "cat\ndog\n"})
    images = open_detection(root, "train")
    assert type(images) is YOLODetection
    assert (images.classes, len(images)) == (("cat", "dog"), 2)
    assert [images.name(i) for i in range(2)] == ["a", "b"]
    image, annotations = images[0]
    assert image.shape == (3, 12, 16)
    assert annotations.boxes.tolist() == [[6, 3, 10, 9]]
    assert annotations.labels.tolist() == [1]
    assert not annotations.ignored.any()
    assert images.annotations(1).boxes.shape == (0, 4)
    assert detection_splits(root) == ["train", "val"]
    assert len(open_detection(root, "train+val")) == 3


@pytest.mark.parametrize(
    "entries",
    [
        "train: images/train\nval: images/val",
        "path: .\ntrain: images/train\nval: [images/val]",
        "path: /home/someone/data\ntrain: images/train/\nval: images/val",
        "path: ../datasets/mine\ntrain: ./images/train\nval: images/val",
        "train: ../images/train\nval: ../images/val\ntest: ../images/test",
        "train: C:\\data\\mine\\images\\train\nval: C:\\data\\mine\\images\\val",
        "train: train.txt\nval: val.txt",
        "path: mine\ntrain: /content/mine/train.txt\nval: val.txt\ntest:",
    ],
)
@pytest.mark.parametrize("names", ["[cat, no]", "\n  0: cat\n  1: no", "\n- cat\n- no"])
def test_data_yaml(tmp_path, entries, names):
    root = write_splits(tmp_path, *ORDERS["images first"])
    text = f"{entries}\nnc: 2\nnames: {names}\n"
    lists = {
        "train.txt": "./images/train/a.jpg\n/home/me/images/train/b.jpg\n",
        "val.txt": "images\\val\\c.jpg",
    }
    write(root, {"data.yaml": text, **lists})
    assert detection_splits(root) == ["train", "val"]
    images = open_detection(root, "train")
    assert (images.classes, len(images)) == (("cat", "no"), 2)
    assert open_detection(root, "val").annotations(0).boxes.tolist() == [[6, 3, 10, 9]]


def test_darknet_of_cvat(tmp_path):
    files = {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = b/\n",
        "obj.names": "cat\ndog\n",
        "train.txt": "data/obj_train_data/a 1.jpg\n",
        "obj_train_data/a 1.jpg": "",
        "obj_train_data/a 1.txt": BOX,
        "obj_train_data/a.jpg": "",
    }
    images = open_detection(write(tmp_path, files), "train")
    assert [images.name(i) for i in range(len(images))] == ["a 1"]
    assert images.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "image", "label"),
    [
        ("classes.txt", "a.jpg", "a.txt"),
        ("labels/classes.txt", "images/a.JPG", "labels/a.txt"),
        ("_darknet.labels", "train/a.png", "train/a.txt"),
        ("obj.names", "images/day/a.bmp", "labels/day/a.txt"),
        ("classes.txt", "a.b c.jpg", "a.b c.txt"),
    ],
)
def test_layouts_without_data_yaml(tmp_path, classes, image, label):
    root = write(tmp_path, {classes: "cat\ndog\n", image: "", label: BOX})
    images = open_detection(root, "train")
    assert images.image_path(0) == root / image
    assert images.annotations(0).labels.tolist() == [1]


def test_names_are_unique(tmp_path):
    files = {f"images/{day}/a.jpg": "" for day in ("day", "night")} | {
        f"labels/{day}/a.txt": BOX for day in ("day", "night")
    }
    images = open_detection(write(tmp_path, files | {"classes.txt": "cat\ndog\n"}), "train")
    assert [images.name(i) for i in range(2)] == ["images__day__a.jpg", "images__night__a.jpg"]


def test_classes_txt_decides(one):
    write(one, {"data.yaml": "train: images\nnames: [x, y, z]"})
    assert open_detection(one, "train").classes == ("cat", "dog")
    (one / "classes.txt").unlink()
    assert open_detection(one, "train").classes == ("x", "y", "z")


def test_polygons_as_boxes_and_masks(one):
    write(one, {"labels/a.txt": OUTLINE + "1 0.5 0.5 1 0.5 1 1 0.5 1\n"})
    assert open_detection(one, "train").annotations(0).boxes.tolist() == [
        [4, 3, 12, 9],
        [8, 6, 16, 12],
    ]
    images = open_segmentation(one, "train")
    assert type(images) is YOLOSegmentation
    assert images.classes == ("background", "cat", "dog")
    assert segmentation_splits(one) == ["train"]
    image, mask = images[0]
    expected = torch.zeros(12, 16, dtype=torch.uint8)
    expected[3:9, 4:12] = 1
    expected[6:, 8:] = 2
    assert image.shape == (3, 12, 16)
    assert mask.equal(expected)


def test_images_without_labels_are_background(one):
    write(one, {"images/b.jpg": "", "labels/a.txt": OUTLINE})
    assert open_detection(one, "train").annotations(1).boxes.shape == (0, 4)
    assert not open_segmentation(one, "train")[1][1].any()
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    assert report.ok
    assert "1 images have no label file" in " ".join(report.remarks)


def test_boxes_alone_are_no_masks(one):
    with one_line(FileNotFoundError, one, "expected a data set"):
        open_segmentation(one, "train")


def test_box_among_polygons(one):
    write(one, {"labels/a.txt": OUTLINE + BOX})
    images = open_segmentation(one, "train")
    with one_line(ValueError, one / "labels/a.txt", "line 2", "polygon", "got a box"):
        images[0]


def test_keypoints_are_skipped(one):
    write(one, {"data.yaml": "train: images\nkpt_shape: [2, 3]\nnames: [cat, dog]"})
    write(one, {"labels/a.txt": BOX.strip() + " 0.1 0.1 2 0.2 0.2 2\n"})
    assert open_detection(one, "train").annotations(0).boxes.tolist() == [[6, 3, 10, 9]]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("2 0.5 0.5 0.1 0.1", ["class from 0 to 1", "classes.txt (cat, dog)", "but got 2"]),
        ("-1 0.5 0.5 0.1 0.1", ["but got -1"]),
        ("0.5 0.5 0.5 0.1 0.1", ["but got 0.5"]),
        ("nan 0.5 0.5 0.1 0.1", ["but got nan"]),
        ("0 4 3 9 9", ["0 to 1", "but got 4", "divide pixel coordinates"]),
        ("0 0.5 0.5 nan 0.1", ["but got nan"]),
        ("0 0.5 0.5 inf 0.1", ["but got inf"]),
        ("0 0.5 0.5 -0.2 0.1", ["but got -0.2"]),
        ("0 0.5 0.5 0.1 0.1 0.9", ["5 numbers", "confidence"]),
        ("0 0.5 0.5 0.1", ["3 numbers"]),
        ("0 .1 .1 .2 .2 .3 .3 .4", ["7 numbers"]),
        ("cat 0.5 0.5 0.1 0.1", ["expected numbers", "cat"]),
    ],
)
def test_malformed_labels(one, line, parts):
    path = one / "labels/a.txt"
    path.write_text(f"{BOX}\n{line}\n")
    with one_line(ValueError, path, "line 2", *parts):
        open_detection(one, "train")
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    (problem,) = report.problems
    assert all(part in problem for part in ["labels/a.txt", "line 2", *parts])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("names: [a", ["not readable as YAML"]),
        ("[" * 100000, ["not readable as YAML"]),
        ("- a", ["expected keys and values"]),
        ("train: images\nnames: 3", ["expected class names"]),
        ("train: images\nnames: {0: a, 2: b}", ["keys from 0 to 1", "but got 0, 2"]),
        ("train: images\nnames: [a, [b]]", ["list of strings"]),
        ("train: images\nnames: [a, a]", ["'a' more than once"]),
        ("train: images\nnc: 3\nnames: [a, b]", ["3 class names (nc), but got 2"]),
        ("train: {a: b}\nnames: [a, b]", ["expected train to be folders"]),
        ("train: images\npath: [a]\nnames: [a, b]", ["expected path to be a folder", "['a']"]),
        ("train: nowhere\nnames: [a, b]", ["nowhere", "no such folder"]),
        (
            "train: x/images\nval: y/images\nnames: [a, b]",
            ["train and val", "x/images", "y/images"],
        ),
        ("train: labels\nnames: [a, b]", ["expected images, but found none"]),
    ],
)
def test_malformed_data_yaml(one, text, parts):
    (one / "classes.txt").unlink()
    (one / "data.yaml").write_text(text)
    with one_line((ValueError, OSError), one, *parts):
        open_detection(one, "train")


ALIASES = "a0: &a0 word\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""As nested lists, 10^11 words."""


@pytest.mark.parametrize("key", ["names", "path", "train", "nc"])
def test_aliases_of_aliases(one, key):
    (one / "classes.txt").unlink()
    values = {"train": "images", "names": "[cat, dog]"} | {key: "*a11"}
    text = ALIASES + "".join(f"{name}: {value}\n" for name, value in values.items())
    (one / "data.yaml").write_text(text)
    with one_line(ValueError, one / "data.yaml", "expected", "[["):
        open_detection(one, "train")
    report = check_data(one, record=one.parent / "record", workers=0, progress=False)
    assert not report.ok


def test_aliases_of_values(one):
    (one / "classes.txt").unlink()
    (one / "data.yaml").write_text("val: &images images\ntrain: *images\nnames: [cat, dog]\n")
    assert open_detection(one, "train").classes == ("cat", "dog")


def test_many_names(one):
    names = [f"class {number}" for number in range(200_000)]
    (one / "classes.txt").write_text("\n".join(names))
    assert len(open_detection(one, "train").classes) == len(names)


def test_no_names(one):
    (one / "classes.txt").unlink()
    with one_line(ValueError, "class names", "to", one / "classes.txt"):
        open_detection(one, "train")


def test_no_labels_at_all(one):
    (one / "labels/a.txt").rename(one / "labels/other.txt")
    with one_line(ValueError, "expected a label file", "1 images", one / "labels"):
        open_detection(one, "train")


def test_missing_split(one):
    with one_line(FileNotFoundError, "no split 'val'", "are: train"):
        open_detection(one, "val")


@pytest.mark.parametrize("line", ["../secret.jpg", "/etc/../{}/../secret.jpg", "missing.jpg"])
def test_nothing_outside_the_folder_is_read(one, line):
    save_image(one.parent / "secret.jpg")
    write(one, {"train.txt": line.format(one), "data.yaml": "train: train.txt\nnames: [a, b]"})
    with one_line(FileNotFoundError, "train.txt", "secret.jpg" if "secret" in line else line):
        open_detection(one, "train")
    write(one, {"data.yaml": "train: ../one/..\nval: /etc\nnames: [a, b]"})
    assert YOLODetection(one, "train").image_path(0) == one / "images/a.jpg"


def test_pipes_and_links_in_a_circle(one):
    (one / "images/again").symlink_to(one / "images")
    with one_line(ValueError, one / "images/again", "a link to a folder that contains it"):
        open_detection(one, "train")
    (one / "images/again").unlink()
    (one / "labels/a.txt").unlink()
    os.mkfifo(one / "labels/a.txt")
    write(one, {"labels/b.txt": BOX, "images/b.jpg": ""})
    with one_line(ValueError, one / "labels/a.txt", "expected a label file"):
        open_detection(one, "train")
    os.mkfifo(one / "data.yaml")
    with one_line(ValueError, one / "data.yaml", "got a pipe"):
        open_detection(one, "train")


def test_many_images_in_workers(tmp_path):
    files = {f"images/{i}.jpg": "" for i in range(30)} | {f"labels/{i}.txt": BOX for i in range(30)}
    images = open_detection(write(tmp_path, files | {"classes.txt": "a\nb"}), "train")
    loader = torch.utils.data.DataLoader(images, num_workers=2, collate_fn=list)
    assert sum(len(batch) for batch in loader) == 30
    assert np.array_equal(images.annotations(29).boxes, [[6, 3, 10, 9]])
