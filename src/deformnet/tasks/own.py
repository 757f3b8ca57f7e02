"""Adapters from torch data sets to the tasks.

Item i is (image, target). The image is uint8 [3, H, W] or a PIL image, whose EXIF orientation is
ignored; the target is

- for segmentation, a mask: integers [H, W] with class indices or 255 (void);
- for detection, a dict: `boxes` [n, 4] (x1, y1, x2, y2 in pixels), `labels` [n] (class indices)
  and, optionally, `ignored` (bool [n], objects that are neither trained on nor scored);
- for classification, a class index.

The data set has an attribute `classes` with the class names; indices start at 0. Images are named
by their index, with leading zeros. Items are validated when they are read. The recipe resizes,
augments and normalizes images, so the data set should not.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format

from deformnet._errors import UserError
from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations
from deformnet.data.files import listing
from deformnet.data.location import Location
from deformnet.tasks.images import as_image

_CORNERS = tv_tensors.BoundingBoxFormat.XYXY

Data = Location | Dataset[Any]


def place(data: Data) -> str:
    """Name of a data set in messages."""
    return str(data) if isinstance(data, Location) else type(data).__name__


class OwnData:
    """Images with targets.

    Attributes:
        root: type name of the data set, for messages.
        classes: class names; their indices are the labels.
    Raises:
        UserError: if the data set has no length, no images or no class names.
    """

    def __init__(self, items: Dataset[Any]) -> None:
        self.root = place(items)
        self.classes = self._classes(items)
        try:
            self._length = len(items)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise UserError(f"{self.root}: expected a data set with a length ({error})") from error
        if not self._length:
            raise UserError(f"{self.root}: expected images, but the data set is empty")
        self._items = items

    def _classes(self, items: object) -> tuple[str, ...]:
        whole = items
        while not hasattr(whole, "classes") and hasattr(whole, "dataset"):  # a torch Subset
            whole = whole.dataset  # pyright: ignore[reportAttributeAccessIssue]
        names = getattr(whole, "classes", None)
        if not isinstance(names, Sequence) or isinstance(names, str) or not names:
            raise UserError(
                f"{self.root}: expected a data set with `classes`, a list of class names, but "
                f"got {names!r}"
            )
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise UserError(
                f"{self.root}: expected `classes` to be unique names, but got {names!r}"
            )
        return tuple(names)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """The index with leading zeros, so that names sort by index."""
        return f"{index:0{len(str(self._length - 1))}}"

    def _item(self, index: int) -> tuple[tv_tensors.Image, Any]:
        item = self._items[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise self._error(index, f"(image, target), but got {_described(item)}")
        image, target = item
        try:
            return tv_tensors.Image(as_image(image, upright=False)), target
        except (TypeError, ValueError) as error:
            hint = "; the recipe normalizes images" if _is_float(image) else ""
            raise UserError(f"{self.root}[{index}]: {error}{hint}") from error

    def _error(self, index: int, expected: str) -> UserError:
        return UserError(f"{self.root}[{index}]: expected {expected}")

    def _labels(self, index: int, labels: Tensor) -> None:
        """Raises UserError for labels that are not class indices."""
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if len(wrong):
            raise self._error(
                index,
                f"labels from 0 to {len(self.classes) - 1} ({listing(self.classes, 5)}), but got "
                f"label {int(wrong[0])}",
            )


class OwnMasks(OwnData):
    """Images with label maps."""

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image uint8 [3, H, W] and mask uint8 [H, W]; UserError for anything else."""
        image, target = self._item(index)
        mask = _tensor(target)
        size = list(image.shape[1:])
        if mask is None or mask.is_floating_point() or list(mask.shape) != size:
            got = _described(target)
            raise self._error(
                index, f"an integer mask {size}, as large as its image, but got {got}"
            )
        labels = mask.long()
        self._labels(index, labels[labels != IGNORE])
        return image, tv_tensors.Mask(labels.to(torch.uint8))

    def require_labels(self) -> None:
        """
        Raises:
            UserError: if all pixels are void.
        """
        if all((self[index][1] == IGNORE).all() for index in range(len(self))):
            raise UserError(
                f"{self.root}: expected pixels of the classes {listing(self.classes, 5)} to train "
                f"on, but all pixels of all {len(self)} masks are void ({IGNORE})"
            )


class OwnBoxes(OwnData):
    """Images with boxes. Boxes are clipped to the image; boxes without area are dropped."""

    has_ground_truth = True

    def annotations(self, index: int) -> BoxAnnotations:
        """Objects of an image."""
        return self[index][1]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, BoxAnnotations]:
        """Image uint8 [3, H, W] and its objects; UserError for anything else."""
        image, target = self._item(index)
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(target):
            got = list(target) if isinstance(target, Mapping) else _described(target)
            raise self._error(index, f"a dict with boxes and labels, but got {got}")
        boxes = self._boxes(index, target["boxes"])
        labels = self._vector(index, "labels", target["labels"], len(boxes)).long()
        self._labels(index, labels)
        given = target.get("ignored")
        ignored = torch.zeros(len(boxes), dtype=torch.bool)
        if given is not None:
            ignored = self._vector(index, "ignored", given, len(boxes)).bool()
        height, width = image.shape[1:]
        bounds = torch.tensor([width, height, width, height])
        clipped = boxes.clamp(min=0).minimum(bounds)
        kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        wrapped = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue] (it has a __new__)
            clipped[kept], format=_CORNERS, canvas_size=(height, width)
        )
        return image, BoxAnnotations(wrapped, labels[kept], ignored[kept])

    def _boxes(self, index: int, given: Any) -> Tensor:
        if isinstance(given, tv_tensors.BoundingBoxes):
            given = convert_bounding_box_format(given, new_format=_CORNERS)
        boxes = _tensor(given)
        if boxes is not None and not boxes.numel():
            boxes = boxes.reshape(0, 4)
        if boxes is None or boxes.ndim != 2 or boxes.shape[1] != 4:
            raise self._error(index, f"boxes [n, 4], but got {_described(given)}")
        boxes = boxes.as_subclass(Tensor).float()
        wrong = ~boxes.isfinite().all(dim=1) | (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
        if wrong.any():
            raise self._error(
                index, f"finite boxes x1, y1, x2, y2, but got {boxes[wrong][0].tolist()}"
            )
        return boxes

    def _vector(self, index: int, name: str, given: Any, length: int) -> Tensor:
        values = _tensor(given)
        if values is not None and not values.numel():
            values = values.reshape(0).long()
        if values is None or values.is_floating_point() or list(values.shape) != [length]:
            got = _described(given)
            raise self._error(index, f"{name} to be {length} integers, one per box, but got {got}")
        return values.as_subclass(Tensor)


class OwnClasses(OwnData):
    """Images with one class each."""

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, int]:
        """Image uint8 [3, H, W] and its label; UserError for anything else."""
        image, target = self._item(index)
        try:
            label = operator.index(target)
        except TypeError:
            got = _described(target)
            raise self._error(index, f"a class index, but got {got}") from None
        self._labels(index, torch.tensor([label]))
        return image, label


def _tensor(value: Any) -> Tensor | None:
    """Converts numbers in any form to a tensor; returns None for anything else."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Image.Image):
        return torch.from_numpy(np.array(value))
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _described(value: object) -> str:
    """Type of a value and, for numbers, their shape."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Image.Image):
        return f"a PIL image of mode {value.mode}, {value.width}x{value.height}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
