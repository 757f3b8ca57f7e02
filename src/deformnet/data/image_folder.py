"""Images sorted into one folder per class."""

from collections.abc import Callable
from pathlib import Path
from typing import final

from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, VisionDataset

from deformnet._errors import UserError
from deformnet.data.files import listing, read_image, require_folder
from deformnet.data.splits import split_parts

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LISTED = 5  # names in a message; ImageNet has a thousand classes


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
        folders = [_split_folder(root, name) for name in split_parts(split)]
        super().__init__(root, transform=transform)
        self.split = split
        reference = root / "train" if (root / "train").is_dir() else folders[0]
        self.classes = tuple(_class_names(reference))
        self.samples: list[tuple[str, int]] = []
        for folder in folders:
            self.samples += self._find_samples(folder, reference)

    def _find_samples(self, folder: Path, reference: Path) -> list[tuple[str, int]]:
        labels = {name: label for label, name in enumerate(self.classes)}
        names = _class_names(folder)
        for name in names:
            if name not in labels:
                raise UserError(
                    f"{folder / name}: expected the classes of {reference}, which has no class "
                    f"{name}"
                )
        samples = ImageFolder.make_dataset(
            str(folder),
            {name: labels[name] for name in names},
            is_valid_file=is_image,
            allow_empty=True,
        )
        with_images = {label for _, label in samples}
        for name in names:
            if labels[name] not in with_images:
                raise UserError(
                    f"{folder / name}: expected images ({', '.join(_SUFFIXES)}), but found none"
                )
        return samples

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
        image = tv_tensors.Image(read_image(path, upright=True))
        return (image if self.transform is None else self.transform(image)), label

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def image_folder_splits(root: str | Path) -> list[str]:
    """Names of the folders in `root`, each of which may be a split.

    Raises:
        FileNotFoundError: if `root` does not exist.
    """
    return _folder_names(require_folder(Path(root).expanduser()))


def is_image(path: str | Path) -> bool:
    """Whether a file name is one of an image; hidden files are not."""
    name = Path(path).name
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _split_folder(root: Path, split: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected DIR/SPLIT/CLASS/IMAGE, the folders in {root} "
            f"are: {listing(image_folder_splits(root), _LISTED)}"
        )
    return folder


def _class_names(folder: Path) -> list[str]:
    names = _folder_names(folder)
    if not names:
        raise UserError(f"{folder}: expected DIR/SPLIT/CLASS/IMAGE, but found no folder of a class")
    return names


def _folder_names(folder: Path) -> list[str]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path.name for path in paths if path.is_dir())
