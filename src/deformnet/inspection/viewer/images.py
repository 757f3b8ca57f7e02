"""Which images the page shows, and what is known of them."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from deformnet.data import (
    BoxAnnotations,
    DetectionDataset,
    ImageFolderClassification,
    open_detection,
    open_segmentation,
)
from deformnet.data.base import SegmentationDataset
from deformnet.data.files import read_image
from deformnet.inference import (
    ClassificationPredictor,
    DetectionPredictor,
    SegmentationPredictor,
    find_images,
)

LARGEST_FILE = 25 * 2**20
"""Bytes of a file."""
MOST_PIXELS = 30_000_000
"""Of an image. A small file can claim to hold far more than the memory does."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

Truth = Tensor | BoxAnnotations | int | None
"""Of an image: a label map uint8 [H, W], boxes with labels, a label, or nothing."""


class Known(NamedTuple):
    """An image uint8 [3, H, W] with what is known to be in it."""

    image: Tensor
    truth: Truth = None


def open_image(path: Path) -> Tensor:
    """An image that somebody gave: upright, RGB, uint8 [3, H, W].

    Raises:
        ValueError, OSError: as `require_image`, and if it is damaged.
    """
    require_image(path)
    try:
        return read_image(path, upright=True)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


def require_image(path: Path) -> None:
    """Only the head of the file is read.

    Raises:
        ValueError: one line that begins with the file's name (not its folder, which may be a
            temporary one), if the file is too large, no image, or has too many pixels.
        FileNotFoundError: if it is no file.
        OSError: if the file cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path.name}: no such file")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(
            f"{path.name}: the file has {size / 2**20:.0f} MB; "
            f"wanted at most {LARGEST_FILE / 2**20:.0f} MB"
        )
    try:
        with Image.open(path, formats=_FORMATS) as head:
            width, height = head.size
    except (UnidentifiedImageError, Image.DecompressionBombError):
        # Pillow's own limit on pixels is higher than ours, and it keeps the size to itself.
        raise ValueError(
            f"{path.name}: not an image that can be read; wanted one of {', '.join(_FORMATS)} "
            f"with at most {MOST_PIXELS / 1e6:.0f} million pixels"
        ) from None
    except (SyntaxError, ValueError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # not of what is in the file
        raise ValueError(f"{path.name}: not a readable image ({error})") from error
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{path.name}: the image has {width}x{height} pixels; "
            f"wanted at most {MOST_PIXELS / 1e6:.0f} million"
        )


class Images:
    """The images that can be chosen on the page. Abstract.

    Attributes:
        names: of the images.
    """

    names: Sequence[str]

    @abstractmethod
    def load(self, index: int) -> Known:
        """
        Raises:
            ValueError, OSError: one line that names the file, if it cannot be read.
        """


class ImageFiles(Images):
    """Files, and in the place of folders the images in them.

    Raises:
        FileNotFoundError: if there is no such file or folder, or a folder holds no image.
        ValueError: if two files have the same name, or a file that is named is not an image.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = find_images(paths)
        for path in paths:
            if not path.is_dir():  # what is wrong with a file of a folder is said when it is chosen
                require_image(path)
        self.names = [path.name for path in self._files]

    def load(self, index: int) -> Known:
        return Known(open_image(self._files[index]))


class LabelledImages(Images):
    """A part of a data set, of the kind and the classes that a network was trained on."""

    def __init__(
        self, data: SegmentationDataset | DetectionDataset | ImageFolderClassification
    ) -> None:
        self._data = data
        self.names = [data.name(index) for index in range(len(data))]

    @classmethod
    def open(
        cls,
        predictor: SegmentationPredictor | DetectionPredictor | ClassificationPredictor,
        root: Path,
        split: str,
    ) -> "LabelledImages":
        """
        Raises:
            FileNotFoundError, ValueError: as the functions that open data sets; also if its classes
                are not those of the network.
        """
        if isinstance(predictor, SegmentationPredictor):
            data = open_segmentation(root, split)
        elif isinstance(predictor, DetectionPredictor):
            data = open_detection(root, split)
        else:
            data = ImageFolderClassification(root, split)
        if tuple(data.classes) != tuple(predictor.classes):
            raise ValueError(
                f"{root}: has the classes {', '.join(data.classes)}; "
                f"the network knows {', '.join(predictor.classes)}"
            )
        return cls(data)

    def load(self, index: int) -> Known:
        image, truth = self._data[index]
        return Known(image.as_subclass(Tensor), truth)
