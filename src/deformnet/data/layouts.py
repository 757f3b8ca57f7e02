"""Layouts of data sets on disk: how one is recognized, its lists of images, and its reader."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from deformnet._errors import UserError
from deformnet.data.files import Folder, Orientation
from deformnet.data.items import Fault, ImageItem, Item, reason
from deformnet.data.location import DataFiles, Location

_Dataset = TypeVar("_Dataset", covariant=True)


class Missing(NamedTuple):
    """A file that a list needs and that does not exist."""

    kind: str
    """Images, annotations or label maps."""
    folders: tuple[str, ...]
    """Folders in which it may be, the likeliest first."""
    name: str


@dataclass
class ImageList:
    """A list of images and all information about it that does not require opening them.

    Readers raise its first problem (`require`); the check of data sets reports all problems.

    Attributes:
        name: name such as VOC2007/Main/trainval, which identifies official lists.
        source: file or folder that defines the list.
        may_be_official: False for a data set whose classes or folders differ from the official one.
        classes: class names; empty if there are no annotations.
        unit: what the check counts for each class.
        counts: number of units of each class in annotations that the items do not read.
        empty: number of images without any, in the same annotations.
        pair_item: check of an image with its annotation.
        pairs: images with their annotations.
        singles: images without annotations.
        missing: files that do not exist.
        faults: faults of the list itself.
        entries: number of images that the list names.
        title: for the check, the name with the location of the data set.
        official: for the check, number of images in the official list with this name, if any.
    """

    name: str
    source: Path
    may_be_official: bool = False
    classes: tuple[str, ...] = ()
    unit: Literal["objects", "pixels", "images"] = "objects"
    counts: Counter[int] = field(default_factory=Counter)
    empty: int = 0
    pair_item: Callable[[str, str], Item] | None = None
    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    singles: list[ImageItem] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    entries: int = 0
    title: str = ""
    official: int | None = None

    @property
    def items(self) -> list[Item]:
        """What is to be checked."""
        item = self.pair_item
        pairs = [] if item is None else [item(str(one), str(other)) for one, other in self.pairs]
        return [*self.singles, *pairs]

    def add(self, image: Path | Missing, annotation: Path | Missing) -> None:
        """Adds an image with its annotation."""
        self.entries += 1
        self.missing += [file for file in (image, annotation) if isinstance(file, Missing)]
        if isinstance(image, Path):
            if isinstance(annotation, Path):
                self.pairs.append((image, annotation))
            else:
                self.singles.append(ImageItem(str(image), None))

    def fault(self, text: str, *, file: Path | None = None, is_remark: bool = False) -> None:
        """Adds a fault of the list, or of a `file` that belongs to it."""
        self.faults.append(Fault(str(file or self.source), text, is_remark))

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Adds an error of reading the list to its faults."""
        try:
            yield
        except (ValueError, OSError, MemoryError) as error:
            self.fault(reason(error, self.source))

    def require(self) -> None:
        """
        Raises:
            UserError: if there is a fault that is not a remark; names the first one.
            FileNotFoundError: if a file is missing; names the first one.
        """
        for fault in self.faults:
            if not fault.is_remark:
                raise UserError(f"{fault.file}: {fault.text}")
        for file in self.missing:
            more = f" (and {len(self.missing) - 1} more)" if len(self.missing) > 1 else ""
            places = " or ".join(file.folders)
            raise FileNotFoundError(
                f"{self.source}: needs {file.name}, which is not in {places}{more}"
            )


def find_file(kind: str, folders: Sequence[Folder], *names: str) -> Path | Missing:
    """The first existing file, by folder and then by name, or the description of a missing one."""
    found = (folder.find(*names) for folder in folders)
    missing = Missing(kind, tuple(str(folder.path) for folder in folders), names[0])
    return next(filter(None, found), missing)


def find_image_file(kind: str, folders: Sequence[Folder], name: str, suffix: str) -> Path | Missing:
    """Same as `find_file`, for a name that may omit its image suffix; messages show `suffix`, the
    usual one."""
    found = (folder.find_image(name) for folder in folders)
    missing = Missing(kind, tuple(str(folder.path) for folder in folders), f"{name}{suffix}")
    return next(filter(None, found), missing)


class Reader(Protocol[_Dataset]):
    """Reads a split of a data set."""

    def __call__(
        self,
        root: Location,
        split: str,
        transforms: Callable | None = None,
        /,
        *,
        orientation: Orientation = "auto",
    ) -> _Dataset: ...


@dataclass(frozen=True)
class Layout(Generic[_Dataset]):
    """A layout: the arrangement of the files of a data set.

    A layout is an instance of this class, defined next to its reader, and an entry in a tuple in
    `deformnet.data.opening`.

    Attributes:
        name: name in messages.
        files: files or folders by which the layout is recognized, in messages.
        recognizes: whether a folder has this layout.
        splits: names of the splits in such a folder.
        lists: all lists of images, with their problems.
        open: reader.
        folders: folders that belong to the data set as a whole; there may be other folders.
        recognizes_files: whether separate images and annotations have this layout.
    """

    name: str
    files: str
    recognizes: Callable[[Path], bool]
    splits: Callable[[Path], list[str]]
    lists: Callable[[DataFiles], Iterable[ImageList]]
    open: Reader[_Dataset]
    folders: Callable[[Path], set[Path]] = lambda root: {root}
    recognizes_files: Callable[[DataFiles], bool] = lambda files: False
