"""The protocol of predictors: a trained network that takes images in any form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from deformnet._errors import UserError
from deformnet._files import replacing
from deformnet.data.files import read_image
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Resize
from deformnet.tasks.annotations import Annotation
from deformnet.tasks.images import ImageInput, as_image, require_image

_P = TypeVar("_P")
_Pair = tuple[float, float]
Size = tuple[int, int]
Device = torch.device | str | None


class Prepared(NamedTuple):
    """An image as a network sees it, and the map between the pixels of both.

    Places are (y, x), and whole numbers are centers of pixels.

    Attributes:
        input: [1, 3, h, w], normalized, on the device of the network.
        scale: pixels of the resized image per pixel of the image, vertically and horizontally.
        corner: first pixel of the input in the resized image; (0, 0) if nothing was cropped.
    """

    input: Tensor
    scale: _Pair
    corner: _Pair = (0, 0)

    @property
    def size(self) -> Size:
        """(h, w) of the input."""
        height, width = self.input.shape[-2:]
        return height, width

    def to_input(self, place: _Pair) -> _Pair:
        """A place of the image in the input; outside of it if that part was cropped."""
        y, x = (
            (at + 0.5) * scale - 0.5 - corner
            for at, scale, corner in zip(place, self.scale, self.corner, strict=True)
        )
        return y, x

    def to_image(self, places: Tensor) -> Tensor:
        """Places [..., 2] of the input in the image."""
        corner, scale = places.new_tensor(self.corner), places.new_tensor(self.scale)
        return (places + corner + 0.5) / scale - 0.5


class Bins(NamedTuple):
    """Bins of deformable RoI pooling in pixels of the image, [D, ph, pw, 4] each."""

    regular: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Inference:
    """One pass of a network over an image, kept for further questions.

    Attributes:
        annotation: the prediction.
        bins: bins of predicted boxes (those of `annotation`, or the best of them), moved as their
            classes move them; gives None without such pooling.
    """

    annotation: Annotation
    bins: Callable[[Annotation], Bins | None] = lambda boxes: None


class Predictor(ABC, Generic[_P]):
    """A trained network that takes images of any size.

    Args:
        model: the network.
        classes: names of its labels, without the background of detectors.
        short_side: shorter side of the network's input, in pixels.
        max_side: bound on the longer side, which wins over `short_side`; None for none.
        device: where to compute; None takes a GPU if there is one.
    Attributes:
        model: the network, in evaluation mode on `device`.
        classes: names of the labels.
        device: where it computes.
        pooling: name of the deformable RoI pooling in `model`; None if it has none.
        has_boxes: whether it predicts boxes.
        has_picture: whether `Annotation.draw` gives pictures of its predictions.
        sees_conv5: whether its predictions depend on conv5, where deformable layers are.
        lines: name of the file with a line for each image, if `write` makes one.
    """

    pooling: str | None = None
    has_boxes: ClassVar[bool] = False
    has_picture: ClassVar[bool] = True
    sees_conv5: bool = True
    lines: ClassVar[str | None] = None

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        short_side: int,
        max_side: int | None,
        device: Device = None,
    ) -> None:
        self.device = _device(device)
        self.classes = tuple(classes)
        self.model = ready(model, self.device)
        self._preparation = preparation(short_side, max_side)

    @overload
    def __call__(self, image: ImageInput, /) -> _P: ...

    @overload
    def __call__(self, image: list[ImageInput], /) -> list[_P]: ...

    def __call__(self, image: ImageInput | list[ImageInput], /) -> _P | list[_P]:
        """The prediction of an image, or of each in a list.

        Args:
            image: path (turned as its EXIF orientation says), PIL image, uint8 array [H, W, 3], or
                uint8 tensor [3, H, W], in RGB; or a list of those.
        Raises:
            ValueError, TypeError: for anything else.
            OSError: if a file cannot be read.
        """
        if isinstance(image, list):
            return [self.predict(as_image(one)) for one in image]
        return self.predict(as_image(image))

    @torch.inference_mode()
    def predict(self, image: Tensor) -> _P:
        """The prediction of an image uint8 [3, H, W], on the CPU."""
        return self._predict(self.prepare(image), (image.shape[1], image.shape[2]))

    def annotate(self, image: Tensor) -> Annotation:
        """The same, as what can be drawn and listed."""
        return self._annotation(self.predict(image), (image.shape[1], image.shape[2]))

    def prepare(self, image: Tensor) -> Prepared:
        """The input of the network for an image uint8 [3, H, W]."""
        batch = self._preparation(require_image(image))[None]
        (height, width), (h, w) = image.shape[-2:], batch.shape[-2:]
        batch = batch.to(self.device, memory_format=torch.channels_last)
        return Prepared(batch, (h / height, w / width))

    @torch.no_grad()
    def infer(self, prepared: Prepared, size: Size) -> Inference:
        """Runs the network once, without test-time augmentation.

        Args:
            prepared: the image.
            size: its height and width before it was prepared.
        """
        return Inference(self._annotation(self._predict(prepared, size), size))

    def arguments(self, prepared: Prepared) -> tuple[object, ...]:
        """The arguments to call `model` with."""
        return (prepared.input,)

    @abstractmethod
    def _predict(self, prepared: Prepared, size: Size) -> _P:
        """The prediction of one pass, on the CPU; arguments as of `infer`."""

    @abstractmethod
    def _annotation(self, prediction: _P, size: Size) -> Annotation:
        """A prediction for an image of this height and width, as what can be drawn and listed."""

    def write(
        self, files: Sequence[Path], out: Path, *, threshold: float = 0.5
    ) -> Iterator[tuple[Path, str | None]]:
        """Predicts image files into a folder.

        The file `lines` is replaced when all images are done; an interruption leaves an older one.

        Args:
            files: as `find_images` returns them; read as their EXIF orientation says.
            out: the folder.
            threshold: least score of a box that is drawn.
        Yields:
            Each file when it is done, with None or one line about what is wrong with it.
        Raises:
            OSError: if a result cannot be written.
        """
        with replacing(out / self.lines) if self.lines else nullcontext() as lines:
            for path in files:
                try:
                    image = read_image(path, orientation="upright")
                except OSError as error:
                    yield path, f"{path}: {error.strerror or error}"
                except ValueError as error:
                    yield path, str(error)
                else:
                    line = self._write(path, image, out, threshold)
                    if lines is not None:
                        lines.write(f"{line}\n".encode())
                    yield path, None

    @abstractmethod
    def _write(self, path: Path, image: Tensor, out: Path, threshold: float) -> str | None:
        """Predicts an image of this path; the pictures go into `out`, the line is returned."""


def _device(device: Device) -> torch.device:
    """The device of that name; a GPU for None, if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"expected device such as cpu or cuda:1, but got {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"expected a device that is here, but got {device}: PyTorch finds no GPU")
    return device


def ready(model: nn.Module, device: torch.device) -> nn.Module:
    """The network in evaluation mode on a device, in the memory format that is fastest."""
    return model.eval().to(device).to(memory_format=torch.channels_last)


def preparation(short_side: int, max_side: int | None) -> v2.Compose:
    """The transforms of evaluation, for an image alone."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([Resize(short_side, max_side), to_float, normalize])
