"""Reading of masks that store class ids, 0 and 255, or colors, as class ids."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deformnet._errors import UserError
from deformnet.data.base import IGNORE
from deformnet.data.files import StoredMask, listing, log_once, read_stored_mask
from deformnet.data.layouts import ImageList
from deformnet.data.palette import ClassFile, Color, Colors, color_of, voc_colors
from deformnet.data.voc_files import VOC_CLASSES

SAMPLED = 100
"""Number of masks to read to find out how masks store classes."""

IDENTITY = bytes(range(256))
"""Table of masks that store labels."""

_BINARY = {0, IGNORE}
_UNKNOWN = 254
_BINARY_TABLE = bytes([0, *[_UNKNOWN] * 254, 1])
_BINARY_CLASSES = ("background", "object")
_NO_LABEL = -1


@dataclass(frozen=True)
class MaskReader:
    """Reads masks as labels.

    Attributes:
        classes: class names; their indices are the labels.
        expected: expected content of masks, for messages.
        advice: advice for a label or a color without a class, for messages.
        table: class (or IGNORE) of every stored id. Other values mark invalid ids.
        colors: classes of colors; empty for masks that store ids.
        note: remark on how the masks are read, if any.
        void_advice: advice for a data set in which all pixels are void, for messages.
    """

    classes: tuple[str, ...]
    expected: str
    advice: str
    table: bytes = IDENTITY
    colors: Colors = ()
    note: str = ""
    void_advice: str = "correct the masks, or leave out the split"

    def read(self, path: Path) -> Tensor:
        """Reads a mask.

        Returns:
            uint8 [H, W], labels below `len(classes)` or IGNORE
        Raises:
            FileNotFoundError: if the file does not exist.
            UserError: if the file is unreadable, or has an id or a color without a class.
        """
        stored = read_stored_mask(path)
        labels = self._by_color(path, stored) if self.colors else self._by_id(path, stored)
        return torch.from_numpy(labels)

    def _by_id(self, path: Path, stored: StoredMask) -> np.ndarray:
        ids = stored.ids()
        if ids is None:
            color = color_of(_first_colored(stored))
            raise UserError(
                f"{path}: expected class ids, {self.expected}, but got mode {stored.mode} with "
                f"colors such as {color}; use either ids or colors in all masks of a data set"
            )
        labels = np.frombuffer(self.table, np.uint8)[ids]
        wrong = (labels >= len(self.classes)) & (labels != IGNORE)
        if wrong.any():
            unknown = [str(number) for number in np.unique(ids[wrong]).tolist()]
            message = self._message(path, f"label {listing(unknown, 5)}")
            if unknown == [str(len(self.classes))] and self.classes[0] != "background":
                message += ", or, if id 0 is the background, insert 'background' as its first line"
            raise UserError(message)
        return labels

    def _by_color(self, path: Path, stored: StoredMask) -> np.ndarray:
        codes = stored.codes()
        labels = find_labels(codes, self.colors)
        wrong = labels == _NO_LABEL
        if wrong.any():
            unknown, counts = np.unique(codes[wrong], return_counts=True)
            first = counts.argmax()
            more = f" and {len(unknown) - 1} more colors" if len(unknown) > 1 else ""
            text = f"color {color_of(int(unknown[first]))} in {counts[first]} pixels{more}"
            raise UserError(self._message(path, text))
        return labels.astype(np.uint8)

    def _message(self, path: Path, got: str) -> str:
        return f"{path}: expected {self.expected}, but got {got}; {self.advice}{_if_jpeg(path)}"


def _if_jpeg(mask: Path) -> str:
    """Advice for messages about masks in JPEG files."""
    is_jpeg = mask.suffix.lower() in (".jpg", ".jpeg")
    return "; JPEG changes values, so save masks as PNG" if is_jpeg else ""


def note_void(images: ImageList, reader: MaskReader, *, is_remark: bool = False) -> None:
    """Adds a fault to a list if all pixels of its masks are void. Reads masks until one has a
    labeled pixel."""
    for _, mask in images.pairs:
        try:
            labels = reader.read(mask)
        except (ValueError, OSError):
            return  # reported with the mask
        if (labels != IGNORE).any():
            return
    if images.pairs:
        images.fault(f"all pixels of its masks are void; {reader.void_advice}", is_remark=is_remark)


def find_labels(codes: np.ndarray, colors: Colors) -> np.ndarray:
    """Labels of color codes, int16; -1 for a color without a label."""
    known = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in colors)
    sorted_codes, labels = (np.array(values) for values in zip(*known, strict=True))
    places = np.searchsorted(sorted_codes, codes).clip(max=len(known) - 1)
    return np.where(sorted_codes[places] == codes, labels[places], _NO_LABEL).astype(np.int16)


def choose_reader(
    masks: Iterable[Path],
    content: ClassFile | None,
    *,
    file: Path,
    default: tuple[str, ...] | None = None,
) -> MaskReader:
    """Determines how masks store their classes, from a class file and the first masks.

    If the file lists colors and the masks use them, they define the classes. Other masks with
    colors use VOC's colors. Masks with only 0 and 255 are binary if there are two classes or the
    classes are unknown: 255 is then label 1. All other masks store labels; `background` is
    prepended to class names that omit it.

    Args:
        masks: all masks, in an order that is the same for every split.
        content: the content of the class file, if there is one.
        file: the class file, which may be missing, for messages.
        default: classes of masks with ids if there is no class file.
    Raises:
        UserError: if the masks have unknown colors, only 0 and 255 although there are more than two
            classes, or ids without a class name.
    """
    masks = _Once(masks)
    if content is not None and content.colors and _have_colors(masks, content.colors):
        return _color_reader(content.names, content.colors, f"in {content.file}", content.file)
    if content is not None and content.ids and not content.colors:
        return _table_reader(content)
    names = None if content is None else content.names
    survey = _survey(masks, default if names is None else names, is_default=names is None)
    if survey.colors:
        return _voc_color_reader(survey, names, file)
    if survey.ids == _BINARY:
        return _binary_reader(names, file)
    if names is not None:
        return _id_reader(_with_background(names, survey.ids), f"in {file}", file)
    if default is not None:
        return _id_reader(default, "of PASCAL VOC", file, is_default=True)
    highest = max(survey.ids - {IGNORE}, default=0)
    if highest <= 1:
        return _id_reader(_BINARY_CLASSES, "of binary masks", file, is_default=True)
    raise UserError(
        f"{file}: no such file; expected class names, one per line from id 0, since the masks "
        f"contain ids up to {highest}; if the ids number objects, save class ids instead"
        f"{_if_jpeg(next(iter(masks)))}"
    )


class _Once(Iterable[Path]):
    """Re-iterable sequence of files that are listed only when needed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._rest = iter(paths)
        self._known: list[Path] = []

    def __iter__(self) -> Iterator[Path]:
        yield from self._known
        for path in self._rest:
            self._known.append(path)
            yield path


