"""Lines of a report about files, lists and classes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from deformnet.data.check.duplicates import find_duplicates, role
from deformnet.data.check.official import OFFICIAL_SETS
from deformnet.data.check.report import ListSummary, first
from deformnet.data.files import listing
from deformnet.data.items import Fault
from deformnet.data.layouts import ImageList, Missing

_ONE = {"objects": "box", "pixels": "mask", "images": "folder"}


def note_nothing_to_learn(images: ImageList, summary: ListSummary) -> None:
    """Adds a fault to a list whose annotations are readable but have nothing to train on."""
    counts = summary.class_counts()
    annotated = images.pair_item is None or bool(images.pairs)
    if not counts or not annotated or summary.faulty or summary.missing or not images.entries:
        return
    is_test = role(images) == {"test"}
    present = [name for name, count in counts.items() if count]
    if not present and summary.unit == "objects":
        images.fault(
            f"nothing to learn from: its {images.entries} images have no objects, except ignored "
            "ones and boxes without area",
            is_remark=is_test,
        )
    elif summary.unit == "pixels" and present == ["background"]:
        images.fault(
            "nothing to learn from: all pixels of its masks are background or void",
            is_remark=is_test,
        )


def list_notes(
    lists: Sequence[ImageList],
    summaries: Sequence[ListSummary],
    fingerprints: Mapping[str, int | None],
) -> list[str]:
    """Remarks about whole lists: absent and similar classes, rotated images, shared images."""
    shared = find_duplicates(_groups(lists), fingerprints)
    similar = _similar_classes(lists)
    return [*_absent_classes(summaries), *similar, *_rotated(summaries), *shared]


def _similar_classes(lists: Sequence[ImageList]) -> Iterator[str]:
    """A line for class names that differ only in case or blanks, as misspelled ones do."""
    names: dict[str, set[str]] = {}
    for name in {name for images in lists for name in images.classes}:
        names.setdefault("".join(name.casefold().split()), set()).add(name)
    for same in names.values():
        if len(same) > 1:
            yield f"classes {listing(sorted(same))} differ only in case or blanks; are they one?"


def _absent_classes(summaries: Sequence[ListSummary]) -> Iterator[str]:
    """A line for lists that lack the same classes."""
    lacking: dict[tuple[str, tuple[str, ...]], list[ListSummary]] = {}
    for one in summaries:
        counts = one.class_counts()
        absent = tuple(name for name, count in counts.items() if not count)
        if absent and len(absent) < len(counts):
            lacking.setdefault((one.unit, absent), []).append(one)
    for (unit, absent), lists in lacking.items():
        names = listing([one.name for one in lists], 3)
        total = max(len(one.classes) for one in lists)
        verb = "is" if len(absent) == 1 else "are"
        count = f"{len(absent)} of {total} classes {verb}"
        yield f"{names}: {count} in no {_ONE[unit]}: {listing(absent, 5)}"


def _rotated(summaries: Sequence[ListSummary]) -> Iterator[str]:
    for one in summaries:
        if one.rotated:
            yield (
                f"{one.name}: {one.rotated} of {one.images} images have an EXIF orientation; they "
                "are read upright, or as stored where only that fits the annotated size"
            )


def _groups(lists: Iterable[ImageList]) -> Iterable[Sequence[ImageList]]:
    """Lists of the same data set and kind."""
    groups: dict[tuple[str, str], list[ImageList]] = {}
    for images in lists:
        kind = images.title.rpartition("/")[0] if "/" in images.title else ""
        groups.setdefault((kind, images.unit), []).append(images)
    return groups.values()


def missing_lines(root: Path, lists: Sequence[ImageList]) -> tuple[list[str], list[str]]:
    """Lines for missing files, all and by folder; a file that several lists need appears once."""
    problems: list[str] = []
    summary: list[str] = []
    seen: set[Missing] = set()
    for images in lists:
        by_folder: dict[tuple[str, str], list[Missing]] = {}
        for missing in images.missing:
            if missing not in seen:
                by_folder.setdefault((missing.kind, missing.folders[0]), []).append(missing)
        for (kind, folder), files in by_folder.items():
            seen.update(files)
            place = _relative(folder, root)
            summary.append(
                f"{place}: {len(files)} of {images.entries} {kind} of {images.title} are "
                f"missing, the first is {files[0].name}"
            )
            problems += [
                f"{place}/{file.name}: missing, listed in {images.title}" for file in files
            ]
    return problems, summary


def fault_lines(root: Path, faults: Iterable[Fault]) -> tuple[list[str], list[str], list[str]]:
    """Lines for faults: all problems, the problems to show in a terminal, and remarks."""
    by_folder: dict[str, list[str]] = {}
    remarks: list[str] = []
    for fault in faults:
        line = f"{_relative(fault.file, root)}: {fault.text}"
        if fault.is_remark:
            remarks.append(line)
        else:
            by_folder.setdefault(_relative(str(Path(fault.file).parent), root), []).append(line)
    summary: list[str] = []
    for folder, lines in by_folder.items():
        summary += first(lines, f"in {folder}")
    return [line for lines in by_folder.values() for line in lines], summary, remarks


def absent_lists(lists: Sequence[ImageList]) -> list[str]:
    """Lines for official lists that are absent from an official data set."""
    present = {images.name for images in lists if images.official is not None}
    return [
        f"{name} of {official.name} ({count} images) is absent"
        for official in OFFICIAL_SETS
        if present & official.counts.keys()
        for name, count in official.counts.items()
        if name not in present
    ]


def _relative(file: str, root: Path) -> str:
    """The path relative to `root` if it is inside, otherwise the path."""
    path = Path(file)
    return str(path.relative_to(root)) if path.is_relative_to(root) else file
