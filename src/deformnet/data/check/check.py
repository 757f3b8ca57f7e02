"""Looking at every file of the data sets in a folder, in parallel; going on where it stopped."""

import hashlib
import json
import os
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from deformnet.data.base import require_folder
from deformnet.data.check.items import Fault, Item
from deformnet.data.check.lists import ImageList, Missing, find_lists
from deformnet.data.check.official import OFFICIAL_SETS
from deformnet._files import replacing

_AT_ONCE = 16  # items that a process is handed at a time
_SHOWN = 5  # faults of a folder that the terminal shows


@dataclass(frozen=True)
class ListSummary:
    """One list of images in the report.

    Attributes:
        name: such as VOC2007/Main/trainval.
        images: how many it lists.
        official: how many the official list has; None if there is none.
        missing: files that it wants and that are not there.
        faulty: of its images, those that are damaged or do not fit their annotation.
    """

    name: str
    images: int
    official: int | None
    missing: int
    faulty: int


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found; as text it is a table and what is wrong, in a few lines.

    Attributes:
        root: the folder.
        lists: those found.
        problems: a line for each thing that is wrong.
        remarks: a line for each box that readers leave out, and each official list that is absent.
        summary: `problems` in lines for a terminal: files of a folder that are missing are one, and
            of other problems in a folder the first few are given.
        checked: images that were looked at.
        remembered: images known to be good from an earlier check.
        file: where the report is written with all lines.
    """

    root: Path
    lists: tuple[ListSummary, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    summary: tuple[str, ...]
    checked: int
    remembered: int
    file: Path

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Remarks are not."""
        return not self.problems

    def __str__(self) -> str:
        remarks = [*self.remarks[:_SHOWN]]
        if len(self.remarks) > _SHOWN:
            remarks.append(f"... and {len(self.remarks) - _SHOWN} more remarks")
        verdict = "all is well" if self.ok else f"{len(self.problems)} problems"
        counts = f"{self.checked} images checked, {self.remembered} known to be good"
        return "\n".join(
            [
                *_table(self.lists),
                *(["", "Problems:", *self.summary] if self.summary else []),
                *(["", "Remarks:", *remarks] if remarks else []),
                "",
                f"{self.root}: {verdict} ({counts}); every line: {self.file}",
            ]
        )


def check_data(
    root: Path,
    *,
    own: bool = False,
    workers: int | None = None,
    record: Path | None = None,
    report: Path | None = None,
    progress: bool = True,
) -> DataReport:
    """Checks the data sets in a folder: that they are whole, and every file.

    Sets in the layouts of VOC, COCO, Cityscapes and ImageNet are found in the folder and one folder
    below. Lists that bear the name of an official one must have its number of images; every listed
    file must be there, every image decode and have its annotated size, and every label be a class.

    A check that was stopped, however, goes on where it was, and the second check of a good set only
    lists it: images found good are kept in a record as they are found, with the sizes and times of
    their files.

    Args:
        root: the folder.
        own: the sets are nobody's official ones, whatever they are called.
        workers: processes that look at files; 0 looks in this one, None takes the cores there are.
        record: the record; None puts it into the user's cache, by the name of `root`.
        report: file of all that is found; None puts it beside the record.
        progress: show a bar.
    Raises:
        FileNotFoundError: if `root` is not there or no data set is in it; the message says what
            was looked for.
        OSError: if the record or the report cannot be written.
    """
    root = Path(root).expanduser()
    require_folder(root)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    record = _cache() / f"{key}.jsonl" if record is None else Path(record).expanduser()
    report = record.with_suffix(".txt") if report is None else Path(report).expanduser()

    lists = find_lists(root, own=own)
    # The longest list first: what is missing from trainval need not be said again of train and val.
    lists.sort(key=lambda one: -one.entries)
    items = list(dict.fromkeys(item for one in lists for item in one.items))
    faults: dict[Item, list[Fault]] = {}
    with (
        closing(_Record(record, root)) as good,
        tqdm(
            total=len(items), desc="checking", unit=" images", disable=None if progress else True
        ) as bar,
    ):
        remembered = len(items)
        for item, line, found in _look(_unknown(items, good, bar), workers):
            remembered -= 1
            bar.update()
            if found:
                faults[item] = found
            elif line is not None:
                good.add(line)
    return _report(root, lists, faults, len(items) - remembered, remembered, report)