@dataclass
class _Survey:
    """Content of the first masks."""

    ids: set[int]
    colors: dict[Color, tuple[int, Path]]
    """Colors of masks that are not gray, with the number of pixels and first file of each."""


def _survey(masks: Iterable[Path], names: tuple[str, ...] | None, *, is_default: bool) -> _Survey:
    """Reads masks until their content is clear: often a single mask, at most `SAMPLED`, or all
    masks as long as they contain only 255."""
    survey = _Survey(set(), {})
    asks_count = names is not None and names[0] != "background" and names != VOC_CLASSES[1:]
    for number, path in enumerate(masks):
        one_sided = survey.ids == {IGNORE} or (
            survey.ids == _BINARY and not is_default and names is not None and len(names) > 2
        )
        if number >= SAMPLED and not one_sided:
            break
        _add(survey, path)
        if survey.colors or survey.ids <= _BINARY or names is None:
            continue
        if not asks_count or len(names) in survey.ids:
            break
    return survey


def _add(survey: _Survey, path: Path) -> None:
    try:
        stored = read_stored_mask(path)
    except (ValueError, OSError):
        return  # reported when the sample itself is read
    ids = stored.ids()
    if ids is not None:
        survey.ids.update(np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist())
        return
    codes, counts = np.unique(stored.codes(), return_counts=True)
    for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
        survey.colors.setdefault(color_of(code), (count, path))


