"""How far filters spread: effective dilation (Dai et al. 2017, section 4.2 and Table 2)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deformnet.analysis.fields import FieldTracer, ReceptiveField
from deformnet.analysis.layers import Call, Kernel, deformable_layers, evaluating, size_of, watching

SMALL_AREA = 96**2
"""Objects of less are small (Table 2)."""
LARGE_AREA = 224**2
"""Objects of more are large; those of neither are medium."""

_Result = TypeVar("_Result")


def effective_dilation(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """The effective dilation of every filter of the deformable convolutions, by layer.

    It is the mean distance between adjacent sampling locations of a filter, side by side or one
    above the other (12 pairs in a 3x3 kernel), in cells of the layer's input. Without offsets it is
    the layer's dilation.

        >>> found = effective_dilation(model, images)["layer4.2.conv2"].mean(1)  # over the groups

    Args:
        model: holds deformnet's or torchvision's `DeformConv2d`; run once, in evaluation mode and
            without gradients.
        images: [N, 3, H, W] as the model takes them.
        layers: their names; None for all.
        call: what to run in the place of `model(images)`.
    Returns:
        For each layer, in the order of their names, [N, G, Ho, Wo]: for each unit and offset group.
    Raises:
        ValueError: if the model has no deformable layer, a name is unknown, a layer does not run
            exactly once, or its kernel has one tap only.
        TypeError: if a name is that of another kind of layer.
    """
    found = _with_pairs(deformable_layers(model, layers), chosen=layers is not None)
    results: dict[str, list[Tensor]] = {name: [] for name in found}

    def see(done: Call) -> None:
        results[done.name].append(_dilation(done))

    with torch.no_grad(), evaluating(model), watching(found, see):
        (call or model)(images)
    return {name: _only(name, times) for name, times in results.items()}


class FilterMap(NamedTuple):
    """How the filters of one deformable layer lay in one run, at each of its units.

    Attributes:
        dilation: [N, G, Ho, Wo], the effective dilation; see `effective_dilation`.
        shift: [N, G, Ho, Wo], how far the taps of a filter were moved in the mean, in cells of the
            layer's input.
        at_rest: the dilation of the layer, down and across.
        field: what the units see of the image.
    """

    dilation: Tensor
    shift: Tensor
    at_rest: tuple[int, int]
    field: ReceptiveField

    def unit_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """The unit (row, column) whose centre is nearest to a point (y, x) of the image."""
        return self.field.nearest(point, size_of(self.dilation))


def record_filters(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> dict[str, FilterMap]:
    """Runs a model once and keeps how the filters of its deformable convolutions lay.

        >>> filters = record_filters(model, image[None])["layer4.1.conv2"]
        >>> row, column = filters.unit_at((120, 64))
        >>> filters.dilation[0, :, row, column].mean()

    Args:
        model, images, layers, call: as for `effective_dilation`.
    Returns:
        For each layer, in the order of their names.
    Raises:
        ValueError, TypeError: as `effective_dilation`; ValueError if it is not known what the units
            of a layer see, as in `receptive_field`.
    """
    found = _with_pairs(deformable_layers(model, layers), chosen=layers is not None)
    results: dict[str, list[FilterMap]] = {name: [] for name in found}
    tracer = FieldTracer(images)

    def see(done: Call) -> None:
        kernel = Kernel.of(done.layer)
        maps = FilterMap(
            _dilation(done), _mean_shift(done), kernel.dilation, tracer.field(done.output)
        )
        results[done.name].append(maps)

    with torch.no_grad(), evaluating(model), watching(found, see), tracer:
        (call or model)(images)
    return {name: _only(name, times) for name, times in results.items()}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of some numbers; None if there are none.

    The deviation is that of the numbers themselves, not an estimate for others of their kind.
    """

    count: int
    mean: float | None
    std: float | None

    def __add__(self, other: "Spread") -> "Spread":
        """The mean and the deviation of both together."""
        if self.mean is None or self.std is None:
            return other
        if other.mean is None or other.std is None:
            return self
        count = self.count + other.count
        share = other.count / count
        apart = other.mean - self.mean
        variance = (1 - share) * self.std**2 + share * other.std**2
        variance += share * (1 - share) * apart**2
        return Spread(count, self.mean + share * apart, math.sqrt(variance))


@dataclass(frozen=True)
class LayerDilation:
    """A row of Table 2: the effective dilation of a layer's filters, by what they are centred on.

    `dataclasses.asdict` makes it ready for JSON. Rows of the same layer on different images, found
    one after the other or in different processes, can be added.
    """

    layer: str
    small: Spread
    medium: Spread
    large: Spread
    background: Spread

    def __add__(self, other: "LayerDilation") -> "LayerDilation":
        """
        Raises:
            ValueError: if they are of different layers.
        """
        if self.layer != other.layer:
            raise ValueError(f"wanted rows of one layer, got {self.layer!r} and {other.layer!r}")
        return LayerDilation(
            self.layer,
            self.small + other.small,
            self.medium + other.medium,
            self.large + other.large,
            self.background + other.background,
        )


