"""Data sets in a folder: their image lists, a comparison with the official ones, and training
commands."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from deformnet.data.check.official import official_count
from deformnet.data.files import require_folder
from deformnet.data.layouts import ImageList, Layout
from deformnet.data.location import DataFiles, Location
from deformnet.data.opening import (
    LAYOUTS,
    classification_splits,
    detection_splits,
    segmentation_splits,
    what_was_found,
)
from deformnet.data.splits import resolve

_ADVISED = 3  # maximum number of data sets with a training command in the report


@dataclass(frozen=True)
class FoundSet:
    """A data set.

    Attributes:
        place: its folder, or its images and annotations.
        name: names of its layouts, and its folder.
        lists: its lists of images.
    """

    place: DataFiles
    name: str
    lists: list[ImageList]


def find_sets(place: DataFiles, *, custom: bool) -> list[FoundSet]:
    """Data sets in a folder, or in its subfolders.

    Args:
        custom: skip the check against official image counts.
    Raises:
        FileNotFoundError: if there is none; the message lists what was found.
    """
    if place.are_apart:
        layouts = [layout for layout in LAYOUTS if layout.recognizes_files(place)]
        if not layouts:
            detection_splits(place)  # raises an error that lists what was found
        sets = [_read(place, layouts, "", custom=custom)]
    else:
        root = require_folder(place.annotations)
        sets = [
            _read(DataFiles(it, it), _layouts_of(it), _inner(it, root), custom=custom)
            for it in _places(root)
        ]
    found = [one for one in sets if one.lists]
    if not found:
        raise FileNotFoundError(what_was_found(place.annotations))
    return found


def advise(place: DataFiles, sets: Sequence[FoundSet]) -> Iterator[str]:
    """Commands that train on the data sets."""
    for found in islice(sets, _ADVISED):
        known = [(network, _splits(splits_of, found.place)) for network, splits_of in _NETWORKS]
        # Folders of another layout may look like classes, too.
        for network, splits in [it for it in known[:-1] if it[1]] or known[-1:]:
            if not splits:
                continue
            root = found.place
            data = f"--data {root.annotations}"
            if root.are_apart:
                data = f"--images {root.images} --annotations {root.annotations}"
            has_val = resolve(splits, "val") in splits
            held_out = "" if has_val else " --val-fraction 0.2"
            has_train = resolve(splits, "train") in splits
            split = "" if has_train else f" --split {splits[0]}"
            yield f"train with: deformnet train {network} {data} --out RUN{split}{held_out}"


_NETWORKS: tuple[tuple[str, Callable[[Location], list[str]]], ...] = (
    ("rfcn", detection_splits),
    ("deeplab", segmentation_splits),
    ("classifier", classification_splits),
)


def _splits(splits_of: Callable[[Location], list[str]], place: DataFiles) -> list[str]:
    """Splits of a kind, possibly none."""
    try:
        return splits_of(place)
    except (ValueError, OSError):
        return []


def _read(place: DataFiles, layouts: Sequence[Layout], inner: str, *, custom: bool) -> FoundSet:
    """The lists of a data set, with their faults."""
    lists: list[ImageList] = []
    for layout in layouts:
        failed = ImageList(layout.name, place.annotations)
        with failed.noting_errors():
            for images in layout.lists(place):
                images.title = str(Path(inner) / images.name)
                if images.may_be_official and not custom:
                    images.official = official_count(images.name)
                _compare(images)
                lists.append(images)
        if failed.faults:
            failed.title = str(Path(inner) / failed.name)
            lists.append(failed)
    names = ", ".join(dict.fromkeys(layout.name for layout in layouts))
    return FoundSet(place, f"{names} in {inner}" if inner else names, lists)


def _inner(place: Path, root: Path) -> str:
    return "" if place == root else str(place.relative_to(root))


def _places(root: Path) -> list[Path]:
    """Folders that may hold data sets: `root`, and its folders unless all belong to one set."""
    known = {folder for layout in _layouts_of(root) for folder in layout.folders(root)}
    if root in known:
        return [root]
    below = [
        path
        for path in sorted(root.iterdir())
        if path.is_dir()
        and path not in known
        and not path.name.startswith(".")
        and os.access(path, os.R_OK | os.X_OK)  # a disk's lost+found is not
    ]
    return [root, *below]


def _layouts_of(place: Path) -> Sequence[Layout]:
    *others, by_class = LAYOUTS
    recognized = [layout for layout in others if layout.recognizes(place)]
    return recognized or [by_class] * by_class.recognizes(place)


def _compare(images: ImageList) -> None:
    """Compares a list with the official one."""
    if images.official not in (None, images.entries):
        images.fault(
            f"expected the {images.official} images of the official {images.name}, but got "
            f"{images.entries}; check a custom data set with --custom"
        )
    # Only an evaluation server has the labels of test images.
    absent = [file for file in images.missing if file.kind != "images"]
    if images.name.rpartition("/")[2] == "test" and len(absent) == images.entries > 0:
        images.missing = [file for file in images.missing if file.kind == "images"]
        text = f"has no {absent[0].kind}: test images, scored by an evaluation server"
        images.fault(text, is_remark=True)
