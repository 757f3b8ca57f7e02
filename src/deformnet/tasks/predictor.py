"""The protocol of predictors: a trained network that takes images in any form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from deformnet._errors import UserError
from deformnet._files import require_writable, write_file
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Resize
from deformnet.tasks.annotations import Annotation
from deformnet.tasks.images import ImageInput, InputFile, as_image, require_image
from deformnet.tasks.results import (
    BoxFormat,
    Source,
    Written,
    problem,
    require_apart,
    sources,
)

_P = TypeVar("_P")
_A = TypeVar("_A", bound=Annotation)
Add = Callable[[str, str, _A], object]
"""Records a prediction; takes the image name, the path of its results, and the prediction."""
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
    """One pass of a network over an image, kept for further questions."""

    annotation: Annotation
    bins: Callable[[Annotation], Bins | None] = lambda boxes: None
    """Bins of predicted boxes (those of `annotation`, or the best of them), moved as their classes
    move them; None without such pooling."""


class Predictor(ABC, Generic[_P, _A]):
    """A trained network that takes images of any size.

    Args:
        model: the network.
        classes: names of its labels, without the background of detectors.
        short_side: shorter side of the network's input, in pixels.
        max_side: maximum longer side, which takes precedence; None for no limit.
        device: device to run on; None uses a GPU if there is one.
        upright: apply the EXIF orientation of images.
    Attributes:
        model: the network, in evaluation mode on `device`.
        classes: names of the labels.
        device: device of the model.
        pooling: name of the deformable RoI pooling in `model`; None if it has none.
        has_boxes: whether predictions have boxes.
        has_picture: whether predictions can be drawn with `Annotation.draw`.
        sees_conv5: whether predictions depend on conv5, which has the deformable layers.
        folders: folders of the pictures that `write` creates for an image, with their suffixes.
    """

    pooling: str | None = None
    has_boxes: ClassVar[bool] = False
    has_picture: ClassVar[bool] = True
    sees_conv5: bool = True
    folders: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        short_side: int,
        max_side: int | None,
        device: Device = None,
        *,
        upright: bool = True,
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    ) -> None:
        self.device = _device(device)
        self.upright = upright
        self.classes = tuple(classes)
        self.model = ready(model, self.device)
        self._preparation = preparation(short_side, max_side, interpolation)

    @overload
    def __call__(self, image: ImageInput, /) -> _A: ...

    @overload
    def __call__(self, image: list[ImageInput] | tuple[ImageInput, ...], /) -> list[_A]: ...

    def __call__(
        self, image: ImageInput | list[ImageInput] | tuple[ImageInput, ...], /
    ) -> _A | list[_A]:
        """Predicts an image, or each image of a list.

        Args:
            image: path, PIL image (for both, the EXIF orientation is applied), uint8 array
                [H, W, 3] or uint8 tensor [3, H, W] in RGB, or a list of these.
        Returns:
            Tensors on the CPU, with `plot()` for a picture and `to_dict()` for plain values.
        Raises:
            ValueError, TypeError: if `image` is anything else.
            OSError: if a file cannot be read.
        """
        if isinstance(image, list | tuple):
            return [self._of_any(one) for one in image]
        return self._of_any(image)

    def _of_any(self, image: ImageInput) -> _A:
        pixels = as_image(image, upright=self.upright)
        place = f"{image}: " if isinstance(image, str | Path) else ""
        try:
            return self.annotate(pixels)
        except UserError as error:
            raise UserError(f"{place}{error}") from error

    @torch.inference_mode()
    def predict(self, image: Tensor) -> _P:
        """The raw prediction for an image uint8 [3, H, W], on the CPU."""
        return self._predict(self.prepare(image), (image.shape[1], image.shape[2]))

    def annotate(self, image: Tensor) -> _A:
        """The prediction as an annotation that can be drawn; it keeps the image."""
        return self._annotation(self.predict(image), (image.shape[1], image.shape[2]), image)

    def prepare(self, image: Tensor) -> Prepared:
        """The input of the network for an image uint8 [3, H, W]."""
        batch = self._preparation(require_image(image))[None]
        (height, width), (h, w) = image.shape[-2:], batch.shape[-2:]
        batch = batch.to(self.device, memory_format=torch.channels_last)
        return Prepared(batch, (h / height, w / width))

    @torch.no_grad()
    def infer(self, prepared: Prepared, size: Size) -> Inference:
        """Runs the network once, without augmentation; `size` is the image's before preparation."""
        return Inference(self._annotation(self._predict(prepared, size), size))

    def arguments(self, prepared: Prepared) -> tuple[object, ...]:
        """The arguments to call `model` with."""
        return (prepared.input,)

    @abstractmethod
    def _predict(self, prepared: Prepared, size: Size) -> _P:
        """The prediction of one pass, on the CPU; arguments as of `infer`."""

    @abstractmethod
    def _annotation(self, prediction: _P, size: Size, image: Tensor | None = None) -> _A:
        """A prediction for an image of this height and width, as what can be drawn and listed."""

    def write(
        self,
        files: Sequence[InputFile],
        out: Path,
        *,
        threshold: float = 0.5,
        box_format: BoxFormat = "jsonl",
    ) -> Iterator[Written]:
        """Predicts image files and video frames, and writes the results to a folder.

        An image that is too large or cannot be read is skipped. A file for all images is replaced
        when all of them are done; if the call is interrupted, an older file stays as it is.

        Args:
            files: files returned by `find_images`.
            out: output folder.
            threshold: minimum score of the boxes to draw.
            box_format: format of the detection file; only for detectors.
        Returns:
            An iterator over the images, in the order in which they are done.
        Raises:
            UserError: if a result would overwrite an input or annotations, the threshold is not
                between 0 and 1, or a format is given for a network without boxes; raised
                immediately.
            OSError: if `out` cannot be written to (raised immediately), or a result cannot be
                written (raised during iteration).
        """
        if box_format != "jsonl" and not self.has_boxes:
            raise UserError(f"expected no format for a network without boxes, but got {box_format}")
        if not 0 <= threshold <= 1:
            raise UserError(f"expected threshold to be 0 to 1, but got {threshold}")
        require_apart(files, out, self.folders, box_format)
        require_writable(out)
        return self._written(files, out, threshold, box_format)

    def _written(
        self, files: Sequence[InputFile], out: Path, threshold: float, box_format: BoxFormat
    ) -> Iterator[Written]:
        with self._listed(out, box_format) as add:
            for file in files:
                for source in sources(file, upright=self.upright):
                    try:
                        yield self._write(source, out, threshold, add)
                    except (OSError, UserError, RuntimeError, MemoryError) as error:
                        if (text := problem(source.path, error)) is None:
                            raise
                        yield Written(source.name, text)

    def _write(self, source: Source, out: Path, threshold: float, add: Add[_A]) -> Written:
        try:
            image = source.read()
        except OSError as error:
            return Written(source.name, f"{source.path}: {error.strerror or error}")
        except ValueError as error:
            return Written(source.name, str(error))
        annotation = self.annotate(image)
        try:
            pictures = self._pictures(annotation, threshold)
        except (OSError, ValueError) as error:  # of Pillow: JPEG has at most 65,500 pixels a side
            return Written(source.name, f"{source.path}: cannot write a picture of it ({error})")
        for folder, content in pictures.items():
            write_file(out / folder / f"{source.result}{self.folders[folder]}", content)
        add(source.name, source.result, annotation)
        scores = annotation.scores
        if scores is None or not len(scores):
            return Written(source.name)
        return Written(
            source.name, boxes=int((scores >= threshold).sum()), best=float(scores.max())
        )

    def _pictures(self, annotation: _A, threshold: float) -> dict[str, bytes]:
        """The encoded pictures of a prediction, by folder."""
        return {}

    def _listed(self, out: Path, box_format: BoxFormat) -> AbstractContextManager[Add[_A]]:
        """Context manager of the file that lists the predictions of all images."""
        return nullcontext(lambda name, result, annotation: None)


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
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError):  # such as cuda:99 or meta, or not in this build
        raise UserError(f"expected a device that is usable here, but got {device}") from None
    return device


def ready(model: nn.Module, device: torch.device) -> nn.Module:
    """The network in evaluation mode on a device, in the memory format that is fastest."""
    return model.eval().to(device).to(memory_format=torch.channels_last)


def preparation(
    short_side: int, max_side: int | None, interpolation: InterpolationMode
) -> v2.Compose:
    """The transforms of evaluation, for an image alone."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return v2.Compose([Resize(short_side, max_side, interpolation), to_float, normalize])
