"""Reading of image files: formats, EXIF orientation, damaged and hostile files; JSON; names."""

import json
import os
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from deformnet._errors import UserError
from deformnet._files import read_json
from deformnet.data.files import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Folder,
    find_images,
    inside,
    is_image,
    is_rotated,
    read_image,
    read_labels,
    read_size,
    read_stored_mask,
    size_error,
    walk_images,
)
from small_sets import one_line, save_image


def png(width: int, height: int, rows: int, color: int = 2, interlaced: int = 0) -> bytes:
    """A PNG of value 255 whose compressed data ends, properly, after some of its rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    row = b"\0" + b"\xff" * width * {0: 1, 2: 3}[color]
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, interlaced)
    data = zlib.compress(row * rows)
    chunks = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def save_turned(path: Path, orientation: int, height: int = 12, width: int = 16) -> np.ndarray:
    """Writes an image with an EXIF orientation; returns its stored pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        return np.asarray(image)


# Formats.


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".bmp", ".TIF", ".WebP", ".gif", ".ppm"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"a name.v2{suffix}"
    save_image(path)
    assert is_image(path.name)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)
    assert read_size(path) == (12, 16)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 12), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_jpeg_with_several_pictures(tmp_path):
    """As phones write them (MPO)."""
    frames = [Image.new("RGB", (16, 12), color) for color in ("white", "black")]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.jpg") == 255).all()


