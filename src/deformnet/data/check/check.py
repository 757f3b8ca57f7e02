"""Check of every file of the data sets in a folder, in parallel; a stopped check resumes."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from deformnet._errors import UserError, lacks_memory
from deformnet._files import require_writable
from deformnet.data.check.duplicates import fingerprint
from deformnet.data.check.lines import (
    absent_lists,
    fault_lines,
    list_notes,
    missing_lines,
    note_nothing_to_learn,
)
from deformnet.data.check.lists import FoundSet, advise, find_sets
from deformnet.data.check.record import Record, Result
from deformnet.data.check.report import DataReport, ListSummary, require_report
from deformnet.data.files import MAX_PIXELS, is_rotated, read_size, size_text
from deformnet.data.items import Fault, Item, files_of, reason
from deformnet.data.layouts import ImageList
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.workers import loaded

_CHUNK = 16  # items that a process is handed at a time
_MOST_WORKERS = 1024
_MIN_SIDE = 8  # pixels
_MAX_RATIO = 20  # of the sides of an image
_MANY_PIXELS = MAX_PIXELS // 3


def check_data(
    root: Location,
    *,
    custom: bool = False,
    workers: int | None = None,
    record: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool = True,
) -> DataReport:
    """Checks that the data sets in a folder are complete and every file is valid.

    Finds data sets of all layouts in the folder and its subfolders. Checks that lists with an
    official name have the official number of images, that every listed file exists, that every
    image can be decoded and has its annotated size, that every label is a class, and that every
    list has something to learn from.

    Valid images are recorded with the sizes and times of their files, so an interrupted check
    resumes, and a second check of a valid data set does not read the images again.

    Args:
        root: the folder, or separate images and annotations.
        custom: skip the check against official image counts.
        workers: number of processes that read files; 0 reads in this process, None uses all cores.
        record: file that records valid images; None uses the user's cache folder.
        report: file with all results; None writes it next to the record. An older report is
            replaced.
        progress: show a progress bar.
    Raises:
        FileNotFoundError: if `root` does not exist or contains no data set; the message lists what
            was found.
        UserError: if `workers` is negative, or the record or report would replace another file.
        OSError: if the record or the report cannot be written.
    """
    place = locate(root)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if workers < 0:
        raise UserError(f"expected workers to be at least 0, but got {workers}")
    if workers > _MOST_WORKERS:
        raise UserError(f"expected workers to be at most {_MOST_WORKERS}, but got {workers}")
    record = _default_record(place) if record is None else Path(record).expanduser()
    beside = record.parent / f"{record.stem}.report.txt"
    report = beside if report is None else Path(report).expanduser()
    require_report(report)
    if record.resolve() == report.resolve():
        raise UserError(
            f"{report}: expected different files for the report and the record, but got the same"
        )

    sets = find_sets(place, custom=custom)
    require_writable(report.parent)
    # The longest list first: files missing from trainval need not be named again for train and val.
    lists = sorted((it for found in sets for it in found.lists), key=lambda it: -it.entries)
    tallies = [_Tally(images) for images in lists]
    owners: dict[Item, list[_Tally]] = {}
    for tally in tallies:
        for item in tally.images.items:
            owners.setdefault(item, []).append(tally)
    faults: list[Fault] = []
    fingerprints: dict[str, int | None] = {}
    checked = 0
    with (
        closing(Record(record, place.images)) as known,
        tqdm(
            total=len(owners), desc="checking", unit=" images", disable=None if progress else True
        ) as bar,
    ):

        def count(item: Item, result: Result) -> None:
            for tally in owners[item]:
                tally.add(result)
            fingerprints[files_of(item)[0]] = result.fingerprint
            bar.update()

        for item, key, result in _check(list(_unknown(owners, known, count)), workers):
            checked += 1
            count(item, result)
            faults += result.faults
            if key is not None and not result.faults:
                known.add(key, result)
    for tally in tallies:
        note_nothing_to_learn(tally.images, tally.summary())
    summaries = sorted((tally.summary() for tally in tallies), key=lambda one: one.name)
    notes = list_notes(lists, summaries, fingerprints)
    remembered = len(owners) - checked
    result = _report(place, sets, lists, summaries, notes, faults, checked, remembered, report)
    result.write()
    return result


def _default_record(place: DataFiles) -> Path:
    """The record of a data set in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    paths = dict.fromkeys(str(it.resolve()) for it in (place.images, place.annotations))
    key = hashlib.sha256(os.fsencode("\0".join(paths))).hexdigest()[:16]
    folder = (Path(cache) if cache else Path.home() / ".cache") / "deformnet/data-check"
    return folder / f"{key}.jsonl"


