"""Locations of data sets: one folder, or separate images and annotations."""

from dataclasses import dataclass
from pathlib import Path

from deformnet.data.files import require_folder


@dataclass(frozen=True, init=False)
class DataFiles:
    """Images and annotations in separate places; they form one split, `train`.

    Attributes:
        images: folder of the images; subfolders are included.
        annotations: a COCO JSON file; or a folder of XML files, YOLO text files, labelme JSON
            files, or masks.
    """

    images: Path
    annotations: Path

    def __init__(self, images: str | Path, annotations: str | Path) -> None:
        object.__setattr__(self, "images", Path(images).expanduser())
        object.__setattr__(self, "annotations", Path(annotations).expanduser())

    @property
    def are_apart(self) -> bool:
        """False for a data set in one folder, which is both."""
        return self.images != self.annotations

    def __str__(self) -> str:
        return (
            f"{self.annotations} (images in {self.images})" if self.are_apart else str(self.images)
        )


Location = str | Path | DataFiles
"""Where a data set is."""


def locate(location: Location) -> DataFiles:
    """The folders of a data set; one folder is both.

    Raises:
        FileNotFoundError: if a file or folder does not exist.
        NotADirectoryError: if the images are not a folder.
    """
    if isinstance(location, DataFiles):
        require_folder(location.images)
        if not location.annotations.exists():
            raise FileNotFoundError(f"{location.annotations}: no such file or folder")
        return location
    root = require_folder(Path(location).expanduser())
    return DataFiles(root, root)
