"""Images sorted into one folder per class."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, VisionDataset

from deformnet.data.files import listing, read_image, require_folder
from deformnet.data.items import ImageItem
from deformnet.data.layouts import ImageList, Layout
from deformnet.data.splits import split_parts

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LISTED = 5  # names in a message; ImageNet has a thousand classes
_SYNSET = re.compile(r"n\d{8}")  # ImageNet's classes


@final
class ImageFolderClassification(VisionDataset):
    """Images and their classes in the layout of torchvision's `ImageFolder`.

    ```
    <split>/<class>/<any name>.jpg     also .jpeg, .png, .bmp, .webp, .tif, .tiff, or in capitals
    ```

    A split is a folder, or several joined by `+` (`train+val`). The classes of all splits are the
    names of the folders in `train`, sorted, so that a split without one of them has the same
    labels. Without a `train` they are those of the (first) split itself. Files and folders whose
    name begins with a dot are skipped.

    Attributes:
        classes: class names; their indices are the labels.
        samples: file and label of each image.
        transform: called with an image (uint8 [3, H, W]); None for no change.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Callable[[tv_tensors.Image], Tensor] | None = None,
    ) -> None:
        """
        Raises:
            FileNotFoundError: if `root` or the folder of a split is missing; the message says
                which folders exist.
            UserError: if a split has no classes, a class no image, or a split a class that `train`
                lacks.
        """
        root = Path(root).expanduser()
        folders = [root / name for name in split_parts(split)]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: no such folder; expected DIR/SPLIT/CLASS/IMAGE, the folders in "
                    f"{root} are: {listing(image_folder_splits(root), _LISTED)}"
                )
        super().__init__(root, transform=transform)
        self.split = split
        reference = root / "train" if (root / "train").is_dir() else folders[0]
        self.classes = tuple(_folder_names(reference))
        self.samples: list[tuple[str, int]] = []
        for folder in folders:
            images, samples = _find_images(folder, reference)
            images.require()
            self.samples += samples

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Path of an image relative to the root: `val/cat/1.jpg`."""
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Returns:
            image uint8 [3, H, W], converted to RGB and turned by its EXIF orientation (no label
            depends on the stored pixels), or what `transform` makes of it; its label.
        Raises:
            UserError: one line that names the file, if it is unreadable.
        """
        path, label = self.samples[index]
        image = tv_tensors.Image(read_image(path, orientation="upright"))
        return (image if self.transform is None else self.transform(image)), label

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def image_folder_splits(root: str | Path) -> list[str]:
    """Names of the folders in `root`, each of which may be a split.

    Raises:
        FileNotFoundError: if `root` does not exist.
    """
    return _folder_names(require_folder(Path(root).expanduser()))


def _is_image(path: str | Path) -> bool:
    """Whether a file name is one of an image; hidden files are not."""
    name = Path(path).name
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _find_images(folder: Path, reference: Path) -> tuple[ImageList, list[tuple[str, int]]]:
    """The images of a split, and their files with their labels, by the classes of `reference`."""
    images = ImageList(folder.name, folder)
    labels = {name: label for label, name in enumerate(_folder_names(reference))}
    names = _folder_names(folder)
    if not names:
        images.fault("expected DIR/SPLIT/CLASS/IMAGE, but found no folder of a class")
        return images, []
    images.may_be_official = any(_SYNSET.fullmatch(name) for name in names)
    found = ImageFolder.make_dataset(
        str(folder),
        {name: number for number, name in enumerate(names)},
        is_valid_file=_is_image,
        allow_empty=True,
    )
    with_images = {number for _, number in found}
    for number, name in enumerate(names):
        if name not in labels:
            text = f"expected the classes of {reference}, which has no class {name}"
            images.fault(text, file=folder / name)
        if number not in with_images:
            text = f"expected images ({', '.join(_SUFFIXES)}), but found none"
            images.fault(text, file=folder / name)
    images.singles = [ImageItem(path, None) for path, _ in found]
    images.entries = len(found)
    return images, [(path, labels.get(names[number], -1)) for path, number in found]


def _lists(root: Path) -> Iterator[ImageList]:
    splits = [root / name for name in ("train", "val") if (root / name).is_dir()]
    return (_find_images(folder, splits[0])[0] for folder in splits)


def _folder_names(folder: Path) -> list[str]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path.name for path in paths if path.is_dir())


IMAGE_FOLDER = Layout(
    name="image folder",
    files="train/<class>/*.jpg",
    recognizes=lambda root: any(
        _is_image(path) and path.is_file() for path in (root / "train").glob("*/*")
    ),
    splits=image_folder_splits,
    lists=_lists,
    open=ImageFolderClassification,
)