def test_other_formats_are_not_opened(tmp_path):
    """Pillow would run Ghostscript on PostScript, whatever the file is called."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 12)).save(path, format="EPS")
    with one_line(ValueError, path, "not a readable image", "JPEG, PNG"):
        read_image(path)
    assert not is_image("a.eps")
    assert not is_image("._a.jpg")


# EXIF orientation.


@pytest.mark.parametrize("number", range(1, 9))
def test_upright_is_what_viewers_show(tmp_path, number):
    from PIL import ImageOps

    path = tmp_path / "a.png"
    stored = save_turned(path, number)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    for orientation, expected in (("stored", stored), ("upright", upright), ("auto", upright)):
        pixels = read_image(path, orientation=orientation).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, expected)
        assert read_size(path, orientation=orientation) == expected.shape[:2]
    assert is_rotated(path) == (number != 1)


@pytest.mark.parametrize(
    ("number", "annotated", "size"),
    [
        (6, (12, 16), (12, 16)),  # drawn on the stored pixels
        (6, (16, 12), (16, 12)),  # drawn upright
        (6, None, (16, 12)),
        (6, (99, 99), (16, 12)),
        (1, (16, 12), (12, 16)),
    ],
)
def test_annotated_size_decides(tmp_path, number, annotated, size):
    path = tmp_path / "a.jpg"
    save_turned(path, number)
    assert read_image(path, orientation="auto", annotated=annotated).shape[1:] == size
    assert read_size(path, orientation="auto", annotated=annotated) == size


def test_undecided_by_the_size_is_upright(tmp_path):
    """Square images and turns by 180 degrees."""
    for number, width in ((6, 12), (3, 16)):
        path = tmp_path / f"{number}.png"
        save_turned(path, number, 12, width)
        auto = read_image(path, orientation="auto", annotated=(12, width))
        assert auto.equal(read_image(path, orientation="upright"))
        assert not auto.equal(read_image(path, orientation="stored"))


def test_tiff_tags_of_other_types_are_refused_or_read(tmp_path):
    """All types for each tag in turn; tag 273 (StripOffsets) must be an integer."""
    path = tmp_path / "a.tif"
    Image.new("RGB", (9, 7)).save(path)
    content = path.read_bytes()
    (begin,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, begin)
    refused = set()
    for entry in range(begin + 2, begin + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", content, entry)
        for kind in range(20):
            damaged = bytearray(content)
            struct.pack_into("<H", damaged, entry + 2, kind)
            path.write_bytes(damaged)
            with suppress(UserError):
                read_image(path)
                continue
            with one_line(UserError, path):
                read_image(path)
            refused.add((tag, kind))
    assert {(273, kind) for kind in (2, 5, 7, 11, 12)} <= refused


def test_tiff_is_always_upright(tmp_path):
    """Pillow has no way to its stored pixels."""
    Image.new("RGB", (16, 12)).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    assert read_image(tmp_path / "a.tif", orientation="upright").shape == (3, 16, 12)
    assert read_size(tmp_path / "a.tif", orientation="upright") == (16, 12)


def test_broken_exif_is_ignored(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_image(tmp_path / "a.jpg", orientation="auto").shape == (3, 12, 16)


def test_size_errors_name_exif_as_the_cause(tmp_path):
    save_turned(tmp_path / "a.jpg", 6)
    save_turned(tmp_path / "b.jpg", 1)
    assert "EXIF" in size_error(tmp_path / "a.jpg", (12, 16), (16, 12))
    assert "EXIF" not in size_error(tmp_path / "b.jpg", (12, 16), (16, 12))
    assert "EXIF" not in size_error(tmp_path / "a.jpg", (12, 16), (20, 20))


# Damaged and hostile files.


def test_png_that_ends_after_one_row(tmp_path):
    """The compressed data is whole in itself: Pillow leaves the other rows black."""
    path = tmp_path / "a.png"
    for color in (0, 2):
        path.write_bytes(png(8, 6, 1, color))
        with one_line(ValueError, path, "last rows"):
            read_image(path)
        path.write_bytes(png(8, 6, 5, color))
        with one_line(ValueError, path, "last rows"):
            read_stored_mask(path)
        path.write_bytes(png(8, 6, 6, color))
        assert (read_image(path) == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (9, 3)])
def test_png_with_black_last_rows(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 0).all()


def test_interlaced_png(tmp_path):
    """7 passes of 8, 8, 4, ...; of 1 x 1 pixels only the first has data."""
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 1, interlaced=1))
    assert (read_image(path) == 255).all()
    path.write_bytes(png(8, 8, 1, interlaced=1))
    with one_line(ValueError, path, "not a readable image"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_stored_mask])
def test_png_with_a_flipped_bit(tmp_path, read):
    """Pillow does not compare the checksums of the pixels."""
    path = tmp_path / "a.png"
    y, x = np.mgrid[:40, :50]
    Image.fromarray(((y // 8 + x // 9) % 5).astype(np.uint8)).save(path)
    content = path.read_bytes()
    for flip in range(8 * content.index(b"IDAT") + 32, 8 * content.index(b"IEND") - 32):
        changed = bytearray(content)
        changed[flip // 8] ^= 1 << flip % 8
        path.write_bytes(changed)
        with one_line(ValueError, path, "not a readable image"):
            read(path)
    path.write_bytes(content + b"behind the end" * 9)
    read(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".gif", ".ppm"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.95])
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_truncated_files(tmp_path, suffix, fraction):
    path = tmp_path / f"a{suffix}"
    save_image(path, 60, 80)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with one_line(ValueError, path, "not a readable image"):
        read_image(path)


WRITERS = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "deflated tiff": ("TIFF", {"compression": "tiff_deflate"}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_files_that_end_anywhere(tmp_path, kind):
    """Refused, or read completely: some formats do not end with pixel data."""
    name, options = WRITERS[kind]
    path = tmp_path / "a"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, name, **options)
    content, whole = path.read_bytes(), read_image(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with suppress(UserError):
            assert read_image(path).equal(whole), length


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_whose_data_end_early(tmp_path, mode):
    """The file itself is complete: the decoder fills the missing rows with gray."""
    path = tmp_path / "a.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    content = path.read_bytes()
    for fraction in (0.5, 0.8):
        path.write_bytes(content[: int(fraction * len(content))] + b"\xff\xd9")
        with one_line(ValueError, path, "the data of the last rows is missing"):
            read_image(path)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        Image.new(mode, (64, 60), "#808080").save(path, **options)
        path.write_bytes(path.read_bytes() + b"more behind the end")
        assert (read_image(path) == 128).all()


def test_small_file_with_too_many_pixels(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side, 1))
    for read in (read_image, read_labels, read_size):
        with one_line(ValueError, path, "pixels"):
            read(path)


def test_bound_does_not_depend_on_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    test_small_file_with_too_many_pixels(tmp_path)


def test_small_file_that_announces_gigabytes(tmp_path):
    content = bytearray(png(10, 10, 10))
    place = content.index(b"IDAT") - 4
    content[place : place + 4] = struct.pack(">I", 2**31 - 1)
    (tmp_path / "a.png").write_bytes(content)
    tracemalloc.start()
    try:
        with one_line(ValueError, tmp_path / "a.png", "not a readable image"):
            read_image(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_failing_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    save_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr("deformnet._files.BoundedReader.read", fail)
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    for name, read in (("a.png", read_image), ("a.png", read_size), ("a.json", read_json)):
        with pytest.raises(OSError, match="Input/output") as error:
            read(tmp_path / name)
        assert error.value.filename == str(tmp_path / name)


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for read in (read_image, read_json):
        with one_line(ValueError, tmp_path / "a.jpg", "pipe"):
            read(tmp_path / "a.jpg")


def test_folder_with_the_name_of_an_image(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path / "a.jpg")


# Folders.


def test_images_of_a_folder(tmp_path):
    for name in ("b.JPG", "a.Png", "x/c.gif", ".hidden/d.png", ".e.png", "notes.txt", "f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / name for name in ("a.Png", "b.JPG", "x/c.gif")]
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").touch()
    root = tmp_path / "set"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "elsewhere")
    (root / "two").symlink_to(tmp_path / "elsewhere")
    assert len(find_images(root)) == 2
    (root / "again").symlink_to(root)
    with one_line(ValueError, root / "again", "link"):
        list(walk_images(root))


def test_image_by_name(tmp_path):
    for name in ("cat.jpg", "cat 1.jpg", "a.b.PNG", "c.png", "c.jpg", "sub/d.tif"):
        save_image(tmp_path / name)
    folder = Folder(tmp_path)
    found = {
        "cat 1": "cat 1.jpg",
        "cat": "cat.jpg",
        "a.b": "a.b.PNG",
        "a.b.PNG": "a.b.PNG",
        "c": "c.jpg",
        "c.png": "c.png",
        "sub/d": "sub/d.tif",
    }
    for name, file in found.items():
        assert folder.find_image(name) == tmp_path / file
    for name in ("a", "d", "sub", "sub/e", "other/d", ""):
        assert folder.find_image(name) is None


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "..\\a", "C:\\a", "C:a"])
def test_names_that_leave_the_folder(tmp_path, name):
    with one_line(ValueError, "inside the data folder", repr(name)):
        inside(name)
    with one_line(ValueError, "inside the data folder"):
        Folder(tmp_path).find_image(name)


# JSON.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("", "not readable as JSON"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"a":' * 1_000_000, "nested too deeply"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e400]", "1e400"),
        ("[-1E+400]", "-1E+400"),
        (f"[{'9' * 400}]", "but got 99999999999999999999..."),
        (f"[{'9' * 9000}]", "but got 99999999999999999999..."),
        (f"[{'9' * 400}.5]", "but got 99999999999999999999..."),
    ],
)
def test_bad_json(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with one_line(ValueError, path, message):
        read_json(path)


def test_json_of_other_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": "ä"}'.encode("utf-16"))
    with one_line(ValueError, tmp_path / "a.json", "not readable as JSON"):
        read_json(tmp_path / "a.json")


def test_good_json(tmp_path):
    values = {"large": 10**300, "float": 1.5e300, "id": 2**62, "tiny": 1e-300, "name": "0e99"}
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == values
    assert read_json(tmp_path / "a.json", lambda entry: sorted(entry)) == sorted(values)


@pytest.mark.parametrize("step", ["PIL.ImageFile.ImageFile.load", "PIL.Image.Image.convert"])
def test_images_beyond_the_memory_are_named(tmp_path, monkeypatch, step):
    save_image(path := tmp_path / "a.png")
    monkeypatch.setattr(step, Mock(side_effect=MemoryError))
    with one_line(MemoryError, f"{path}: too large for the memory of this machine"):
        read_image(path)


def test_png_with_a_chunk_of_megabytes(tmp_path):
    """Noise, in one chunk: a read of its length returns no more."""
    pixels = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 700, 700, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    (tmp_path / "a.png").write_bytes(content + chunk(b"IEND", b""))
    assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0), pixels)
