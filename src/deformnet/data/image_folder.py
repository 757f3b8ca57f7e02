"""Images that are sorted into a folder for each class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, VisionDataset

from deformnet.data.base import require_folder
from deformnet.data.files import read_image
from deformnet.data.splits import split_parts

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_NAMED = 5  # as many names are listed in a message; ImageNet has a thousand


@final
class ImageFolderClassification(VisionDataset):
    """Images and their classes in the layout of torchvision's `ImageFolder`.

    ```
    <split>/<class>/<any name>.jpg     also .jpeg, .png, .bmp, .webp, .tif, .tiff, or in capitals
    ```

    A split is a folder, or several joined by `+` (`train+val`). The classes are the names of the
    folders in `train`, sorted, also for the other splits: one that lacks a class still has the
    same labels. Where there is no `train` they are those of the (first) split itself. Files and
    folders whose name begins with a dot do not count.

    Attributes:
        classes: names of the classes; their places are the labels.
        samples: the file of each image and its label.
        transform: called with an image (uint8 [3, H, W]); None for no change.
    """

    def __init__(
        self, root: Path, split: str, transform: Callable[[tv_tensors.Image], Tensor] | None = None
    ) -> None:
        """
        Raises:
            FileNotFoundError: if `root` or the folder of a split is missing; the message says
                which folders there are.
            ValueError: if a split has no classes, a class no image, or the split a class that
                `train` lacks.
        """
        root = Path(root).expanduser()
        folders = [_split_folder(root, name) for name in split_parts(split)]
        super().__init__(root, transform=transform)
        self.split = split
        labelled = root / "train" if (root / "train").is_dir() else folders[0]
        self.classes = tuple(_class_names(labelled))
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        for folder in folders:
            names = _class_names(folder)
            for name in names:
                if name not in label_of:
                    raise ValueError(f"{folder / name}: there is no class {name} in {labelled}")
            found = ImageFolder.make_dataset(
                str(folder),
                {name: label_of[name] for name in names},
                is_valid_file=_is_image,
                allow_empty=True,
            )
            with_images = {label for _, label in found}
            for name in names:
                if label_of[name] not in with_images:
                    raise ValueError(f"{folder / name}: no image in it ({', '.join(_SUFFIXES)})")
            self.samples += found

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """The path of an image below the root: `val/cat/1.jpg`."""
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Returns:
            image uint8 [3, H, W], RGB whatever the file has, turned as its EXIF orientation says
            (no label depends on the stored pixels), or what `transform` makes of it; its label.
        Raises:
            ValueError: one line that names the file, if it is unreadable.
        """
        path, label = self.samples[index]
        image = tv_tensors.Image(read_image(Path(path), upright=True))
        return (image if self.transform is None else self.transform(image)), label

    def extra_repr(self) -> str:
        return f"Split: {self.split}"


def image_folder_splits(root: Path) -> list[str]:
    """The names of the folders in `root`, each of which may be a split.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    return _folder_names(require_folder(Path(root).expanduser()))


def _split_folder(root: Path, split: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        known = _some(image_folder_splits(root)) or "none"
        raise FileNotFoundError(
            f"{folder}: no such folder; wanted DIR/SPLIT/CLASS/IMAGE, the folders in {root} are: "
            f"{known}"
        )
    return folder


def _class_names(folder: Path) -> list[str]:
    names = _folder_names(folder)
    if not names:
        raise ValueError(f"{folder}: no folder of a class in it; wanted DIR/SPLIT/CLASS/IMAGE")
    return names


def _folder_names(folder: Path) -> list[str]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path.name for path in paths if path.is_dir())


def _is_image(path: str) -> bool:
    name = Path(path).name
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
