"""Layouts of data sets on disk, and how a folder's layout is recognized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from deformnet.data.files import listing, require_folder

_Dataset = TypeVar("_Dataset", covariant=True)


@dataclass(frozen=True)
class Layout(Generic[_Dataset]):
    """One way in which the files of a data set are arranged.

    A layout is an object of this class beside its reader, and an entry in the tuple `LAYOUTS` of
    `deformnet.data.detection` or `deformnet.data.segmentation`.

    Attributes:
        name: name in messages.
        files: files or folders by which the layout is recognized, in messages.
        recognizes: whether a folder has this layout.
        splits: names of the splits in such a folder.
        open: reader, called with the folder, the split and the transforms.
    """

    name: str
    files: str
    recognizes: Callable[[Path], bool]
    splits: Callable[[Path], list[str]]
    open: Callable[[Path, str, Callable | None], _Dataset]


def find_layout(root: Path, layouts: Sequence[Layout[_Dataset]]) -> Layout[_Dataset]:
    """The first of `layouts` that recognizes a folder.

    Raises:
        FileNotFoundError: if none does; the message says what was looked for and what is there.
    """
    require_folder(root)
    for layout in layouts:
        if layout.recognizes(root):
            return layout
    expected = " or ".join(f"{layout.files} ({layout.name})" for layout in layouts)
    raise FileNotFoundError(
        f"{root}: expected a data set with {expected}, but the folder holds "
        f"{listing(sorted(path.name for path in root.iterdir()), 5)}"
    )