def _have_colors(masks: Iterable[Path], colors: Colors) -> bool:
    """Whether masks store colors, judged by the first mask that is not gray or has two values."""
    known = True
    for path in islice(masks, SAMPLED):
        try:
            stored = read_stored_mask(path)
        except (ValueError, OSError):
            continue
        if stored.ids() is None:
            return True
        values = np.unique(stored.codes())
        known = not (find_labels(values, colors) == _NO_LABEL).any()
        if len(values) > 1:
            return known
    return known


def _id_reader(
    names: tuple[str, ...], origin: str, file: Path, *, is_default: bool = False
) -> MaskReader:
    advice = "add the class to that file or correct the annotation"
    if is_default:
        advice = f"for other classes, write the class names, one per line, to {file}"
    count = len(names)
    return MaskReader(
        names,
        f"labels of the {count} classes {origin} (0 to {count - 1}; {IGNORE} is void)",
        advice,
    )


def _with_background(names: tuple[str, ...], ids: set[int]) -> tuple[str, ...]:
    omitted = names[0] != "background" and (names == VOC_CLASSES[1:] or len(names) in ids)
    return ("background", *names) if omitted else names


def _table_reader(content: ClassFile) -> MaskReader:
    table = bytearray([_UNKNOWN] * 256)
    table[IGNORE] = IGNORE
    for number, label in content.ids:
        table[number] = label
    numbers = [str(number) for number, _ in content.ids]
    return MaskReader(
        content.names,
        f"the ids in {content.file} ({listing(numbers, 10)}; {IGNORE} is void)",
        "add the id to that file or correct the mask",
        bytes(table),
    )


def _binary_reader(names: tuple[str, ...] | None, file: Path) -> MaskReader:
    classes = _BINARY_CLASSES if names is None else names
    if len(classes) == 1 and classes[0] != "background":
        classes = ("background", *classes)
    if len(classes) != 2:
        raise UserError(
            f"{file}: expected ids of {len(classes)} classes in the masks, but they contain only 0 "
            "and 255, and 255 is void; with two names, 0 and 255 are read as the first and second "
            f"class; for {len(classes)} classes, store ids from 0 to {len(classes) - 1}"
        )
    note = f"masks contain only 0 and 255: 255 is read as label 1, {classes[1]}"
    log_once(logging.INFO, f"{file.parent}: {note}")
    return MaskReader(
        classes,
        "only 0 and 255, as in the other masks",
        f"if 255 is void, list all classes in {file}",
        _BINARY_TABLE,
        note=note,
    )


def _color_reader(names: tuple[str, ...], colors: Colors, origin: str, file: Path) -> MaskReader:
    advice = f"add its class and color to {file}, or correct the mask (resizing mixes colors)"
    return MaskReader(names, f"colors of the {len(names)} classes {origin}", advice, colors=colors)


def _voc_color_reader(survey: _Survey, names: tuple[str, ...] | None, file: Path) -> MaskReader:
    classes = VOC_CLASSES if names is None else _objects_with_background(names)
    colors = voc_colors(len(classes))
    known = {color for color, _ in colors}
    for color, (count, path) in survey.colors.items():
        if color not in known:
            raise UserError(
                f"{path}: expected class ids, or VOC's colors of {len(classes)} classes, but got "
                f"color {color} in {count} pixels; write a line 'name r g b' for each class to "
                f"{file}, or put CVAT's labelmap.txt there"
            )
    return _color_reader(classes, colors, "by VOC's color map", file)


def _objects_with_background(names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names for VOC's color map, in which black is the background."""
    return names if names[0] == "background" else ("background", *names)


def _first_colored(stored: StoredMask) -> int:
    pixels = stored.pixels
    colored = (pixels != pixels[..., :1]).any(-1)
    return int(stored.codes()[colored][0])
