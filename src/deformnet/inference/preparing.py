"""From an image to a network's input, and where its pixels went: the same for all predictors."""

from typing import NamedTuple

import torch
from torch import Tensor

_Pair = tuple[float, float]


class Prepared(NamedTuple):
    """An image as a network sees it, and how its pixels lie in the image.

    Places are (y, x), and whole numbers are centres of pixels.

    Attributes:
        input: [1, 3, h, w], normalised, on the device of the network.
        scale: pixels of the resized image to one of the image, down and across.
        corner: where in the resized image the input begins; (0, 0) if nothing was cut off.
    """

    input: Tensor
    scale: _Pair
    corner: _Pair = (0, 0)

    @classmethod
    def whole(cls, input: Tensor, image: Tensor) -> "Prepared":
        """The input that an image was resized to."""
        (height, width), (h, w) = image.shape[-2:], input.shape[-2:]
        return cls(input, (h / height, w / width))

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the input."""
        height, width = self.input.shape[-2:]
        return height, width

    def to_input(self, place: _Pair) -> _Pair:
        """A place of the image in the input; outside it, if that part of the image was cut off."""
        y, x = (
            (at + 0.5) * scale - 0.5 - corner
            for at, scale, corner in zip(place, self.scale, self.corner, strict=True)
        )
        return y, x

    def to_image(self, places: Tensor) -> Tensor:
        """Places [..., 2] of the input in the image."""
        corner, scale = places.new_tensor(self.corner), places.new_tensor(self.scale)
        return (places + corner + 0.5) / scale - 0.5


def require_image(image: Tensor) -> None:
    """
    Raises:
        ValueError: if it is not uint8 [3, H, W], or has no pixels.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; for None a GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
