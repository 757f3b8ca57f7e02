"""Check of every file of the data sets in a folder, in parallel; a stopped check resumes."""

import hashlib
import json
import os
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet._text import Table
from deformnet.data.check.lists import find_lists
from deformnet.data.check.official import OFFICIAL_SETS
from deformnet.data.files import require_folder
from deformnet.data.items import Fault, Item, files_of
from deformnet.data.layouts import ImageList, Missing

_CHUNK = 16  # items that a process is handed at a time
_SHOWN = 5  # faults of a folder that the terminal shows


class ListSummary(NamedTuple):
    """One list of images in the report: its name, and how many images and files of each kind."""

    name: str
    images: int
    official: int | None
    """Images in the official list; None if there is none."""
    missing: int
    """Files that the list needs and that do not exist."""
    faulty: int
    """Images that are damaged or do not fit their annotation."""


@dataclass(frozen=True)
class DataReport:
    """Result of `check_data`; as text, a table and a few lines of problems.

    Attributes:
        root: the folder.
        lists: lists that were found.
        problems: a line for each problem.
        remarks: a line for each box that readers drop, and each official list that is absent.
        summary: `problems` for a terminal: one line for missing files of a folder, and the first
            few of its other problems.
        checked: number of images that were read.
        remembered: number of images known to be good from an earlier check.
        file: file of the report with all lines.
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
        """Whether there are no problems; remarks do not count."""
        return not self.problems

    def __str__(self) -> str:
        remarks = _first(self.remarks, "remarks")
        verdict = "no problems" if self.ok else f"{len(self.problems)} problems"
        counts = f"{self.checked} images checked, {self.remembered} known from an earlier check"
        return "\n".join(
            [
                str(self._table()),
                *(["", "Problems:", *self.summary] if self.summary else []),
                *(["", "Remarks:", *remarks] if remarks else []),
                "",
                f"{self.root}: {verdict} ({counts}); full report: {self.file}",
            ]
        )

    def write(self) -> None:
        """Writes all lines into `file`."""
        lines = [str(self._table()), "", "Problems:", *self.problems, "", "Remarks:", *self.remarks]
        with replacing(self.file) as file:
            file.write(("\n".join(lines) + "\n").encode(errors="surrogateescape"))

    def _table(self) -> Table:
        rows = [["-" if cell is None else str(cell) for cell in it] for it in self.lists]
        return Table("", ("list", *ListSummary._fields[1:]), rows)


def check_data(
    root: str | Path,
    *,
    custom: bool = False,
    workers: int | None = None,
    record: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool = True,
) -> DataReport:
    """Checks that the data sets in a folder are complete and every file is valid.

    Finds data sets in the layouts of VOC, COCO, Cityscapes and ImageNet in the folder and its
    subfolders. Lists named like an official one must have its number of images; every listed file
    must exist, every image decode and have its annotated size, and every label be a class.

    Good images are recorded as they are found, with the sizes and times of their files: a stopped
    check resumes, and a second check of a good data set only lists it.

    Args:
        root: the folder.
        custom: skip the check against official image counts.
        workers: processes that read files; 0 reads in this process, None takes all cores.
        record: file of the good images; None takes one in the user's cache, named after `root`.
        report: file of all results; None takes one beside the record.
        progress: show a progress bar.
    Raises:
        FileNotFoundError: if `root` does not exist or holds no data set; the message says what was
            looked for.
        UserError: if `workers` is negative.
        OSError: if the record or the report cannot be written.
    """
    root = require_folder(Path(root).expanduser())
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if workers < 0:
        raise UserError(f"expected workers to be at least 0, but got {workers}")
    record = _default_record(root) if record is None else Path(record).expanduser()
    report = record.with_suffix(".txt") if report is None else Path(report).expanduser()

    lists = find_lists(root, custom=custom)
    # The longest list first: files missing from trainval need not be named again for train and val.
    lists.sort(key=lambda images: -images.entries)
    items = list(dict.fromkeys(item for images in lists for item in images.items))
    faults: dict[Item, list[Fault]] = {}
    with (
        closing(_Record(record, root)) as good,
        tqdm(
            total=len(items), desc="checking", unit=" images", disable=None if progress else True
        ) as bar,
    ):
        remembered = len(items)
        for item, line, its_faults in _check(_unknown(items, good, bar), workers):
            remembered -= 1
            bar.update()
            if its_faults:
                faults[item] = its_faults
            elif line is not None:
                good.add(line)
    result = _report(root, lists, faults, len(items) - remembered, remembered, report)
    result.write()
    return result


def _default_record(root: Path) -> Path:
    """The record of a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    folder = (Path(cache) if cache else Path.home() / ".cache") / "deformnet/data-check"
    return folder / f"{key}.jsonl"


