"""Text report of a check."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deformnet._files import require_own, write_file
from deformnet._text import Table

SHOWN = 5
"""Number of faults per folder that the terminal shows."""

_FIRST_LINE = "# deformnet data check"
_REMARKS_SHOWN = 12
_CLASSES_SHOWN = 21
_LISTS_SHOWN = 6


@dataclass(frozen=True)
class ListSummary:
    """One list of images in the report.

    Attributes:
        name: such as VOC2007/Main/trainval.
        images: number of its images.
        official: number of images in the official list; None if there is none.
        missing: number of required files that do not exist.
        faulty: number of its images that are damaged or do not match their annotation.
        rotated: number of its images with an EXIF orientation other than upright.
        empty: number of its images without objects or labeled pixels.
        classes: class names; empty if there are no annotations.
        unit: what `counts` counts: objects, pixels or images.
        counts: number of objects, pixels or images of each class, by its index.
    """

    name: str
    images: int
    official: int | None
    missing: int
    faulty: int
    rotated: int
    empty: int
    classes: tuple[str, ...]
    unit: str
    counts: Counter[int]

    def class_counts(self) -> dict[str, int]:
        """Number of objects, pixels or images of each class, without ignored and void ones."""
        return {name: self.counts[label] for label, name in enumerate(self.classes)}


@dataclass(frozen=True)
class DataReport:
    """Result of `check_data`; as text, a few tables and lines of problems.

    Attributes:
        root: the folder, or the images and annotations.
        layouts: layouts of the data sets that were found, with their folders.
        lists: lists that were found.
        problems: one line per problem.
        remarks: one line per finding that is harmless, or that only the user can judge.
        summary: `problems` for a terminal: one line for the missing files of a folder, and the
            first few of its other problems.
        notes: number of `remarks` (the first ones) about whole lists.
        advice: suggested next steps.
        checked: number of images that were read.
        remembered: number of images recorded as valid by an earlier check.
        file: file of the full report.
    """

    root: str
    layouts: tuple[str, ...]
    lists: tuple[ListSummary, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    summary: tuple[str, ...]
    notes: int
    advice: tuple[str, ...]
    checked: int
    remembered: int
    file: Path

    @property
    def ok(self) -> bool:
        """Whether there are no problems; remarks do not count."""
        return not self.problems

    def __str__(self) -> str:
        notes, others = self.remarks[: self.notes], self.remarks[self.notes :]
        remarks = [*first(notes, "remarks", _REMARKS_SHOWN), *first(others, "remarks on files")]
        verdict = "no problems" if self.ok else f"{len(self.problems)} problems"
        counts = f"{self.checked} images checked, {self.remembered} known from an earlier check"
        return "\n".join(
            [
                *self._tables(_CLASSES_SHOWN),
                *(["", "Problems:", *self.summary] if self.summary else []),
                *(["", "Remarks:", *remarks] if remarks else []),
                "",
                f"{self.root}: {verdict} ({counts}); full report: {self.file}",
                *self.advice,
            ]
        )

    def write(self) -> None:
        """Writes all lines into `file`.

        Raises:
            UserError: if `file` exists and is not a report of an earlier check.
        """
        require_report(self.file)
        lines = [f"{_FIRST_LINE} of {self.root}", *self._tables(None), "", "Problems:"]
        lines += [*self.problems, "", "Remarks:", *self.remarks]
        write_file(self.file, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))

    def _tables(self, limit: int | None) -> list[str]:
        """Lines of the tables, with at most `limit` classes."""
        tables = [str(self._lists())]
        units = dict.fromkeys(one.unit for one in self.lists if one.classes)
        for unit in units:
            lists = [one for one in self.lists if one.unit == unit and one.classes]
            shown = lists if limit is None else lists[:_LISTS_SHOWN]
            tables.append(str(_class_table(unit, shown, limit)))
            if len(shown) < len(lists):
                tables[-1] += f"\n(the report has {len(lists) - len(shown)} more lists)"
        text = f"Found {', '.join(self.layouts)}\n\n" + "\n\n".join(tables)
        return text.splitlines()

    def _lists(self) -> Table:
        """One row per list; columns with only zeros are omitted."""
        columns: list[tuple[str, Callable[[ListSummary], int | None], bool]] = [
            ("images", lambda one: one.images, True),
            ("official", lambda one: one.official, False),
            ("missing", lambda one: one.missing, True),
            ("faulty", lambda one: one.faulty, True),
            ("rotated", lambda one: one.rotated, False),
            ("objects", _objects, False),
            ("empty", lambda one: one.empty if one.classes else None, False),
        ]
        used = [
            (name, value)
            for name, value, always in columns
            if always or any(value(one) for one in self.lists)
        ]
        rows = [(one.name, *(_cell(value(one)) for _, value in used)) for one in self.lists]
        return Table("", ("list", *(name for name, _ in used)), rows)


def require_report(path: Path) -> None:
    """Checks that a file is new or a report of an earlier check.

    Raises:
        UserError: if it is another file, which is not changed.
    """
    require_own(path, "the report of an earlier check", _is_report)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode()


def first(lines: Sequence[str], of: str, limit: int = SHOWN) -> list[str]:
    """The lines that the terminal shows."""
    more = [f"... and {len(lines) - limit} more {of}"] if len(lines) > limit else []
    return [*lines[:limit], *more]


def _objects(one: ListSummary) -> int | None:
    return one.counts.total() if one.classes and one.unit == "objects" else None


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


def _class_table(unit: str, lists: Sequence[ListSummary], limit: int | None) -> Table:
    """Objects, percentage of pixels, or images of the most frequent classes, in label order."""
    counts = [one.class_counts() for one in lists]
    names = list(dict.fromkeys(name for classes in counts for name in classes))
    shown = names
    if limit is not None and len(names) > limit:
        sums = {
            name: sum(it.get(name, 0) / max(sum(it.values()), 1) for it in counts) for name in names
        }
        common = set(sorted(names, key=lambda name: -sums[name])[:limit])
        shown = [name for name in names if name in common]
    title = "% of pixels" if unit == "pixels" else unit
    rows = [(name, *(_class_cell(unit, name, it) for it in counts)) for name in shown]
    if len(shown) < len(names):
        rows.append((f"{len(names) - len(shown)} more", *(_rest(unit, shown, it) for it in counts)))
    ends = [one.name.rpartition("/")[2] for one in lists]
    is_clear = len(set(ends)) == len(ends)
    return Table("", (title, *(ends if is_clear else [one.name for one in lists])), rows)


def _class_cell(unit: str, name: str, counts: dict[str, int]) -> str:
    if name not in counts:
        return "-"
    if unit != "pixels" or not counts[name]:
        return str(counts[name])
    return f"{max(100 * counts[name] / sum(counts.values()), 0.01):.2f}"


def _rest(unit: str, shown: Sequence[str], counts: dict[str, int]) -> str:
    rest = sum(count for name, count in counts.items() if name not in shown)
    return _class_cell(unit, "", {"": rest, "shown": sum(counts.values()) - rest})