@dataclass
class _Tally:
    """Sums over the images of a list."""

    images: ImageList
    counts: Counter[int] = field(default_factory=Counter)
    faulty: int = 0
    rotated: int = 0
    empty: int = 0

    def __post_init__(self) -> None:
        self.counts.update(self.images.counts)
        self.empty = self.images.empty

    def add(self, result: Result) -> None:
        self.counts.update(result.counts)
        is_faulty = not all(fault.is_remark for fault in result.faults)
        self.faulty += is_faulty
        self.rotated += result.is_rotated
        self.empty += self.images.pair_item is not None and not is_faulty and not result.counts

    def summary(self) -> ListSummary:
        images = self.images
        return ListSummary(
            name=images.title,
            images=images.entries,
            official=images.official,
            missing=len(images.missing),
            faulty=self.faulty,
            rotated=self.rotated,
            empty=self.empty,
            classes=images.classes,
            unit=images.unit,
            counts=+self.counts,
        )


_Task = tuple[Item, str | None]  # with its key in the record, as its files were before the check


def _unknown(
    items: Iterable[Item], known: Record, count: Callable[[Item, Result], None]
) -> Iterator[_Task]:
    """Items that are not recorded as valid; the others are counted."""
    for item in items:
        key = known.key(item)
        result = None if key is None else known.find(key)
        if result is None:
            yield item, key
        else:
            count(item, result)


class _Checking:
    """Results of chunks of tasks."""

    def __getitem__(self, chunk: Sequence[_Task]) -> list[tuple[Item, str | None, Result]]:
        return [self._result(*task) for task in chunk]

    def _result(self, item: Item, key: str | None) -> tuple[Item, str | None, Result]:
        faults: list[Fault] = []
        counts: Counter[int] = Counter()
        image = Path(files_of(item)[0])
        try:
            faults, counts = item.check()
            is_turned, size, its_print = is_rotated(image), read_size(image), fingerprint(image)
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            faults = [*faults, Fault(str(image), reason(error, image) or "out of memory")]
            return item, key, Result(faults, counts, is_rotated=False, fingerprint=None)
        except (ValueError, OSError):  # among the faults
            return item, key, Result(faults, counts, is_rotated=False, fingerprint=None)
        remark = _size_remark(*size)
        if remark:
            faults = [*faults, Fault(str(image), remark, is_remark=True)]
        return item, key, Result(faults, counts, is_turned, its_print)


def _size_remark(height: int, width: int) -> str:
    """Remark about an unusual image size; empty if there is none."""
    short, long = sorted((height, width))
    size = size_text(height, width)
    if short < _MIN_SIDE:
        return f"its size, {size}, is tiny"
    if long > _MAX_RATIO * short:
        return f"its size, {size}, is long and narrow: resizing its short side may take much memory"
    if height * width > _MANY_PIXELS:
        return f"its size, {size}, is large: reading it takes {3 * height * width / 1e9:.1f} GB"
    return ""


def _check(tasks: Sequence[_Task], workers: int) -> Iterator[tuple[Item, str | None, Result]]:
    chunks = [tasks[first : first + _CHUNK] for first in range(0, len(tasks), _CHUNK)]
    results = loaded(
        _Checking(), chunks, workers=workers, what=lambda chunk: str(files_of(chunk[0][0])[0])
    )
    return chain.from_iterable(results)


def _report(
    place: DataFiles,
    sets: Sequence[FoundSet],
    lists: Sequence[ImageList],
    summaries: Sequence[ListSummary],
    notes: Sequence[str],
    faults: Sequence[Fault],
    checked: int,
    remembered: int,
    path: Path,
) -> DataReport:
    root = place.annotations
    missing_problems, missing_summary = missing_lines(root, lists)
    of_lists = [fault for images in lists for fault in images.faults]
    problems, summary, remarks = fault_lines(root, dict.fromkeys((*of_lists, *faults)))
    is_ok = not missing_problems and not problems
    return DataReport(
        root=str(place),
        layouts=tuple(found.name for found in sets),
        lists=tuple(summaries),
        problems=(*missing_problems, *problems),
        remarks=(*notes, *remarks, *absent_lists(lists)),
        summary=(*missing_summary, *summary),
        notes=len(notes),
        advice=tuple(advise(place, sets)) if is_ok else (),
        checked=checked,
        remembered=remembered,
        file=path,
    )
