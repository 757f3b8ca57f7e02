"""Class names and colors of masks, as annotation tools write them beside the masks."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

from deformnet._errors import UserError
from deformnet._files import read_lines
from deformnet.data.base import IGNORE
from deformnet.data.files import first_repeated
from deformnet.data.voc_files import color_map

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

Colors = tuple[tuple[Color, int], ...]
"""Colors and their labels; several may have the same label."""

CLASS_FILES = (
    "classes.txt",
    "labelmap.txt",  # CVAT, Datumaro
    "class_names.txt",  # labelme
    "_classes.csv",  # Roboflow
    "class_dict.csv",  # CamVid on Kaggle
    "label_colors.txt",  # CamVid
    "palette.txt",
    "palette.csv",
    "classes.csv",
)
"""Class files; the first one that exists is used."""

VOID_COLOR: Color = (224, 224, 192)
"""Color of void pixels in VOC's masks."""

_VOID = {"void", "ignore", "__ignore__"}
_CVAT = re.compile(r"(?P<name>[^:].*?)\s*:\s*(?P<color>[^:]*):[^:]*:[^:]*")
_SEPARATORS = re.compile(r"[,;\t]")


class ClassFile(NamedTuple):
    """Classes of masks, from a class file.

    The names `void` and `ignore` are not classes: their pixels are void.
    """

    file: Path
    names: tuple[str, ...]
    colors: Colors = ()
    """Colors of the classes; empty if the file has only names."""
    ids: tuple[tuple[int, int], ...] = ()
    """Stored ids and their labels; empty if the id of a class is its index."""


class _Entry(NamedTuple):
    name: str
    color: Color | None = None
    id: int | None = None


def find_class_file(folders: Iterable[Path]) -> ClassFile | None:
    """Reads the first of `CLASS_FILES` in the first of `folders` that contains one.

    Raises:
        UserError: if the file is malformed.
    """
    files = (folder / name for folder in folders for name in CLASS_FILES)
    path = next((path for path in files if path.is_file()), None)
    return None if path is None else read_class_file(path)


def read_class_file(path: Path) -> ClassFile:
    """Reads class names, one per line, with or without their colors.

    A line is a name; `name:r,g,b:parts:actions`, as in CVAT's labelmap.txt, where a class without a
    color has VOC's color of its index; `name r g b` or `r g b name`, separated by blanks, commas,
    semicolons or tabs, with an optional id in front; or, in a .csv file, `id, name`. Lines that
    begin with # are comments, and the first line of a .csv file may be a header.

    Raises:
        UserError: if the file is malformed: no class, a repeated name or color, a color outside
            0 to 255, or colors in only some of the lines.
    """
    lines = [line for line in read_lines(path) if not line.startswith("#")]
    entries = _read_cvat(path, lines) or _read_table(path, lines)
    if not entries:
        entries = [_Entry(line) for line in lines]
        _require_once(path, [entry.name for entry in entries])
    content = _class_file(path, entries)
    if not content.names:
        raise UserError(f"{path}: expected class names, one per line, but found none")
    if len(content.names) > IGNORE:
        raise UserError(
            f"{path}: expected at most {IGNORE} classes, the maximum of 8-bit masks, "
            f"but got {len(content.names)}"
        )
    return content


def voc_colors(count: int) -> Colors:
    """VOC's colors of labels 0 to `count` - 1, and of void."""
    colors = color_map()[:count].tolist()
    named = tuple(((r, g, b), label) for label, (r, g, b) in enumerate(colors))
    return (*named, (VOID_COLOR, IGNORE))


def color_of(code: int) -> Color:
    """The color with a code."""
    return code >> 16, code >> 8 & 255, code & 255


def _read_cvat(path: Path, lines: Sequence[str]) -> list[_Entry]:
    """Entries in CVAT's format, or none."""
    matches = [_CVAT.fullmatch(line) for line in lines]
    if not all(matches):
        return []
    entries: list[_Entry] = []
    for number, match in enumerate(filter(None, matches)):
        text = match["color"].strip()
        default = color_map()[number % 256].tolist()
        values = text.split(",") if text else default
        entries.append(_Entry(match["name"], _color(path, match.string, values)))
    return entries


