"""Images sorted into one folder per class."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self, final

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from deformnet.data.files import (
    IMAGE_SUFFIXES,
    Orientation,
    is_image,
    listing,
    read_image,
    require_folder,
    subfolders,
    walk_images,
)
from deformnet.data.flat import StringList
from deformnet.data.items import ImageItem
from deformnet.data.layouts import ImageList, Layout
from deformnet.data.location import DataFiles, Location, locate
from deformnet.data.splits import USUAL_SPLITS, resolve, split_parts

_LISTED = 5  # names in a message; ImageNet has a thousand classes
_SYNSET = re.compile(r"n\d{8}")  # ImageNet's classes
_ONLY_SPLIT = "train"  # of a data set without splits
_SPLIT_LIKE = re.compile(rf"({'|'.join(sorted(USUAL_SPLITS))})[_-]?\d*")

# Folders of images that belong to other layouts.
_NO_CLASSES = {
    *("images", "image", "img", "imgs", "jpegimages", "masks", "mask", "labels", "annotations"),
    *("segmentationclass", "segmentationobject", "segmentationclassaug"),
}


class _Samples(Sequence[tuple[str, int]]):
    """Files of many images and their labels, in flat tensors."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self._files = StringList(file for file, _ in samples)
        self._labels = torch.tensor([label for _, label in samples], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[str, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._files[index], int(self._labels[index])


@final
class ImageFolderClassification(VisionDataset):
    """Images and their classes in the layout of torchvision's `ImageFolder`.

    ```
    <split>/<class>/<any name>.jpg     or any other image suffix, in lower or upper case
    <class>/<any name>.jpg             without splits: all images are in the split `train`
    ```

    A split is a folder, or several joined by `+` (`train+val`). If there is no `val`, it refers to
    `valid`, `validation`, `dev` or `test`. The classes of all splits are the sorted folder names in
    `train`, so that a split in which a class is absent has the same labels. If there is no `train`,
    the (first) split itself defines the classes. Hidden files and folders are skipped.

    Attributes:
        classes: class names; their indices are the labels.
        samples: file and label of each image.
        transform: called with an image (uint8 [3, H, W]); None for no transform.
        orientation: use of the EXIF orientation; `auto` applies it, as there is no annotated size.
    """

    def __init__(
        self,
        root: Location,
        split: str,
        transform: Callable[[tv_tensors.Image], Tensor] | None = None,
        *,
        orientation: Orientation = "auto",
    ) -> None:
        """
        Raises:
            FileNotFoundError: if `root` or the folder of a split is missing; the message says
                which folders exist.
            UserError: if a split has no classes, a class no image, or a split a class that `train`
                lacks.
        """
        root = locate(root).images
        splits = image_folder_splits(root)
        folders = [_split_folder(root, splits, name) for name in split_parts(split)]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder; {_expected(root, splits)}")
        super().__init__(root, transform=transform)
        self.split = split
        self.orientation: Orientation = orientation
        train = _split_folder(root, splits, "train")
        reference = train if train.is_dir() else folders[0]
        self.classes = tuple(_folder_names(reference))
        samples: list[tuple[str, int]] = []
        for folder in folders:
            images, added = _find_images(folder, reference)
            images.require()
            samples += added
        self.samples: Sequence[tuple[str, int]] = _Samples(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, indices: Sequence[int], split: str) -> Self:
        """A subset of the data set."""
        part = copy.copy(self)
        part.split = split
        part.samples = _Samples([self.samples[index] for index in indices])
        return part

    def name(self, index: int) -> str:
        """Path of an image relative to the root: `val/cat/1.jpg`."""
        return self.image_path(index).relative_to(self.root).as_posix()

    def image_path(self, index: int) -> Path:
        """File of the image."""
        return Path(self.samples[index][0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Returns:
            RGB image uint8 [3, H, W], or the result of `transform`; and its label.
        Raises:
            UserError: if the file is unreadable; the message names it.
        """
        path, label = self.samples[index]
        image = tv_tensors.Image(read_image(path, orientation=self.orientation))
        return (image if self.transform is None else self.transform(image)), label

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def image_folder_splits(root: str | Path) -> list[str]:
    """Names of the folders in `root`, each of which may be a split; only `train` if they are
    classes.

    Raises:
        FileNotFoundError: if `root` does not exist.
    """
    root = require_folder(Path(root).expanduser())
    return [_ONLY_SPLIT] if _has_no_splits(root) else _folder_names(root)


def _has_no_splits(root: Path) -> bool:
    """Whether the folders in `root` are classes: two or more directly contain images, at most one
    has the name of a split (such as the class `train`), and none belongs to another layout."""
    names = _folder_names(root)
    split_like = [name for name in names if _SPLIT_LIKE.fullmatch(name.lower())]
    if len(split_like) > 1 or any(name.lower() in _NO_CLASSES for name in names):
        return False
    if any(_folder_names(root / name) for name in split_like):
        return False
    with_images = (name for name in names if _holds_image(root / name))
    return len([name for name, _ in zip(with_images, range(2), strict=False)]) == 2


def _holds_image(folder: Path) -> bool:
    return any(is_image(path.name) and path.is_file() for path in folder.iterdir())


def _split_folder(root: Path, splits: Sequence[str], name: str) -> Path:
    """Folder of a split, which may not exist."""
    found = resolve(splits, name)
    return root if found == _ONLY_SPLIT and _has_no_splits(root) else root / found


def _expected(root: Path, splits: Sequence[str]) -> str:
    if _has_no_splits(root):
        return f"the folders in {root} are classes, so all images are in the split {_ONLY_SPLIT!r}"
    names = listing(splits, _LISTED)
    return f"expected DIR/SPLIT/CLASS/IMAGE, but the folders in {root} are: {names}"


def _find_images(folder: Path, reference: Path) -> tuple[ImageList, list[tuple[str, int]]]:
    """The images of a split, and their files with their labels, by the classes of `reference`."""
    images = ImageList(folder.name, folder)
    labels = {name: label for label, name in enumerate(_folder_names(reference))}
    names = _folder_names(folder)
    if not names:
        images.fault("expected DIR/SPLIT/CLASS/IMAGE, but found no folder of a class")
        return images, []
    images.may_be_official = any(_SYNSET.fullmatch(name) for name in names)
    found = [
        (str(Path(place, file)), number)
        for number, name in enumerate(names)
        for place, files in walk_images(folder / name)
        for file in files
    ]
    with_images = {number for _, number in found}
    for number, name in enumerate(names):
        if name not in labels:
            text = f"expected the classes of {reference}, which has no class {name}"
            images.fault(text, file=folder / name)
        if number not in with_images:
            text = f"expected images ({', '.join(IMAGE_SUFFIXES)}), but found none"
            images.fault(text, file=folder / name)
    images.classes, images.unit = tuple(labels), "images"
    images.counts.update(labels[name] for _, n in found if (name := names[n]) in labels)
    images.singles = [ImageItem(path, None) for path, _ in found]
    images.entries = len(found)
    return images, [(path, labels.get(names[number], -1)) for path, number in found]


def _lists(place: DataFiles) -> Iterator[ImageList]:
    root = place.images
    splits = image_folder_splits(root)
    folders = dict.fromkeys(_split_folder(root, splits, name) for name in ("train", "val"))
    existing = [folder for folder in folders if folder.is_dir()]
    return (_find_images(folder, existing[0])[0] for folder in existing)


def _recognizes(root: Path) -> bool:
    if _has_no_splits(root):
        return True
    split = _split_folder(root, image_folder_splits(root), "train")
    return split.is_dir() and any(
        _holds_image(split / name)
        for name in _folder_names(split)
        if name.lower() not in _NO_CLASSES
    )


def _folder_names(folder: Path) -> list[str]:
    return [path.name for path in subfolders(folder)]


IMAGE_FOLDER = Layout[ImageFolderClassification](
    name="image folder",
    files="train/<class>/*.jpg",
    recognizes=_recognizes,
    splits=image_folder_splits,
    lists=_lists,
    open=ImageFolderClassification,
)
