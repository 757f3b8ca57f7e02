"""Effective dilation of deformable filters (Dai et al. 2017, section 4.2 and Table 2)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis.fields import FieldTracer, ReceptiveField
from deformnet.analysis.layers import (
    Call,
    Kernel,
    deformable_layers,
    evaluating,
    recording_calls,
    size_of,
    the_only,
)

SMALL_AREA = 96**2
"""Maximum area of small objects in pixels, exclusive (Table 2)."""
LARGE_AREA = 224**2
"""Minimum area of large objects in pixels, exclusive; medium objects are in between."""


def effective_dilation(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Effective dilation of every filter of the deformable convolutions, by layer.

    The effective dilation is the mean distance between horizontally or vertically adjacent sampling
    locations of a filter (12 pairs in a 3x3 kernel), in pixels of the layer's input. Without
    offsets it is the layer's dilation.

        >>> dilation = effective_dilation(model, images)["layer4.2.conv2"].mean(1)  # over groups

    Args:
        model: Model with deformnet's or torchvision's `DeformConv2d`; run once, in evaluation mode
            without gradients.
        images: Input [N, 3, H, W] of the model.
        layers: Names of the layers; None for all.
        call: Function to run in place of `model(images)`.

    Returns:
        The effective dilation of each unit and offset group, [N, G, Ho, Wo], by layer in the order
        of the names.

    Raises:
        ValueError: If the model has no deformable layer, a name is unknown, a layer does not run
            exactly once, or its kernel has a single tap.
        TypeError: If a layer is not a deformable convolution.
    """
    convolutions = _with_pairs(deformable_layers(model, layers), named=layers is not None)
    results: dict[str, list[Tensor]] = {name: [] for name in convolutions}

    def record(it: Call) -> None:
        results[it.name].append(_dilation(it))

    with torch.no_grad(), evaluating(model), recording_calls(convolutions, record):
        (call or model)(images)
    return {name: the_only(name, runs) for name, runs in results.items()}


class DilationMap(NamedTuple):
    """Effective dilation of a deformable layer, by position in the image.

    Attributes:
        dilation: [N, G, Ho, Wo], effective dilation of each unit; see `effective_dilation`.
        shift: [N, G, Ho, Wo], mean length of the offsets of each unit, in pixels of the layer's
            input.
        layer_dilation: Dilation of the layer without offsets, (y, x).
        field: Receptive field of the units.
    """

    dilation: Tensor
    shift: Tensor
    layer_dilation: tuple[int, int]
    field: ReceptiveField

    def unit_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """Unit (row, column) whose center is nearest to a point (y, x) of the image."""
        return self.field.nearest(point, size_of(self.dilation))


