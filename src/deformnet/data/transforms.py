"""Transforms from images with their label maps, boxes or classes to inputs of a network.

All randomness comes from torch's global generator, so a seed reproduces it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from deformnet._errors import UserError
from deformnet.data.base import IGNORE
from deformnet.data.boxes import BoxAnnotations

SegmentationTransforms = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]
DetectionTransforms = Callable[[tv_tensors.Image, BoxAnnotations], tuple[Tensor, BoxAnnotations]]
ImageTransforms = Callable[[tv_tensors.Image], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Principal components of the colors of ImageNet's pixels (0 to 1): variances, and directions as
# the columns of rows R, G, B. The numbers of Facebook's fb.resnet.torch.
_COLOR_VARIANCES = (0.2175, 0.0188, 0.0045)
_COLOR_DIRECTIONS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_COLOR_SPREAD = 0.1

_COLOR_JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03}
_MOST_PIXELS = 10**8
_CROPS = 10  # maximum number of draws until a crop has an object


def segmentation_training_transforms(
    *,
    short_side: int,
    max_side: int | None,
    crop: tuple[int, int] | None,
    flip: bool,
    scale_jitter: tuple[float, float] | None = None,
    color_jitter: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> SegmentationTransforms:
    """Resize, random crop, random horizontal flip, random change of colors, normalize.

    Args:
        short_side: length of the shorter side after resizing, in pixels (the paper: 360 for VOC,
            1024 for Cityscapes).
        max_side: maximum length of the longer side, which overrides `short_side`; None for no
            limit.
        crop: (height, width) of the random crop. A smaller image is placed at random on the mean
            color, and its mask on void. None for the whole image.
        flip: flip horizontally with probability 0.5.
        scale_jitter: minimum and maximum factor for both lengths, drawn uniformly for each image;
            None disables it.
        color_jitter: randomly change brightness, contrast, saturation and hue.
        interpolation: how images are resized.
    Returns:
        A function of an image (uint8 [3, H, W]) and a mask ([H, W]). It returns float32 [3, h, w],
        normalized with ImageNet's mean and standard deviation, and int64 [h, w].
    Raises:
        UserError: if a size is not positive, or the factors are not in ascending order.
    """
    steps = [_resize(short_side, max_side, scale_jitter, interpolation)]
    if crop is not None:
        steps.append(_random_crop(crop))
    return v2.Compose([*steps, *_flip(flip), *_jitter(color_jitter), *_to_network()])


def flip_transforms(*, flip: bool) -> SegmentationTransforms:
    """The random part of training transforms without jitter or crops, with the same random numbers.

    Masks keep their size and dtype.
    """
    return v2.Compose([*_flip(flip), v2.ToPureTensor()])


def without_image(
    transforms: Callable[..., tuple[Any, Any]],
    target: Tensor,
) -> tuple[Tensor, bool]:
    """What training transforms make of a mask or boxes (of `tv_tensors`) whose image is not read,
    with the same random numbers; and whether they flip it."""
    corner = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue] (it has a __new__)
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]), format="XYXY", canvas_size=(2, 2)
    )
    target, corner = transforms(target, corner)
    return target, bool(corner[0, 0] > 0)


def segmentation_evaluation_transforms(
    *,
    short_side: int,
    max_side: int | None,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> SegmentationTransforms:
    """Resize and normalize; arguments, result and errors of `segmentation_training_transforms`.

    The mask is resized, too: predictions are scored at the size of the network's input, as in the
    authors' code (on VOC: mean IoU at 360 pixels).
    """
    return v2.Compose([Resize(short_side, max_side, interpolation), *_to_network()])


def detection_transforms(
    *,
    short_side: int,
    max_side: int | None,
    flip: bool,
    crop: tuple[int, int] | None = None,
    scale_jitter: tuple[float, float] | None = None,
    color_jitter: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> DetectionTransforms:
    """Resize, random horizontal flip, normalize; for evaluation, without the flip.

    Boxes are scaled by the exact factors of the image (its rounded size over its original size). A
    crop clips boxes, and drops boxes smaller than a pixel.

    Args:
        short_side, max_side, flip, scale_jitter, color_jitter, interpolation: see
            `segmentation_training_transforms`, also for errors (the paper: 600 and 1000).
        crop: (height, width) of the random crop, which is drawn again, up to 10 times, if it has no
            object to train on. A smaller image is placed at random on the mean color. None for the
            whole image.
    Returns:
        A function of an image (uint8 [3, H, W]) and its annotations. It returns float32 [3, h, w],
        normalized with ImageNet's mean and standard deviation, and annotations with boxes in its
        pixels, all plain tensors.
    """
    steps = [_resize(short_side, max_side, scale_jitter, interpolation), v2.ClampBoundingBoxes()]
    if crop is not None:
        steps.append(RandomBoxCrop(crop))
    return v2.Compose([*steps, *_flip(flip), *_jitter(color_jitter), *_to_network()])


def classification_training_transforms(
    *,
    resize: tuple[int, int],
    crop: int,
    flip: bool,
    color_jitter: bool,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> ImageTransforms:
    """Random resize, random crop, random horizontal flip, random color shift, normalize.

    The augmentation of He et al. 2016 ("Deep residual learning for image recognition", section
    3.4).

    Args:
        resize: minimum and maximum length of the shorter side after resizing, in pixels, drawn
            uniformly.
        crop: side of the random square crop.
        flip: flip horizontally with probability 0.5.
        color_jitter: shift the colors as Krizhevsky et al. 2012 (section 4.1).
        interpolation: how images are resized.
    Returns:
        A function of an image (uint8 [3, H, W]). It returns float32 [3, crop, crop], normalized
        with ImageNet's mean and standard deviation.
    Raises:
        UserError: for sizes that are not positive or not in order, and for a crop larger than the
            resized image may be.
    """
    smallest, largest = resize
    if largest < smallest:
        raise UserError(f"expected resize to be (minimum, maximum), but got {resize}")
    _require_crop(crop, smallest)
    steps: list[v2.Transform] = [
        *(RandomResize(smallest, largest, interpolation), v2.RandomCrop(crop))
    ]
    color = [v2.ToDtype(torch.float32, scale=True), PCAColorJitter()] if color_jitter else []
    return v2.Compose([*steps, *_flip(flip), *color, *_to_network()])


def classification_evaluation_transforms(
    *, short_side: int, crop: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> ImageTransforms:
    """Resize, center crop, normalize; result of `classification_training_transforms`.

    Args:
        short_side: length of the shorter side after resizing, in pixels.
        crop: side of the square crop.
        interpolation: how images are resized.
    Raises:
        UserError: for sizes that are not positive, and for a crop larger than the resized image.
    """
    _require_crop(crop, short_side)
    resize = Resize(short_side, None, interpolation)
    return v2.Compose([resize, v2.CenterCrop(crop), *_to_network()])


def _resize(
    short_side: int,
    max_side: int | None,
    scale_jitter: tuple[float, float] | None,
    interpolation: InterpolationMode,
) -> v2.Transform:
    resize = Resize(short_side, max_side, interpolation)
    return resize if scale_jitter is None else ScaleJitter(resize, *scale_jitter)


def _random_crop(crop: tuple[int, int]) -> v2.RandomCrop:
    for side in crop:
        _require_positive("crop", side)
    if math.prod(crop) > _MOST_PIXELS:
        raise UserError(
            f"expected a crop of at most {_MOST_PIXELS // 10**6} million pixels, but got {crop}"
        )
    mean_color = [round(255 * channel) for channel in IMAGENET_MEAN]
    fill = {tv_tensors.Image: mean_color, tv_tensors.Mask: IGNORE}
    return v2.RandomCrop(crop, pad_if_needed=True, fill=fill)


def _flip(flip: bool) -> list[v2.Transform]:
    return [v2.RandomHorizontalFlip()] if flip else []


def _jitter(jitter: bool) -> list[v2.Transform]:
    return [v2.ColorJitter(**_COLOR_JITTER)] if jitter else []


def _to_network() -> list[v2.Transform]:
    dtypes: dict[type | str, torch.dtype | None] = {
        tv_tensors.Image: torch.float32,
        tv_tensors.Mask: torch.int64,
        "others": None,
    }
    return [
        v2.ToDtype(dtypes, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]


class Resize(v2.Transform):
    """Resizes the shorter side to a given length, up to a maximum of the longer one.

    Images with antialiasing, masks by the nearest pixel, boxes by the same factors.
    `v2.Resize` does not serve: before torchvision 0.29 it samples masks at the corner of the target
    pixel instead of its center, which shifts labels against the image, and it truncates the longer
    side, which the authors' code rounds.

    Args:
        short_side: length of the shorter side, in pixels.
        max_side: maximum length of the longer side; None for no limit.
        interpolation: of images.
    """

    def __init__(
        self,
        short_side: int,
        max_side: int | None,
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__()
        _require_positive("short_side", short_side)
        if max_side is not None:
            _require_positive("max_side", max_side)
        self.short_side = short_side
        self.max_side = max_side
        self.interpolation = interpolation

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image of this size after resizing.

        Raises:
            UserError: if a long, narrow image would be too large after resizing.
        """
        short, long = min(height, width), max(height, width)
        scale = self.short_side / short
        if self.max_side is not None and scale * long > self.max_side:
            scale = self.max_side / long
        resized = max(1, round(scale * height)), max(1, round(scale * width))
        if math.prod(resized) > _MOST_PIXELS:
            raise UserError(
                f"expected an image of at most {_MOST_PIXELS // 10**6} million pixels after "
                f"resizing, but got one of {width}x{height}, resized to {resized[1]}x{resized[0]}; "
                "crop it or leave it out"
            )
        return resized

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        boxes = isinstance(inpt, tv_tensors.BoundingBoxes)
        before = inpt.canvas_size if boxes else tuple(inpt.shape[-2:])
        size = self.size(*before)
        if size == before:
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            plain = inpt.as_subclass(Tensor)[None]
            mode = InterpolationMode.NEAREST_EXACT
            return tv_tensors.Mask(F.resize(plain, list(size), interpolation=mode)[0])
        return F.resize(inpt, list(size), interpolation=self.interpolation, antialias=True)


