"""Files of the YOLO layout: class names, splits, lists of images and labels."""

import reprlib
from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import yaml

from deformnet._errors import UserError
from deformnet._files import MAX_ANNOTATION_BYTES, matching, read_file, read_lines
from deformnet.data.files import (
    Folder,
    first_repeated,
    has_images,
    is_image,
    listing,
    subfolders,
)
from deformnet.data.layouts import Missing

FILES = "data.yaml, or images/ and labels/*.txt"
"""Files by which the layout is recognized, for messages."""

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES = ("classes.txt", "obj.names", "_darknet.labels")
"""Files with class names, one per line. labelImg and other tools write them next to the labels."""
_SPLIT_NAMES = ("train", "val", "test", "dev")
"""Prefixes of split names; other image folders are parts of a split."""
_SPLITS = ("train", "val", "valid", "test")
"""Keys of data.yaml and of darknet's .data files."""
_OTHER_KEYS = ("path", "names", "nc", "download", "kpt_shape", "flip_idx", "channels", "backup")

_MOST_YAML = 1 << 22  # bytes
_ROUNDING = 0.01  # tolerance of coordinates outside 0 to 1, as in ultralytics
_PEEKED = 1000  # number of files of a folder to inspect to recognize the layout

Config = Mapping[str, object]


class YOLOClasses(NamedTuple):
    """Class names and their origin."""

    names: tuple[str, ...]
    file: Path
    has_keypoints: bool = False
    """Whether lines with boxes end in keypoints."""