def _cache() -> Path:
    """The folder of this check in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "deformnet/data-check"


class _Record:
    """Lines of a file, each an item that was found good. A line half written counts for nothing."""

    def __init__(self, path: Path, root: Path) -> None:
        self._root = f"{root}{os.sep}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="ascii", errors="replace") if path.is_file() else ""
        self._lines = set(text.splitlines())
        self._file = path.open("a", encoding="ascii")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def __contains__(self, line: str) -> bool:
        return line in self._lines

    def line(self, item: Item) -> str | None:
        """What the record says of the item as it is now: files, their sizes and times (ns), and a
        sum of what they were compared with. None if a file cannot be read."""
        try:
            found = [Path(file).stat() for file in item.files]
        except OSError:
            return None
        files = [
            [file.removeprefix(self._root), stat.st_size, stat.st_mtime_ns]
            for file, stat in zip(item.files, found, strict=True)
        ]
        wanted = zlib.crc32(repr(item[len(files) :]).encode())
        return json.dumps([type(item).__name__, *files, wanted])

    def add(self, line: str) -> None:
        # To the system at once: what is with it survives the end of this process, however it ends.
        self._file.write(f"{line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_Task = tuple[Item, str | None]  # with its line in the record, as its files were before the look


def _unknown(items: Iterable[Item], good: _Record, bar: tqdm) -> Iterator[list[_Task]]:
    """The items that are not known to be good, a few at a time."""
    tasks: list[_Task] = []
    for item in items:
        line = good.line(item)
        if line is not None and line in good:
            bar.update()
            continue
        tasks.append((item, line))
        if len(tasks) == _AT_ONCE:
            yield tasks
            tasks = []
    if tasks:
        yield tasks


class _Looking:
    """What a loader takes for a data set. Its "indices" are the tasks themselves, so that no
    process holds more of a large set than it is looking at."""

    def __getitem__(self, tasks: Sequence[_Task]) -> list[tuple[Item, str | None, list[Fault]]]:
        return [(item, line, item.faults()) for item, line in tasks]


def _look(
    tasks: Iterable[list[_Task]], workers: int
) -> Iterator[tuple[Item, str | None, list[Fault]]]:
    loader = DataLoader(
        _Looking(),  # pyright: ignore[reportArgumentType] (a map from tasks to results)
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupts,
    )
    for results in loader:
        yield from results


def _as_it_is(results: list) -> list:
    return results


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes; the one that started the others ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _report(
    root: Path,
    lists: Sequence[ImageList],
    faults: dict[Item, list[Fault]],
    checked: int,
    remembered: int,
    path: Path,
) -> DataReport:
    problems: list[str] = []
    summary: list[str] = []
    seen: set[Missing] = set()
    for one in lists:
        # Once for a file, though several lists want it.
        absent: dict[tuple[str, str], list[Missing]] = {}
        for missing in one.missing:
            if missing not in seen:
                absent.setdefault((missing.kind, missing.folder), []).append(missing)
        for (kind, folder), files in absent.items():
            seen.update(files)
            place = _shown(folder, root)
            summary.append(
                f"{place}: {len(files)} of {one.entries} {kind} of {one.title} are missing, "
                f"the first is {files[0].name}"
            )
            problems += [f"{place}/{file.name}: missing, listed in {one.title}" for file in files]
    of_lists = [fault for one in lists for fault in one.faults]
    found = [*of_lists, *(fault for of_item in faults.values() for fault in of_item)]
    by_folder: dict[str, list[str]] = {}
    remarks: list[str] = []
    for fault in dict.fromkeys(found):  # an image in two lists may be said to be damaged twice
        line = f"{_shown(fault.file, root)}: {fault.text}"
        if fault.left_out:
            remarks.append(line)
        else:
            by_folder.setdefault(_shown(str(Path(fault.file).parent), root), []).append(line)
    for folder, lines in by_folder.items():
        problems += lines
        summary += lines[:_SHOWN]
        if len(lines) > _SHOWN:
            summary.append(f"... and {len(lines) - _SHOWN} more in {folder}")
    remarks += _absent_lists(lists)
    bad = {item for item, of_item in faults.items() if not all(fault.left_out for fault in of_item)}
    made = DataReport(
        root=root,
        lists=tuple(
            ListSummary(
                name=one.title,
                images=one.entries,
                official=one.official,
                missing=len(one.missing),
                faulty=sum(item in bad for item in one.items) if bad else 0,
            )
            for one in sorted(lists, key=lambda one: one.title)
        ),
        problems=tuple(problems),
        remarks=tuple(remarks),
        summary=tuple(summary),
        checked=checked,
        remembered=remembered,
        file=path,
    )
    lines = [*_table(made.lists), "", "Problems:", *problems, "", "Remarks:", *remarks]
    with replacing(path) as file:
        file.write(("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    return made


def _absent_lists(lists: Sequence[ImageList]) -> list[str]:
    """Official lists that are not here, of sets that are."""
    remarks = []
    for official in OFFICIAL_SETS:
        here = {one.name for one in lists if one.official is not None}
        if here & official.counts.keys():
            remarks += [
                f"{name} of {official.name} ({count} images) is not here"
                for name, count in official.counts.items()
                if name not in here
            ]
    return remarks


def _table(lists: Sequence[ListSummary]) -> list[str]:
    rows = [("list", "images", "official", "missing", "faulty")]
    rows += [
        (
            one.name,
            str(one.images),
            "-" if one.official is None else str(one.official),
            str(one.missing),
            str(one.faulty),
        )
        for one in lists
    ]
    width = max(len(row[0]) for row in rows)
    return [f"{row[0]:{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]


def _shown(file: str, root: Path) -> str:
    """A path as the report shows it."""
    path = Path(file)
    return str(path.relative_to(root)) if path.is_relative_to(root) else file