class ScaleJitter(v2.Transform):
    """Resizes with both lengths multiplied by a random factor.

    Args:
        resize: the transform at factor 1.
        smallest, largest: minimum and maximum factor.
    """

    def __init__(self, resize: Resize, smallest: float, largest: float) -> None:
        super().__init__()
        if not 0 < smallest <= largest < math.inf:
            raise UserError(
                f"expected scale_jitter to be positive and ascending, but got {(smallest, largest)}"
            )
        self.resize = resize
        self.smallest = smallest
        self.largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.smallest + (self.largest - self.smallest) * float(torch.rand(()))
        short_side, max_side = self.resize.short_side, self.resize.max_side
        bound = None if max_side is None else max(1, round(factor * max_side))
        short_side = max(1, round(factor * short_side))
        return {"resize": Resize(short_side, bound, self.resize.interpolation)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return params["resize"].transform(inpt, {})


class RandomBoxCrop(v2.Transform):
    """Crops an image and its `BoxAnnotations` at random, and keeps an object if there is one.

    Ignored objects do not count.

    Args:
        crop: height and width.
    """

    def __init__(self, crop: tuple[int, int]) -> None:
        super().__init__()
        self._crop = _random_crop(crop)
        self._sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: inputs[1][1:])

    def forward(self, *inputs: Any) -> Any:
        image, objects = inputs
        wanted = _has_objects(objects)
        cropped = self._sanitize(*self._crop(image, objects))
        for _ in range(_CROPS - 1):
            if not wanted or _has_objects(cropped[1]):
                break
            cropped = self._sanitize(*self._crop(image, objects))
        return cropped


