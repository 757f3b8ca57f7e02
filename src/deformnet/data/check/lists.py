"""Data sets in a folder: their lists of images, compared with the official ones."""

import os
from collections.abc import Sequence
from pathlib import Path

from deformnet.data.check.official import official_count
from deformnet.data.layouts import ImageList, Layout
from deformnet.data.opening import LAYOUTS


def find_lists(root: Path, *, custom: bool) -> list[ImageList]:
    """Lists of all data sets in a folder, or in its subfolders.

    Args:
        custom: skip the check against official image counts.
    Raises:
        FileNotFoundError: if there is none; the message says what was looked for.
    """
    lists = []
    for place in _places(root):
        for images in (images for layout in _layouts_of(place) for images in layout.lists(place)):
            images.title = str(place.relative_to(root) / images.name)
            if images.may_be_official and not custom:
                images.official = official_count(images.name)
            _compare(images)
            lists.append(images)
    if not lists:
        expected = dict.fromkeys(f"{layout.files} ({layout.name})" for layout in LAYOUTS)
        raise FileNotFoundError(
            f"{root}: expected a data set here or in a subfolder, but found none of "
            f"{', '.join(expected)}"
        )
    return lists


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
