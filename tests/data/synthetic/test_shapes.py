"""The synthetic data set: content, reproducibility, interruption."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from deformnet import UserError
from deformnet.data import (
    ImageFolderClassification,
    Shapes,
    VOCSegmentation,
    open_segmentation,
    write_shapes,
)
from deformnet.data.synthetic import SHAPE_CLASSES, scene, shapes
from deformnet.data.synthetic.scenes import OBJECTS
from small_sets import one_line

SMALL = Shapes(train=6, val=3, height=48, width=64)
YEAR = "VOCdevkit/VOC2012"


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


FOLDERS = Shapes(train=13, val=3, height=32, width=40, layout="image-folder")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders") / "set"
    write_shapes(root, FOLDERS)
    return root


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(root, SMALL)
    return root


# Content.


def test_reads_as_voc(data_set):
    images = open_segmentation(data_set, "train")
    assert isinstance(images, VOCSegmentation)
    assert images.classes == SHAPE_CLASSES
    assert len(images) == 6
    assert len(open_segmentation(data_set, "val")) == 3
    assert len(open_segmentation(data_set, "trainval")) == 9
    image, mask = images[0]
    assert image.shape == (3, 48, 64)
    assert mask.shape == (48, 64)
    assert not list(data_set.rglob("*.partial"))


def test_files_hold_the_scene(data_set):
    images = open_segmentation(data_set, "val")
    for i in range(3):
        drawn = scene(SMALL, "val", i)
        image, mask = images[i]
        np.testing.assert_array_equal(mask.numpy(), drawn.labels)
        error = np.abs(image.permute(1, 2, 0).numpy().astype(int) - drawn.image)
        assert error.mean() < 8  # JPEG: much less than another image's, about 60
        instances = Image.open(data_set / YEAR / f"SegmentationObject/{images.name(i)}.png")
        assert instances.mode == "P"
        np.testing.assert_array_equal(np.asarray(instances), drawn.instances)


def test_annotations_agree_with_the_masks(data_set):
    boxes = VOCDetection(data_set, year="2012", image_set="trainval")
    assert len(boxes) == 9
    for i in range(9):
        annotation = boxes[i][1]["annotation"]
        name = annotation["filename"].removesuffix(".jpg")
        labels = np.asarray(Image.open(data_set / YEAR / f"SegmentationClass/{name}.png"))
        instances = np.asarray(Image.open(data_set / YEAR / f"SegmentationObject/{name}.png"))
        assert annotation["size"] == {"width": "64", "height": "48", "depth": "3"}
        objects = annotation["object"]
        assert len(objects) == instances.max() >= 1
        for number, item in enumerate(objects, start=1):
            mask = instances == number
            assert set(labels[mask]) == {SHAPE_CLASSES.index(item["name"])}
            rows, columns = np.nonzero(mask)
            box = {key: int(value) for key, value in item["bndbox"].items()}
            assert (box["xmin"], box["xmax"]) == (columns.min() + 1, columns.max() + 1)
            assert (box["ymin"], box["ymax"]) == (rows.min() + 1, rows.max() + 1)
        assert ((labels == 0) == (instances == 0)).all()


def test_scales_and_classes_vary():
    options = Shapes(radius=(0.04, 0.4), warp=0.0, objects=(1, 1))
    scenes = [scene(options, "train", i) for i in range(150)]
    disc = SHAPE_CLASSES.index("disc")
    discs = [o.full_area for s in scenes for o in s.objects if o.label == disc]
    assert np.sqrt(max(discs) / min(discs)) > 6
    counts = np.bincount([o.label for s in scenes for o in s.objects], minlength=7)
    assert counts[0] == 0
    assert counts[1:].min() > 10
    inside = [o.area / o.full_area for s in scenes for o in s.objects]
    assert min(inside) >= 0.7


def test_color_does_not_reveal_the_class():
    """Over many scenes all classes have the same mean color."""
    colors = {label: [] for label in range(1, len(SHAPE_CLASSES))}
    for i in range(250):
        drawn = scene(Shapes(height=64, width=64), "train", i)
        for number, item in enumerate(drawn.objects, start=1):
            colors[item.label].append(drawn.image[drawn.instances == number].mean(0))
    means = {label: np.mean(rows, axis=0) for label, rows in colors.items()}
    errors = {label: np.std(rows, axis=0) / len(rows) ** 0.5 for label, rows in colors.items()}
    overall = np.mean([row for rows in colors.values() for row in rows], axis=0)
    for label, mean in means.items():
        assert (np.abs(mean - overall) < 4 * errors[label]).all()


def test_outlines_have_radius_one():
    y, x = np.mgrid[-1.5:1.5:601j, -1.5:1.5:601j]
    for name, outline in OBJECTS.items():
        inside = outline(x, y) < 0
        radius = np.hypot(x, y)[inside].max()
        assert 0.97 < radius < 1.03, name
        assert inside[300, 300], name


@pytest.mark.parametrize("name", OBJECTS)
def test_distance_does_not_vanish_inside(name):
    """Otherwise antialiasing lets the background through inside, a mark of the class."""
    y, x = np.mgrid[-50:51, -50:51]
    value = OBJECTS[name](x / 45, y / 45)
    estimate = -value / np.maximum(np.hypot(*np.gradient(value)), 1e-6)
    outside = np.argwhere(value >= 0)
    for place in np.argwhere(value < 0):
        distance = np.hypot(*(outside - place).T).min()
        assert estimate[tuple(place)] > 0.3 * (distance - 1)


def test_pixels_change_at_the_mask():
    """The strongest edges along a row are at the outlines: masks and pixels are aligned."""
    on = off = 0.0
    for i in range(20):
        drawn = scene(Shapes(clutter=0), "train", i)
        step = np.abs(np.diff(drawn.image.astype(float), axis=1)).sum(-1)
        outline = drawn.instances[:, 1:] != drawn.instances[:, :-1]
        shifted = np.roll(outline, 3, axis=1) & ~outline
        on, off = on + step[outline].mean(), off + step[shifted].mean()
    assert on > 3 * off


def test_mute_removes_the_colors_behind_the_objects():
    spread = []
    for mute in (0.0, 0.5, 1.0):
        drawn = scene(Shapes(mute=mute), "train", 4)
        behind = drawn.image[drawn.labels == 0].astype(float)
        spread.append((behind.max(1) - behind.min(1)).mean())
    assert spread[0] > 1.3 * spread[1] > 1.3 * spread[2]


def test_warp_changes_only_the_masks():
    still, bent = (scene(Shapes(warp=w, clutter=0, objects=(1, 1)), "train", 3) for w in (0, 1))
    assert still.objects[0].label == bent.objects[0].label
    differing = (still.labels > 0) != (bent.labels > 0)
    assert 0.02 < differing.sum() / (still.labels > 0).sum() < 1


def test_void_border():
    exact = scene(SMALL, "train", 0)
    bordered = scene(replace(SMALL, void_border=3), "train", 0)
    void = bordered.labels == 255
    assert void.any()
    np.testing.assert_array_equal(bordered.labels[~void], exact.labels[~void])
    np.testing.assert_array_equal(void, bordered.instances == 255)
    changes = exact.instances[:, 1:] != exact.instances[:, :-1]
    touched = void[:, 1:] | void[:, :-1]
    assert touched[changes].mean() > 0.95


def test_synthetic_classes(image_folder):
    images = ImageFolderClassification(image_folder, "train")
    assert images.classes == tuple(sorted(OBJECTS))
    labels = [images[i][1] for i in range(len(images))]
    assert sorted(np.bincount(labels)) == [2, 2, 2, 2, 2, 3]
    assert len(ImageFolderClassification(image_folder, "val")) == 3
    assert sorted(path.name for path in image_folder.iterdir()) == ["shapes.json", "train", "val"]


def test_synthetic_images_show_one_object_of_their_class(image_folder):
    images = ImageFolderClassification(image_folder, "train")
    by_name = {Path(images.name(i)).stem: i for i in range(len(images))}
    for number in range(13):
        drawn = scene(FOLDERS, "train", number)
        image, label = images[by_name[f"train_{number:06}"]]
        (item,) = drawn.objects
        assert list(OBJECTS)[item.label - 1] == images.classes[label]
        error = np.abs(image.permute(1, 2, 0).numpy().astype(int) - drawn.image)
        assert error.mean() < 8  # JPEG


# Reproducibility.


def test_same_seed_same_bytes(data_set, image_folder, tmp_path):
    for options, root in ((SMALL, data_set), (FOLDERS, image_folder)):
        write_shapes(tmp_path / options.layout, options)
        assert digests(tmp_path / options.layout) == digests(root)


def test_other_seed_gives_other_images(data_set):
    other = scene(replace(SMALL, seed=1), "train", 0)
    assert not np.array_equal(other.image, scene(SMALL, "train", 0).image)
    assert not np.array_equal(scene(SMALL, "train", 0).image, scene(SMALL, "val", 0).image)


def test_fewer_images_are_the_first_of_more(data_set, tmp_path):
    write_shapes(tmp_path / "less", replace(SMALL, train=2, val=1))
    less, more = digests(tmp_path / "less" / YEAR), digests(data_set / YEAR)
    files = {name: digest for name, digest in less.items() if "ImageSets" not in name}
    assert len(files) == 4 * 3
    assert files.items() <= more.items()


def test_image_folders_of_other_numbers_and_seeds(image_folder, tmp_path):
    write_shapes(tmp_path / "less", replace(FOLDERS, train=7, val=1))
    write_shapes(tmp_path / "other", replace(FOLDERS, seed=1))
    less, more, other = (
        {name: digest for name, digest in digests(root).items() if name.endswith(".jpg")}
        for root in (tmp_path / "less", image_folder, tmp_path / "other")
    )
    assert len(less) == 8
    assert less.items() < more.items()
    assert not set(other.values()) & set(more.values())


# Interruption.


class _Stopped(BaseException):
    """Like KeyboardInterrupt, which pytest would handle itself."""


def _write_until(writes: int, root: Path, options: Shapes) -> None:
    """Stops in the midst of a file, after a number of whole ones."""
    left = writes
    original = shapes._write

    def write(path, content):
        nonlocal left
        left -= 1
        if left < 0:  # as a process that is killed leaves it
            path.with_name(".0123456789abcdef.partial").write_bytes(content[: len(content) // 2])
            raise _Stopped
        return original(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_write", write)
        with pytest.raises(_Stopped):
            write_shapes(root, options)


@pytest.mark.parametrize(
    ("options", "writes"),
    [*((SMALL, writes) for writes in (0, 1, 4, 7, 30, 38, 42)), (FOLDERS, 6)],
)
def test_interrupted_run_resumes(request, tmp_path, options, writes):
    root = tmp_path / "set"
    _write_until(writes, root, options)
    assert not root.exists()
    write_shapes(root, options)
    complete = request.getfixturevalue("data_set" if options is SMALL else "image_folder")
    assert digests(root) == digests(complete)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_resumed_run_draws_only_missing_images(tmp_path, monkeypatch):
    _write_until(1 + 4 * 4, tmp_path / "set", SMALL)
    draw = Mock(side_effect=scene)
    monkeypatch.setattr(shapes, "scene", draw)
    write_shapes(tmp_path / "set", SMALL)
    drawn = [call.args[1:] for call in draw.call_args_list]
    assert drawn == [("train", 4), ("train", 5), ("val", 0), ("val", 1), ("val", 2)]


def test_interrupted_run_with_other_options_starts_again(data_set, tmp_path):
    _write_until(9, tmp_path / "set", replace(SMALL, seed=5))
    write_shapes(tmp_path / "set", SMALL)
    assert digests(tmp_path / "set") == digests(data_set)


def test_two_at_once_do_not_mix_their_images(data_set, tmp_path, monkeypatch):
    """Neither with other options, which would remove what is there, nor with the same."""
    drawn = scene

    def draw(options, split, number):
        if (split, number) == ("train", 2):
            for other in (replace(SMALL, seed=5), SMALL):
                with one_line(UserError, "set.partial", "no other process writes to"):
                    write_shapes(tmp_path / "set", other)
        return drawn(options, split, number)

    monkeypatch.setattr(shapes, "scene", draw)
    write_shapes(tmp_path / "set", SMALL)
    assert digests(tmp_path / "set") == digests(data_set)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_complete_data_set_is_unchanged(data_set):
    before = {path: path.stat().st_mtime_ns for path in data_set.rglob("*")}
    write_shapes(data_set, SMALL)
    assert {path: path.stat().st_mtime_ns for path in data_set.rglob("*")} == before


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("deformnet._files._Writer.write", full)
    with one_line(OSError, "No space left on device", "shapes.json"):
        write_shapes(tmp_path / "set", SMALL)


# Bad input.


def test_other_folder_is_not_overwritten(data_set, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"precious")
    with one_line(FileExistsError, tmp_path / "mine"):
        write_shapes(tmp_path / "mine", SMALL)
    with one_line(FileExistsError, data_set):
        write_shapes(data_set, replace(SMALL, seed=3))
    (tmp_path / "set.partial/work").mkdir(parents=True)
    with one_line(FileExistsError, tmp_path / "set.partial"):
        write_shapes(tmp_path / "set", SMALL)


def test_empty_folder_is_filled(data_set, tmp_path):
    (tmp_path / "set").mkdir()
    write_shapes(tmp_path / "set", SMALL)
    assert digests(tmp_path / "set") == digests(data_set)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", 0),
        ("val", -1),
        ("height", 8),
        ("width", 0),
        ("warp", 1.5),
        ("warp", float("nan")),
        ("seed", -1),
        ("objects", (0, 2)),
        ("objects", (3, 2)),
        ("radius", (0.3, 0.2)),
        ("radius", (0.1, 0.7)),
        ("clutter", -1),
        ("void_border", -2),
    ],
)
def test_bad_options(field, value):
    with one_line(ValueError, field, value):
        Shapes(**{field: value})


def test_bad_options_of_image_folders(image_folder, tmp_path):
    with one_line(ValueError, "train", "at least 6", 5):
        replace(FOLDERS, train=5)
    with one_line(ValueError, "layout", "coco"):
        replace(FOLDERS, layout="coco")
    with one_line(FileExistsError, image_folder):
        write_shapes(image_folder, replace(FOLDERS, layout="voc"))
    with one_line(ValueError, "radius"):
        write_shapes(tmp_path / "set", replace(FOLDERS, radius=(1e-9, 1e-9), clutter=0))


def test_unknown_split():
    with one_line(ValueError, "split", "test"):
        scene(SMALL, "test", 0)


def test_options_are_recorded(data_set):
    recorded = json.loads((data_set / "shapes.json").read_text())
    assert (recorded["train"], recorded["seed"], recorded["warp"]) == (6, 0, 0.5)
    assert "layout" not in recorded


def test_flags():
    """Objects that are half hidden are difficult, objects hidden at all truncated."""
    seen = set()
    for i in range(120):
        drawn = scene(Shapes(height=96, width=96), "train", i)
        root = ElementTree.fromstring(shapes._annotation("x", drawn))
        for element, item in zip(root.iter("object"), drawn.objects, strict=True):
            visible = item.area / item.full_area
            truncated, difficult = (element.findtext(t) for t in ("truncated", "difficult"))
            assert truncated == str(int(visible < 0.95))
            assert difficult == str(int(visible < 0.5 or item.area < 40))
            seen.add((truncated, difficult))
    assert {("0", "0"), ("1", "0")} <= seen