class YOLOObject(NamedTuple):
    """One line of a label file."""

    line: int
    label: int
    numbers: tuple[float, ...]
    """Center x, y, width and height of a box, or x, y of each corner of a polygon, as fractions of
    the width and height of the image."""

    @property
    def is_box(self) -> bool:
        return len(self.numbers) == 4

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Edges in pixels."""
        if self.is_box:
            x, y, w, h = self.numbers
            # Multiplied first, so that the edges of a box at the border are exactly 0.
            x, y, w, h = x * width, y * height, w * width / 2, h * height / 2
            return x - w, y - h, x + w, y + h
        xs, ys = self.numbers[::2], self.numbers[1::2]
        return min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height

    def polygon(self, height: int, width: int) -> np.ndarray:
        """Corners in pixels, float [n, 2]."""
        return np.array(self.numbers).reshape(-1, 2) * (width, height)


# Labels.


def read_objects(path: Path, classes: YOLOClasses) -> list[YOLOObject]:
    """Reads a label file.

    Raises:
        UserError: if a line is malformed, or has a class that does not exist.
    """
    lines = enumerate(read_labels(path), start=1)
    return [parse_line(path, number, line, classes) for number, line in lines]


def read_labels(path: Path) -> list[str]:
    """Lines of a label file.

    Raises:
        UserError: if it is not a text file.
    """
    if not path.is_file():  # reading a named pipe would block
        raise UserError(f"{path}: expected a label file, but got a folder, a pipe or a device")
    return read_lines(path, MAX_ANNOTATION_BYTES)


def parse_line(path: Path, number: int, line: str, classes: YOLOClasses) -> YOLOObject:
    """The object in a line of a label file.

    Raises:
        UserError: see `read_objects`.
    """
    where = f"{path}: line {number}"
    try:
        label, *numbers = map(float, line.split())
    except ValueError:
        raise UserError(f"{where}: expected numbers, but got {_short(line)!r}") from None
    count = len(classes.names)
    if not (0 <= label < count and label.is_integer()):
        raise UserError(
            f"{where}: expected a class from 0 to {count - 1}, as in {classes.file} "
            f"({listing(classes.names, 5)}), but got {label:g}; add its name to that file or "
            "correct the label"
        )
    if classes.has_keypoints:
        numbers = numbers[:4]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        more = "; a fifth is the confidence of a prediction" if len(numbers) == 5 else ""
        raise UserError(
            f"{where}: expected a class and 4 numbers of a box (x, y, width, height) or x, y of at "
            f"least 3 corners of a polygon, but got {len(numbers)} numbers after the class{more}"
        )
    wrong = [value for value in numbers if not -_ROUNDING <= value <= 1 + _ROUNDING]
    if wrong:
        raise UserError(
            f"{where}: expected fractions of the width and height of the image, 0 to 1, but got "
            f"{wrong[0]:g}; divide pixel coordinates by the image size"
        )
    return YOLOObject(number, int(label), tuple(numbers))


# Classes.


def read_classes(root: Path) -> YOLOClasses:
    """Class names in classes.txt if there is one, otherwise in data.yaml or obj.names.

    Raises:
        UserError: if there is no such file, or it is malformed.
    """
    path, config = _read_config(root)
    keypoints = bool(config.get("kpt_shape"))
    listed = _names_file(root)
    if listed is not None and (listed.name == "classes.txt" or "names" not in config):
        names = tuple(read_lines(listed))
        if not names:
            raise UserError(f"{listed}: expected class names, one per line, but found none")
        return YOLOClasses(_unique(listed, names), listed, keypoints)
    if path is None or not isinstance(config.get("names"), (list, dict)):
        raise UserError(
            f"{root}: expected class names in data.yaml, classes.txt or obj.names, but found none; "
            f"write them, one per line, to {root / 'classes.txt'}"
        )
    return YOLOClasses(_unique(path, _config_names(path, config)), path, keypoints)


def names_classes(root: Path) -> bool:
    """Whether a folder contains a file with class names."""
    return _names_file(root) is not None or bool(_read_config(root)[1].get("names"))


def _names_file(root: Path) -> Path | None:
    """The first file with class names: in `root`, next to the labels, or in a split."""
    places = [root, root / "labels", *sorted(matching(root, "*/labels/"))]
    places += [root / name for name in _SPLITS]
    return next(
        (place / name for place in places for name in _NAMES if (place / name).is_file()), None
    )


def _config_names(path: Path, config: Config) -> tuple[str, ...]:
    names = config["names"]
    if isinstance(names, dict):
        expected = [str(number) for number in range(len(names))]
        if sorted(names) != sorted(expected):
            raise UserError(
                f"{path}: expected names with keys from 0 to {len(names) - 1}, but got "
                f"{listing(list(map(str, names)), 5)}"
            )
        names = [names[number] for number in expected]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected names to be a list of strings, but got {_short(names)}")
    count = config.get("nc")
    if count not in (None, "", str(len(names))):
        raise UserError(f"{path}: expected {_short(count)} class names (nc), but got {len(names)}")
    return tuple(names)


def _unique(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := first_repeated(names):
        raise UserError(f"{path}: expected unique class names, but got {repeated!r} more than once")
    return names


# Splits.


def has_labels(root: Path) -> bool:
    """Whether a folder looks like this layout."""
    try:
        path, config = _read_config(root)
    except UserError:
        return True  # malformed data.yaml; the reader reports it
    if path is not None and any(config.get(key) for key in _SPLITS):
        return True
    # Label files in a label folder, or next to images if there is a file with class names.
    places = [root / "labels", *matching(root / "labels", "*/"), *matching(root, "*/labels/")]
    texts = (path for place in places for path in islice(matching(place, "*.txt"), _PEEKED))
    if any(map(is_label, texts)):
        return True
    return _names_file(root) is not None and any(map(_has_pairs, (root, *matching(root, "*/"))))


def is_label(path: Path) -> bool:
    """Whether a text file may contain labels, not class names."""
    return path.name not in _NAMES and path.is_file()


def _has_pairs(folder: Path) -> bool:
    """Whether one of the first images of a folder has a text file next to it."""
    images = islice((path for path in matching(folder, "*.*") if is_image(path.name)), _PEEKED)
    return any(path.with_suffix(".txt").is_file() for path in images)


def find_splits(root: Path) -> dict[str, list[Path]]:
    """Splits, with their folders or lists of images; entries of data.yaml may not exist.

    Raises:
        UserError: if data.yaml is malformed.
    """
    path, config = _read_config(root)
    base = config.get("path", "")
    if not isinstance(base, str):
        raise UserError(f"{path}: expected path to be a folder, but got {_short(base)}")
    splits: dict[str, list[Path]] = {}
    entries: dict[str, list[str]] = {}
    others = [key for key in config if key not in (*_SPLITS, *_OTHER_KEYS)]
    for key in (*_SPLITS, *others) if path is not None else ():
        texts = _texts(config.get(key) or [])
        if texts is None and key in _SPLITS:
            raise UserError(
                f"{path}: expected {key} to be folders or lists, but got {_short(config[key])}"
            )
        if texts:
            found = [_locate(root, base, text) for text in texts]
            if key in _SPLITS or all(map(_names_images, found)):
                splits[key], entries[key] = found, texts
    for one, other in combinations(splits, 2):
        if splits[one] == splits[other] and entries[one] != entries[other]:
            raise UserError(
                f"{path}: expected {one} and {other} to be folders or lists in {root}, but "
                f"{listing(entries[one], 2)} and {listing(entries[other], 2)} are not there"
            )
    return splits or _folders_of_images(root)


def _texts(value: object) -> list[str] | None:
    """Converts a string or list of strings to a list; None for anything else."""
    entries = value if isinstance(value, list) else [value]
    texts = [entry for entry in entries if isinstance(entry, str) and entry and "\0" not in entry]
    return texts if len(texts) == len(entries) else None


def _folders_of_images(root: Path) -> dict[str, list[Path]]:
    """Splits of a data set without data.yaml; `train` if there is only one image folder."""
    lists = [root / f"{name}.txt" for name in _SPLITS]
    if any(path.is_file() for path in lists) and (root / "obj.names").is_file():
        return {path.stem: [path] for path in lists if path.is_file()}
    folders = subfolders(root)
    images = root / "images"
    below = [path for path in sorted(matching(images, "*/")) if path.name.startswith(_SPLIT_NAMES)]
    return (
        {path.name: [path] for path in below if has_images(path)}
        or {path.name: [path / "images"] for path in folders if (path / "images").is_dir()}
        or {path.name: [path] for path in folders if path != images and _has_pairs(path)}
        or {"train": [images if images.is_dir() else root]}
    )


def _names_images(path: Path) -> bool:
    """Whether a path is a folder of images or a list of them."""
    if path.is_dir():
        return has_images(path)
    return path.suffix == ".txt" and any(
        is_image(_posix(line).name) for line in read_lines(path)[:1]
    )


def _locate(root: Path, base: str, entry: str) -> Path:
    """The folder or file in `root` that an entry of data.yaml refers to."""
    path = _posix(base) / _posix(entry)
    ends = [*_ends(root, path), *_ends(root, _posix(entry))]
    return next((end for end in ends if end.exists()), ends[0])


def _posix(path: str) -> PurePosixPath:
    return PurePosixPath(path.replace("\\", "/"))


def _ends(root: Path, path: PurePosixPath) -> list[Path]:
    """Files in `root` that match the last components of a path, longest match first, since the path
    may be from another machine or relative to another folder. `root` only for an empty path."""
    parts = path.parts
    start = max((i + 1 for i, part in enumerate(parts) if part in ("..", "/", "//")), default=0)
    return [root.joinpath(*parts[i:]) for i in range(start, len(parts))] or [root]


def listed_images(root: Path, source: Path) -> Iterator[Path | Missing]:
    """Images of a list, one path per line: relative to `root` or to the list, or from another
    machine, matched by their last components. Nothing outside `root` is read."""
    folders: dict[PurePosixPath, Folder] = {}
    for line in read_lines(source):
        path = _posix(line)
        if path.parent not in folders:
            places = [end for base in (source.parent, root) for end in _ends(base, path.parent)]
            place = next((place for place in places if place.is_dir()), root)
            folders[path.parent] = Folder(place)
        folder = folders[path.parent]
        yield folder.find(path.name) or Missing("images", (str(folder.path),), line)


# data.yaml, and the .data files of darknet.


def _read_config(root: Path) -> tuple[Path | None, Config]:
    """The file that describes a data set, and its entries; all numbers are strings.

    Raises:
        UserError: if a file named data.yaml does not describe a data set.
    """
    for path in (root / name for name in _YAML):
        if path.exists() and not path.is_dir():
            return path, _read_yaml(path)
    ends = "yaml", "yml", "data"
    for path in sorted(path for end in ends for path in matching(root, f"*.{end}")):
        try:
            config = _read_darknet(path) if path.suffix == ".data" else _read_yaml(path)
        except (UserError, OSError):
            continue  # from another program
        if "names" in config and any(key in config for key in _SPLITS):
            if isinstance(config["names"], str):  # a file name; that file is found anyway
                config = {key: value for key, value in config.items() if key != "names"}
            return path, config
    return None, {}


def _read_darknet(path: Path) -> Config:
    lines = (line.partition("=") for line in read_lines(path))
    return {key.strip(): value.strip() for key, _, value in lines}


def _read_yaml(path: Path) -> Config:
    if path.stat().st_size > _MOST_YAML:
        raise UserError(f"{path}: expected a description of a data set, but got a file over 4 MB")
    try:
        # Without type conversion: a class may be named `no` or `1e3`.
        content = yaml.load(read_file(path).decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not readable as YAML ({text})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, such as names: [cat, dog]")
    return content


def _short(value: object) -> str:
    # A few bytes of YAML, with aliases of aliases, can stand for gigabytes of text.
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