class AnnotatedImage(NamedTuple):
    """An image of any size, with its objects.

    Attributes:
        image: [3, H, W] as the model takes it, without padding (which would be background).
        boxes: [M, 4] x1, y1, x2, y2, edges in pixels of the original image: its first pixel is
            [0, 0, 1, 1].
        scale: pixels of `image` to a pixel of the original.
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
    """Mean and spread of the effective dilation by size of object, over a data set (Table 2).

    A filter counts for the object whose box its centre at rest lies in, and else for the
    background. Small are objects of less than 96^2 pixels of the original image, large those of
    more than 224^2. The paper leaves two things open: where boxes overlap, the smallest of them
    counts here, as it is the one in front more often; and a unit with several offset groups counts
    once, with the mean over its groups.

    Images are taken one by one, and nothing is kept of them but sums.

    Args:
        model: holds deformnet's or torchvision's `DeformConv2d`; run in evaluation mode and without
            gradients.
        images: each of its own size.
        layers: their names; None for all that have more than one tap.
        stride: pixels between the units that the layers make, one number for all or one for each
            name; unit (i, j) is then taken to be centred on pixel (stride*i, stride*j). None finds
            both from the network, as `receptive_field` does.
        call: what to run in the place of `model(image[None])`.
    Returns:
        A row for each layer, in the order of their names.
    Raises:
        ValueError: if the model has no deformable layer, a name is unknown, an image or its boxes
            have a wrong shape, a scale or stride is not positive, or the stride cannot be found.
        TypeError: if a name is that of another kind of layer.
    """
    found = _with_pairs(deformable_layers(model, layers), chosen=layers is not None)
    strides = dict.fromkeys(found, stride) if isinstance(stride, int) else dict(stride or {})
    if stride is not None and not all(strides.get(name, 0) >= 1 for name in found):
        raise ValueError(f"stride: wanted at least 1 for each of {', '.join(found)}, got {stride}")
    nothing = Spread(0, None, None)
    rows = {name: LayerDilation(name, nothing, nothing, nothing, nothing) for name in found}

    for annotated in images:
        image, boxes, scale = annotated
        _check(annotated)
        batch = image[None]
        tracer = None if stride is not None else FieldTracer(batch)

        def see(
            done: Call,
            boxes: Tensor = boxes,
            scale: float = scale,
            tracer: FieldTracer | None = tracer,
        ) -> None:
            if tracer is None:
                step = strides[done.name]
                field = ReceptiveField((1, 1), (step, step), (0, 0))
            else:
                field = tracer.field(done.output)
            sizes = _size_classes(size_of(done.output), field, boxes.cpu(), scale)
            dilation = _dilation(done).cpu().double().mean((0, 1))
            spreads = (_spread(dilation[sizes == number]) for number in range(4))
            rows[done.name] += LayerDilation(done.name, *spreads)

        with torch.no_grad(), evaluating(model), watching(found, see):
            if tracer is None:
                (call or model)(batch)
            else:
                with tracer:
                    (call or model)(batch)
    return list(rows.values())


def _with_pairs(layers: Mapping[str, nn.Module], *, chosen: bool) -> dict[str, nn.Module]:
    """Those layers whose filters have more than one tap.

    Raises:
        ValueError: if the others were chosen by name, or there are none.
    """
    kept = {name: layer for name, layer in layers.items() if Kernel.of(layer).taps > 1}
    others = [name for name in layers if name not in kept]
    if others and (chosen or not kept):
        raise ValueError(f"layers: {others[0]!r} has one tap: there is no distance between taps")
    return kept


def _only(name: str, times: Sequence[_Result]) -> _Result:
    """What was found in the only run of a layer."""
    if len(times) != 1:
        raise ValueError(f"layers: wanted {name!r} to run once, it ran {len(times)} times")
    return times[0]


def _dilation(done: Call) -> Tensor:
    """The effective dilation [N, G, Ho, Wo] in one call of a layer, float32 or better."""
    assert done.offset is not None
    kernel = Kernel.of(done.layer)
    offset = done.offset.detach()
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    # [N, G, kh, kw, (y, x), Ho, Wo]
    moved = offset.unflatten(1, (-1, *kernel.size, 2))
    rest = moved.new_tensor(kernel.dilation)[:, None, None]
    total = moved.new_zeros(())
    for axis in (2, 3):
        apart = moved.diff(dim=axis)
        apart = apart + rest * (torch.arange(2, device=apart.device) == axis - 2)[:, None, None]
        total = total + torch.linalg.vector_norm(apart, dim=4).sum((2, 3))
    kh, kw = kernel.size
    return total / ((kh - 1) * kw + kh * (kw - 1))


def _mean_shift(done: Call) -> Tensor:
    """How far the taps of each filter are moved, [N, G, Ho, Wo], float32 or better."""
    assert done.offset is not None
    offset = done.offset.detach()
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    moved = offset.unflatten(1, (-1, Kernel.of(done.layer).taps, 2))
    return torch.linalg.vector_norm(moved, dim=3).mean(2)


def _size_classes(
    size: tuple[int, int], field: ReceptiveField, boxes: Tensor, scale: float
) -> Tensor:
    """What each unit of a map [H, W] is centred on: 0 small, 1 medium, 2 large, 3 background."""
    first = field.centre((0, 0))
    # From centres of pixels to edges, and to the original image.
    y, x = (
        (torch.arange(size[i]).double() * field.stride[i] + first[i] + 0.5) / scale for i in (0, 1)
    )
    # The last box that is written stays: the smallest.
    classes = torch.full(size, 3)
    boxes = boxes.double()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for index in areas.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[index]
        within = ((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))
        area = areas[index]
        classes[within] = 0 if area < SMALL_AREA else 2 if area > LARGE_AREA else 1
    return classes


def _spread(numbers: Tensor) -> Spread:
    if not len(numbers):
        return Spread(0, None, None)
    mean, std = numbers.mean(), numbers.std(correction=0)
    return Spread(len(numbers), float(mean), float(std))


def _check(annotated: AnnotatedImage) -> None:
    image, boxes, scale = annotated
    if image.ndim != 3:
        raise ValueError(f"image: wanted [3, H, W], got {list(image.shape)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: wanted [M, 4], got {list(boxes.shape)}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: wanted a number above 0, got {scale}")
