import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deformnet.data.files import read_image
from deformnet.inference import (
    SegmentationPredictor,
    find_images,
    label_image,
    overlay,
    palette,
    predict_files,
)
from deformnet.recipes import DeepLabRecipe
from deformnet.visualization.drawing import distinct_colors

CLASSES = ("background", "one", "two")


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    recipe = DeepLabRecipe(backbone="resnet18", deform_layers=0, short_side=32, max_side=48)
    return SegmentationPredictor(recipe, recipe.build_model(len(CLASSES)), CLASSES, "cpu")


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def save(path, image, **options):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


@pytest.mark.parametrize("size", [(32, 48), (40, 30), (90, 200), (1, 1), (7, 300)])
def test_label_maps_have_the_size_of_the_image(predictor, size):
    labels = predictor(noise(*size))
    assert labels.dtype == torch.uint8
    assert labels.shape == size
    assert labels.max() < len(CLASSES)


def test_labels_are_those_of_the_highest_logit(predictor):
    """At the network's own size there is nothing to resize."""
    image = noise(32, 40)
    labels = predictor(image)
    prepared = image.float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        logits = predictor.model(((prepared - mean) / std)[None])
    assert torch.equal(labels.long(), logits.argmax(1)[0])


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(2)]
)
def test_other_tensors_are_refused(predictor, image):
    with pytest.raises(ValueError, match=r"image must be uint8 \[3, H, W\], got torch"):
        predictor(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photo.png", noise(5, 8), exif=exif)
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read_image(path, upright=True).permute(1, 2, 0).numpy(), upright)


def test_sixteen_bits_are_not_white(tmp_path):
    grey = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        read = read_image(tmp_path / name).numpy()
        assert np.array_equal(read, np.broadcast_to(grey >> 8, (3, 60, 64)))


def test_files_with_a_broken_one_among_them(predictor, tmp_path):
    first = save(tmp_path / "first.png", noise(20, 30))
    broken = save(tmp_path / "broken.jpg", noise(200, 300))
    broken.write_bytes(broken.read_bytes()[:2000])
    missing = tmp_path / "missing.jpg"
    last = save(tmp_path / "last.jpg", noise(30, 20))
    out = tmp_path / "out"
    results = dict(predict_files(predictor, [first, broken, missing, last], out))
    assert results[first] is None
    assert results[last] is None
    for path in (broken, missing):
        assert str(results[path]).startswith(f"{path}: ")
        assert "\n" not in str(results[path])
    assert sorted(p.name for p in out.rglob("*.*")) == [
        "first.jpg",
        "first.png",
        "last.jpg",
        "last.png",
    ]
    with Image.open(out / "labels/first.png") as file:
        assert file.mode == "P"
        assert np.array_equal(np.asarray(file), predictor(read_image(first, upright=True)).numpy())
        assert file.getpalette()[: 3 * len(CLASSES)] == palette(CLASSES).flatten().tolist()


def test_folders_stand_for_their_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    alone = tmp_path / "x" / "c.jpg"
    assert [p.name for p in find_images([alone, tmp_path])] == ["c.jpg", "a.PNG", "b.jpg"]
    (tmp_path / "x").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in this folder"):
        find_images([tmp_path / "x"])


def test_two_images_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have the same name"):
        find_images([tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.png"])


def test_colours_can_be_told_apart():
    colours = distinct_colors(30).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 999 * np.eye(30, dtype=int)
    assert apart.min() > 60
    assert np.array_equal(distinct_colors(5), distinct_colors(30)[:5])
    assert len(distinct_colors(255)) == 255


def test_overlay_tints_classes_and_leaves_the_background():
    image = torch.full((3, 600, 600), 100, dtype=torch.uint8)
    labels = torch.zeros(600, 600, dtype=torch.uint8)
    labels[200:400, 200:400] = 2
    drawn = np.asarray(overlay(image, labels, CLASSES))
    assert drawn.shape[0] > 600, "the legend comes below"
    assert (drawn[:199, :600] == 100).all()
    assert (drawn[200, 300] == palette(CLASSES)[2]).all(), "the outline has the class's colour"
    inside = drawn[300, 300].astype(int)
    assert (
        np.abs(inside - palette(CLASSES)[2]).sum()
        < np.abs(100 - palette(CLASSES)[2].astype(int)).sum()
    )
    swatches = (drawn[600:] == palette(CLASSES)[2]).all(axis=2).sum()
    assert swatches > 100


def test_an_empty_scene_has_no_legend():
    image = noise(600, 500)
    drawn = overlay(image, torch.zeros(600, 500, dtype=torch.uint8), CLASSES)
    assert np.array_equal(np.asarray(drawn), image.permute(1, 2, 0).numpy())


def test_label_image_keeps_the_labels():
    labels = torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8)
    assert np.array_equal(np.asarray(label_image(labels, CLASSES)), labels.numpy())
