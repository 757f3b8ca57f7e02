"""Images in every form that users pass in."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deformnet.data.files import read_image
from deformnet.tasks.images import as_image, find_images


def noise(height, width):
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def save(path, image, **options):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


def test_every_form_is_the_same_image(tmp_path):
    image = noise(5, 8)
    array = image.permute(1, 2, 0).numpy()
    path = save(tmp_path / "image.png", image)
    for form in (image, array, np.asfortranarray(array), Image.fromarray(array), path, str(path)):
        converted = as_image(form)
        assert converted.dtype == torch.uint8
        assert torch.equal(converted, image)
    gray = Image.fromarray(array[..., 0])
    assert torch.equal(as_image(gray), image[:1].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), r"array of uint8 \[H, W, 3\], but got uint8 \[3, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"but got float32 \[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"but got uint8 \[0, 4, 3\]"),
        (torch.zeros(3, 4, 4), r"uint8 \[3, H, W\], but got torch.float32 \[3, 4, 4\]"),
        (3, "a path, a PIL image, a NumPy array, a tensor or a list of those, but got int"),
        (None, "but got NoneType"),
        (b"x.png", "but got bytes"),
    ],
)
def test_other_objects_are_refused(image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        as_image(image)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        as_image(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        as_image(tmp_path / "text.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photo.png", noise(5, 8), exif=exif)
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read_image(path, orientation="upright").permute(1, 2, 0).numpy(), upright)


def test_sixteen_bits_are_not_white(tmp_path):
    gray = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(gray).save(tmp_path / name)
        read = read_image(tmp_path / name).numpy()
        assert np.array_equal(read, np.broadcast_to(gray >> 8, (3, 60, 64)))


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