def dilation_maps(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> dict[str, DilationMap]:
    """Run a model once and map the effective dilation of its deformable convolutions.

        >>> maps = dilation_maps(model, image[None])["layer4.1.conv2"]
        >>> row, column = maps.unit_at((120, 64))
        >>> maps.dilation[0, :, row, column].mean()

    Args:
        model, images, layers, call: See `effective_dilation`.

    Returns:
        A map for each layer, in the order of the names.

    Raises:
        ValueError, TypeError: As `effective_dilation`; ValueError if the receptive field of a layer
            cannot be traced, as in `receptive_field`.
    """
    convolutions = _with_pairs(deformable_layers(model, layers), named=layers is not None)
    results: dict[str, list[DilationMap]] = {name: [] for name in convolutions}
    tracer = FieldTracer(images)

    def record(it: Call) -> None:
        maps = DilationMap(
            _dilation(it), _mean_shift(it), Kernel.of(it.layer).dilation, tracer.field(it.output)
        )
        results[it.name].append(maps)

    with torch.no_grad(), evaluating(model), recording_calls(convolutions, record), tracer:
        (call or model)(images)
    return {name: the_only(name, runs) for name, runs in results.items()}


@dataclass(frozen=True)
class MeanStd:
    """Mean and standard deviation of a sample; None if it is empty.

    The standard deviation has no Bessel's correction: the variance is divided by `count`.
    """

    count: int
    mean: float | None
    std: float | None

    def __add__(self, other: "MeanStd") -> "MeanStd":
        """Mean and standard deviation of the union of two samples."""
        if self.mean is None or self.std is None:
            return other
        if other.mean is None or other.std is None:
            return self
        count = self.count + other.count
        fraction = other.count / count
        difference = other.mean - self.mean
        variance = (1 - fraction) * self.std**2 + fraction * other.std**2
        variance += fraction * (1 - fraction) * difference**2
        return MeanStd(count, self.mean + fraction * difference, math.sqrt(variance))


@dataclass(frozen=True)
class LayerDilation:
    """Row of Table 2: effective dilation of a layer's filters, by the size of the object.

    `dataclasses.asdict` converts it for JSON. Rows of the same layer on different images can be
    added.
    """

    layer: str
    small: MeanStd
    medium: MeanStd
    large: MeanStd
    background: MeanStd

    @property
    def by_size(self) -> tuple[MeanStd, ...]:
        """Statistics of filters on small, medium and large objects and on the background."""
        return self.small, self.medium, self.large, self.background

    def __add__(self, other: "LayerDilation") -> "LayerDilation":
        """Statistics over the images of both rows.

        Raises:
            ValueError: If they are of different layers.
        """
        if self.layer != other.layer:
            raise ValueError(
                f"expected rows of one layer, but got {self.layer!r} and {other.layer!r}"
            )
        pairs = zip(self.by_size, other.by_size, strict=True)
        return LayerDilation(self.layer, *(one + another for one, another in pairs))


class AnnotatedImage(NamedTuple):
    """An image of any size with the boxes of its objects.

    Attributes:
        image: Input [3, H, W] of the model, without padding (which would count as background).
        boxes: [M, 4], edges (x1, y1, x2, y2) in pixels of the original image, whose first pixel is
            [0, 0, 1, 1].
        scale: Scale factor from the original image to `image`.
    """

    image: Tensor
    boxes: Tensor
    scale: float


def dilation_statistics(
    model: nn.Module,
    images: Iterable[AnnotatedImage],
    layers: Sequence[str] | None = None,
    *,
    stride: int | Mapping[str, int] | None = None,
    call: Callable[[Tensor], object] | None = None,
) -> list[LayerDilation]:
    """Mean and standard deviation of the effective dilation by object size (Table 2).

    A filter belongs to the object whose box contains its center without offsets, or else to the
    background. Small objects have an area below 96^2 pixels of the original image, large ones above
    224^2. The paper does not say which of several overlapping boxes counts (here the smallest, as
    it is more often in front) or how offset groups count (here a unit counts once, with the mean
    over its groups).

    Images are processed one by one; only sums are kept.

    Args:
        model: Model with deformnet's or torchvision's `DeformConv2d`; run in evaluation mode
            without gradients.
        images: Images, each of its own size.
        layers: Names of the layers; None for all that have more than one tap.
        stride: Stride of the layers' outputs in pixels of the image, one for all or by name, whose
            unit (i, j) is then assumed to be centered on pixel (stride*i, stride*j). None traces
            both through the network, as `receptive_field` does.
        call: Function to run in place of `model(image[None])`.

    Returns:
        A row for each layer, in the order of the names.

    Raises:
        ValueError: If the model has no deformable layer, a name is unknown, an image or its boxes
            have a wrong shape, a scale or stride is not positive, or the stride cannot be traced.
        TypeError: If a layer is not a deformable convolution.
    """
    convolutions = _with_pairs(deformable_layers(model, layers), named=layers is not None)
    strides = dict.fromkeys(convolutions, stride) if isinstance(stride, int) else dict(stride or {})
    if stride is not None and not all(strides.get(name, 0) >= 1 for name in convolutions):
        raise ValueError(
            f"expected stride to be at least 1 for each of {', '.join(convolutions)}, "
            f"but got {stride}"
        )
    empty = MeanStd(0, None, None)
    rows = {name: LayerDilation(name, empty, empty, empty, empty) for name in convolutions}

    for annotated in images:
        _check(annotated)
        batch = annotated.image[None]
        tracer = FieldTracer(batch)
        tracing = tracer if stride is None else nullcontext()

        def record(it: Call, on: AnnotatedImage = annotated, tracer: FieldTracer = tracer) -> None:
            if (step := strides.get(it.name)) is None:
                field = tracer.field(it.output)
            else:
                field = ReceptiveField((1, 1), (step, step), (0, 0))
            sizes = _size_classes(size_of(it.output), field, on.boxes.cpu(), on.scale)
            dilation = _dilation(it).cpu().double().mean((0, 1))
            statistics = (_mean_std(dilation[sizes == number]) for number in range(4))
            rows[it.name] += LayerDilation(it.name, *statistics)

        with torch.no_grad(), evaluating(model), recording_calls(convolutions, record), tracing:
            (call or model)(batch)
    return list(rows.values())


def _with_pairs(layers: Mapping[str, nn.Module], *, named: bool) -> dict[str, nn.Module]:
    """Layers whose filters have more than one tap.

    Raises:
        ValueError: If another layer was named, or there are none.
    """
    kept = {name: layer for name, layer in layers.items() if Kernel.of(layer).taps > 1}
    others = [name for name in layers if name not in kept]
    if others and (named or not kept):
        raise ValueError(f"expected layers to have more than one tap, but {others[0]!r} has one")
    return kept


def _dilation(call: Call) -> Tensor:
    """Effective dilation [N, G, Ho, Wo] in a call of a layer, float32 or better."""
    assert call.offset is not None
    kernel = Kernel.of(call.layer)
    offset = _at_least_float32(call.offset)
    # [N, G, kh, kw, (y, x), Ho, Wo]
    offset = offset.unflatten(1, (-1, *kernel.size, 2))
    spacing = offset.new_tensor(kernel.dilation)[:, None, None]
    total = offset.new_zeros(())
    for axis in (2, 3):
        along_axis = (torch.arange(2, device=offset.device) == axis - 2)[:, None, None]
        difference = offset.diff(dim=axis) + spacing * along_axis
        total = total + torch.linalg.vector_norm(difference, dim=4).sum((2, 3))
    kh, kw = kernel.size
    return total / ((kh - 1) * kw + kh * (kw - 1))


def _mean_shift(call: Call) -> Tensor:
    """Mean length of the offsets of each filter, [N, G, Ho, Wo], float32 or better."""
    assert call.offset is not None
    offset = _at_least_float32(call.offset).unflatten(1, (-1, Kernel.of(call.layer).taps, 2))
    return torch.linalg.vector_norm(offset, dim=3).mean(2)


def _at_least_float32(offset: Tensor) -> Tensor:
    return offset.detach().to(torch.promote_types(offset.dtype, torch.float32))


def _size_classes(
    size: tuple[int, int], field: ReceptiveField, boxes: Tensor, scale: float
) -> Tensor:
    """Class [H, W] of each unit of a map: 0 small, 1 medium, 2 large object, 3 background."""
    first = field.center((0, 0))
    # From pixel centers to edges, and to the original image.
    y, x = (
        (torch.arange(size[i]).double() * field.stride[i] + first[i] + 0.5) / scale for i in (0, 1)
    )
    # The smallest box is written last.
    classes = torch.full(size, 3)
    boxes = boxes.double()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in areas.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[index]
        within = ((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))
        area = areas[index]
        classes[within] = 0 if area < SMALL_AREA else 2 if area > LARGE_AREA else 1
    return classes


def _mean_std(numbers: Tensor) -> MeanStd:
    if not len(numbers):
        return MeanStd(0, None, None)
    mean, std = numbers.mean(), numbers.std(correction=0)
    return MeanStd(len(numbers), float(mean), float(std))


def _check(annotated: AnnotatedImage) -> None:
    image, boxes, scale = annotated
    if image.ndim != 3:
        raise ValueError(f"expected image to be [3, H, W], but got {list(image.shape)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes to be [M, 4], but got {list(boxes.shape)}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"expected scale to be a positive number, but got {scale}")
