"""Images in every form that users pass in."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deformnet.data.files import read_image
from deformnet.tasks.images import as_image, find_images
from pictures import noise, save, turned


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
    path = save(tmp_path / "photo.png", noise(5, 8), exif=turned(orientation))
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read_image(path, orientation="upright").permute(1, 2, 0).numpy(), upright)


def test_sixteen_bits_are_not_white(tmp_path):
    gray = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(gray).save(tmp_path / name)
        read = read_image(tmp_path / name).numpy()
        assert np.array_equal(read, np.broadcast_to(gray >> 8, (3, 60, 64)))


def test_pil_images_are_turned_as_their_files(tmp_path):
    path = save(tmp_path / "photo.jpg", noise(5, 8), exif=turned())
    with Image.open(path) as photo:
        assert torch.equal(as_image(photo), as_image(path))
        assert as_image(path).shape == (3, 8, 5)
        assert torch.equal(as_image(photo, upright=False), as_image(path, upright=False))
        assert as_image(photo, upright=False).shape == (3, 5, 8)


def names(paths, **options):
    return [file.name for file in find_images(paths, **options)]


def test_folders_stand_for_their_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "sub/deep/c.jpg", ".git/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    alone = tmp_path / "x" / "c.jpg"
    assert names([alone, tmp_path]) == ["c.jpg", "a.PNG", "b.jpg", "sub/deep/c.jpg"]
    (tmp_path / "x").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in this folder"):
        find_images([tmp_path / "x"])
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert names([tmp_path]) == ["a.PNG", "b.jpg", "sub/deep/c.jpg"]
    assert names([tmp_path], apart_from=tmp_path / "sub") == ["a.PNG", "b.jpg"]


def test_patterns_stand_for_what_matches(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "a/b/2.jpg", "a/b/3.txt", "[x].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert names(["a/*.jpg"]) == names([tmp_path / "a" / "*"]) == ["1.jpg"]
    assert names(["a/**/*"]) == ["1.jpg", "b/2.jpg"]
    assert names(["*/b/*"]) == ["a/b/2.jpg"]
    assert names(["[x].jpg"]) == ["[x].jpg"], "a file of this name is that file"
    with pytest.raises(FileNotFoundError, match=r"\*\.png: no image matches this pattern"):
        find_images(["a/*.png"])


def test_two_images_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have the same name"):
        find_images([tmp_path / "a" / "x.jpg", tmp_path / "b" / "x.jpg"])


def test_names_that_differ_in_their_suffix_have_their_own_results(tmp_path):
    for name in ("x.jpg", "x.png", "y.z.jpg", "s/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    results = {file.name: file.result for file in find_images([tmp_path])}
    assert results == {"x.jpg": "x.jpg", "x.png": "x.png", "y.z.jpg": "y.z", "s/x.jpg": "s/x"}


def test_opened_16_bit_images_keep_their_upper_bits(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 5), 30000, np.uint16)).save(path)
    with Image.open(path) as image:
        assert torch.equal(as_image(image), as_image(path))