def _has_objects(objects: BoxAnnotations) -> bool:
    # Negative labels mark boxes that only move with the objects.
    return bool((~objects.ignored & (objects.labels >= 0)).any())


class RandomResize(v2.Transform):
    """Resizes as `Resize`, to a random length of the shorter side.

    (`v2.RandomShortestSize` may end a pixel below the length that it drew, too small for a crop of
    that size.)

    Args:
        smallest, largest: bounds of the shorter side, both included, in pixels.
        interpolation: see `Resize`.
    """

    def __init__(self, smallest: int, largest: int, interpolation: InterpolationMode) -> None:
        super().__init__()
        self.interpolation = interpolation
        self.smallest = smallest
        self.largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        short_side = int(torch.randint(self.smallest, self.largest + 1, ()))
        return {"resize": Resize(short_side, None, self.interpolation)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return params["resize"].transform(inpt, {})


class PCAColorJitter(v2.Transform):
    """Shifts all pixels of an image along the principal components of ImageNet's colors.

    Krizhevsky et al. 2012, section 4.1: the sum of the components, each times its variance and a
    normal variable of standard deviation 0.1, drawn once per image. For float images [3, H, W] from
    0 to 1, which are not clipped.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        amounts = _COLOR_SPREAD * torch.randn(3) * torch.tensor(_COLOR_VARIANCES)
        return {"shift": (torch.tensor(_COLOR_DIRECTIONS) @ amounts)[:, None, None]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.Image(inpt + params["shift"])


def _require_crop(crop: int, short_side: int) -> None:
    _require_positive("crop", crop)
    if crop > short_side:
        raise UserError(
            f"expected crop to be at most the shorter side of the resized image ({short_side}), "
            f"but got {crop}"
        )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"expected {name} to be at least 1, but got {value}")