def _read_table(path: Path, lines: Sequence[str]) -> list[_Entry]:
    """Entries in lines that all have a name and 3 or 4 numbers (or, in a .csv, an id), or none."""
    rows = [_split(line) for line in lines]
    is_csv = path.suffix.lower() == ".csv"
    if is_csv and len(rows) > 1 and not (rows[0][0] or rows[0][2]):
        lines, rows = lines[1:], rows[1:]  # header
    if is_csv and rows and all(len(first) == 1 and name and not last for first, name, last in rows):
        return [_Entry(name, id=int(first[0])) for first, name, _ in rows]
    complete = [bool(name) and len(first) + len(last) in (3, 4) for first, name, last in rows]
    if not any(complete):
        return []
    if not all(complete):
        line = lines[complete.index(False)]
        raise UserError(f"{path}: expected 'name r g b' in each line, but got {line!r}")
    entries: list[_Entry] = []
    for line, (first, name, last) in zip(lines, rows, strict=True):
        numbers = [*first, *last]
        number = None
        if len(numbers) == 4:
            number = int(numbers.pop(0 if len(first) in (1, 4) else -1))
        entries.append(_Entry(name, _color(path, line, numbers), number))
    return entries


def _split(line: str) -> tuple[list[str], str, list[str]]:
    """Numbers before the name, the name, and numbers after it."""
    fields = _SEPARATORS.split(line) if _SEPARATORS.search(line) else line.split()
    parts = (field.strip().strip('"').strip() for field in fields)
    # Numbers may be separated by blanks even if the name is separated by a tab.
    split = (part.split() if _is_number(part.replace(" ", "")) else [part] for part in parts)
    fields = list(chain.from_iterable(split))
    first = list(takewhile(_is_number, fields))
    rest = fields[len(first) :]
    last = list(takewhile(_is_number, reversed(rest)))[::-1]
    return first, " ".join(rest[: len(rest) - len(last)]), last


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _color(path: Path, line: str, values: Sequence[str | int]) -> Color:
    texts = [str(value).strip() for value in values]
    if len(texts) != 3 or not all(_is_number(text) and int(text) < 256 for text in texts):
        raise UserError(f"{path}: expected a color of 3 numbers from 0 to 255, but got {line!r}")
    red, green, blue = map(int, texts)
    return red, green, blue


def _require_once(path: Path, names: Sequence[str]) -> None:
    if repeated := first_repeated(names):
        raise UserError(f"{path}: expected unique class names, but got {repeated!r} more than once")


def _class_file(path: Path, entries: Sequence[_Entry]) -> ClassFile:
    names = [_usual_name(entry.name) for entry in entries]
    classes = tuple(dict.fromkeys(name for name in names if name.lower() not in _VOID))
    labels = [IGNORE if name.lower() in _VOID else classes.index(name) for name in names]
    colors: dict[Color, int] = {}
    for entry, name, label in zip(entries, names, labels, strict=True):
        if entry.color is None:
            continue
        if colors.setdefault(entry.color, label) != label:
            other = names[labels.index(colors[entry.color])]
            raise UserError(
                f"{path}: expected a color for each class, but {other} and {name} both have "
                f"{entry.color}"
            )
    if colors:
        colors.setdefault(VOID_COLOR, IGNORE)
    return ClassFile(path, classes, tuple(colors.items()), _ids(path, entries, labels))


def _ids(
    path: Path, entries: Sequence[_Entry], labels: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Stored ids and their labels, if the ids are not the line numbers."""
    numbers = [place if entry.id is None else entry.id for place, entry in enumerate(entries)]
    if len(set(numbers)) < len(numbers) or max(numbers, default=0) > IGNORE:
        raise UserError(f"{path}: expected a unique id from 0 to {IGNORE} for each class")
    pairs = tuple(zip(numbers, labels, strict=True))
    return () if all(number == label for number, label in pairs) else pairs


def _usual_name(name: str) -> str:
    return "background" if name == "_background_" else name