class _Record:
    """A file with a line for each good item. A partly written line is ignored."""

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
        """The line of the item as it is now: its files with their sizes and times (ns), and a
        checksum of its other fields. None if a file cannot be read."""
        try:
            stats = [Path(file).stat() for file in files_of(item)]
        except OSError:
            return None
        files = [
            [file.removeprefix(self._root), stat.st_size, stat.st_mtime_ns]
            for file, stat in zip(files_of(item), stats, strict=True)
        ]
        checksum = zlib.crc32(repr(item[len(files) :]).encode())
        return json.dumps([type(item).__name__, *files, checksum])

    def add(self, line: str) -> None:
        # Flushed at once: what the system has survives this process, however it ends.
        self._file.write(f"{line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_Task = tuple[Item, str | None]  # with its line in the record, as its files were before the check


def _unknown(items: Iterable[Item], good: _Record, bar: tqdm) -> Iterator[_Task]:
    """Items that are not known to be good."""
    for item in items:
        line = good.line(item)
        if line is not None and line in good:
            bar.update()
        else:
            yield item, line


class _Checking:
    """A data set to a loader. Its "indices" are the tasks themselves, so that no process holds more
    of a large data set than what it is checking."""

    def __getitem__(self, task: _Task) -> tuple[Item, str | None, list[Fault]]:
        item, line = task
        return item, line, item.faults()


def _check(tasks: Iterable[_Task], workers: int) -> Iterator[tuple[Item, str | None, list[Fault]]]:
    loader = DataLoader(
        _Checking(),  # pyright: ignore[reportArgumentType] (a map from tasks to results)
        batch_size=_CHUNK,
        sampler=tasks,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_ignore_interrupts,
    )
    return chain.from_iterable(loader)


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
    missing_problems, missing_summary = _missing_files(root, lists)
    of_lists = (fault for images in lists for fault in images.faults)
    all_faults = chain(of_lists, *faults.values())
    problems, summary, remarks = _fault_lines(root, dict.fromkeys(all_faults))
    faulty = {item for item, found in faults.items() if not all(fault.is_remark for fault in found)}
    return DataReport(
        root=root,
        lists=tuple(
            ListSummary(
                *(images.title, images.entries, images.official, len(images.missing)),
                faulty=sum(item in faulty for item in images.items) if faulty else 0,
            )
            for images in sorted(lists, key=lambda images: images.title)
        ),
        problems=(*missing_problems, *problems),
        remarks=(*remarks, *_absent_lists(lists)),
        summary=(*missing_summary, *summary),
        checked=checked,
        remembered=remembered,
        file=path,
    )


def _missing_files(root: Path, lists: Sequence[ImageList]) -> tuple[list[str], list[str]]:
    """Lines for missing files, each once though several lists need it: all, and by folder."""
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


def _fault_lines(root: Path, faults: Iterable[Fault]) -> tuple[list[str], list[str], list[str]]:
    """Lines for faults: all problems, those for a terminal, and remarks."""
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
        summary += _first(lines, f"in {folder}")
    return [line for lines in by_folder.values() for line in lines], summary, remarks


def _first(lines: Sequence[str], of: str) -> list[str]:
    """The lines that the terminal shows."""
    more = [f"... and {len(lines) - _SHOWN} more {of}"] if len(lines) > _SHOWN else []
    return [*lines[:_SHOWN], *more]


def _absent_lists(lists: Sequence[ImageList]) -> list[str]:
    """Lines for official lists that are absent, of data sets that are not."""
    present = {images.name for images in lists if images.official is not None}
    return [
        f"{name} of {official.name} ({count} images) is absent"
        for official in OFFICIAL_SETS
        if present & official.counts.keys()
        for name, count in official.counts.items()
        if name not in present
    ]


def _relative(file: str, root: Path) -> str:
    """A path relative to `root` if it is inside."""
    path = Path(file)
    return str(path.relative_to(root)) if path.is_relative_to(root) else file
