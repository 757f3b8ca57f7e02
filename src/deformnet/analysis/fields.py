"""Theoretical and effective receptive fields.

The theoretical receptive field follows from the geometry of the layers; the effective one (Luo et
al. 2016, [43] of Dai et al. 2017) is the distribution of a unit's gradient over the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from deformnet.analysis.layers import (
    Call,
    Kernel,
    evaluating,
    find_layer,
    recording_calls,
    size_of,
    the_only,
)
from deformnet.ops._arguments import pair

_MASS = 0.95  # fraction of the gradient inside the reported square


class ReceptiveField(NamedTuple):
    """Receptive field of the units of a feature map; pairs are (y, x), in pixels of the image.

    Attributes:
        size: Extent of the region that a unit depends on, which may have holes (with dilation) and
            extend beyond the image.
        stride: Distance between the regions of adjacent units.
        start: First pixel of the region of unit (0, 0), negative inside padding.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]

    def center(self, unit: tuple[float, float]) -> tuple[float, float]:
        """Center (y, x) of a unit's receptive field; integers are pixel centers."""
        y, x = (
            start + stride * index + (size - 1) / 2
            for start, stride, index, size in zip(
                self.start, self.stride, unit, self.size, strict=True
            )
        )
        return y, x

    def nearest(self, point: tuple[float, float], units: tuple[int, int]) -> tuple[int, int]:
        """Unit whose center is nearest to a point of the image.

        Args:
            point: (y, x) in the image.
            units: Height and width of the feature map.

        Returns:
            (row, column).
        """
        first = self.center((0, 0))
        row, column = (
            min(max(round((position - start) / step), 0), size - 1)
            for position, start, step, size in zip(point, first, self.stride, units, strict=True)
        )
        return row, column


@dataclass(frozen=True)
class EffectiveField:
    """Effective receptive field of a unit.

    Attributes:
        gradient: [H, W], |d unit / d pixel|, summed over the image channels and averaged over the
            images.
        side: Side of the square around the unit's center that contains 95% of the gradient, in
            pixels.
        fraction_inside: Fraction of the gradient inside the theoretical receptive field without
            offsets.
    """

    gradient: Tensor
    side: float
    fraction_inside: float


def receptive_field(
    model: nn.Module,
    images: Tensor,
    layer: str,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> ReceptiveField:
    """Theoretical receptive field of a layer's units, without the offsets of deformable layers.

    It is traced through the operations of one forward pass; where branches join, it is the union of
    theirs. Convolution (also deformable), pooling and padding are supported. Operations that keep
    the size of a map are assumed to be pointwise (so normalization by statistics of the map, as in
    group norm, is ignored).

    Args:
        model: Any network; run once, in evaluation mode without gradients.
        images: Input [N, 3, H, W] of the model.
        layer: Name of a module with an output [N, C, H', W']; "" is the model itself.
        call: Function to run in place of `model(images)`.

    Raises:
        ValueError: If there is no such layer, it does not run exactly once, or an operation before
            it is not supported, such as a matrix product, interpolation or a mean over the map.
    """
    with evaluating(model), torch.no_grad():
        return _theoretical(model, images, layer, call)[0]


def effective_receptive_field(
    model: nn.Module,
    images: Tensor,
    layer: str,
    unit: tuple[int, int],
    *,
    call: Callable[[Tensor], object] | None = None,
) -> EffectiveField:
    """Effective receptive field of a unit: its gradient with respect to the image.

    The activation is the sum over the channels of the layer's output. The gradient includes the
    path through the offsets of deformable layers. The same unit of a deformable network and its
    baseline can be compared.

    Args:
        model: Any network; run twice, in evaluation mode. The gradients of its parameters do not
            change.
        images: Input [N, 3, H, W] of the model.
        layer: Name of a module with an output [N, C, H', W']; "" is the model itself.
        unit: (row, column) in that output.
        call: Function to run in place of `model(images)`.

    Raises:
        ValueError: As `receptive_field`; also if the unit is outside the map, or its gradient is
            zero or missing.
    """
    with evaluating(model):
        with torch.no_grad():
            field, (height, width) = _theoretical(model, images, layer, call)
        if not (0 <= unit[0] < height and 0 <= unit[1] < width):
            raise ValueError(
                f"expected unit to be one of the {height}x{width} units, but got {tuple(unit)}"
            )
        with torch.enable_grad():
            pixels = images.detach().clone().requires_grad_()
            output = _run(model, pixels, layer, call).output
            value = output[..., unit[0], unit[1]].sum()
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, pixels, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise ValueError(
            f"expected unit to have a gradient in the image, but unit {tuple(unit)} of {layer!r} "
            "has none"
        )
    heat = gradient.abs().double().sum(dim=1).mean(dim=0)

    rows, columns = (torch.arange(side, device=heat.device) for side in heat.shape)
    y, x = field.center(unit)
    # Distance in the maximum norm: a square around the center is a ball.
    distance = torch.maximum((rows - y).abs()[:, None], (columns - x).abs())
    order = distance.flatten().argsort()
    mass = heat.flatten()[order].cumsum(0) / heat.sum()
    radius = distance.flatten()[order][int((mass < _MASS).sum())]
    side = 2 * float(radius) + 1  # including both edge pixels
    inside = ((rows - y).abs() <= (field.size[0] - 1) / 2)[:, None] & (
        (columns - x).abs() <= (field.size[1] - 1) / 2
    )
    fraction = float(heat[inside].sum() / heat.sum())
    return EffectiveField(heat.to(gradient.dtype), side, fraction)


class FieldTracer(TorchDispatchMode):
    """Traces receptive fields through everything computed from an image while it is active."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # A string is the name of the unsupported operation that made the field unknown.
        self._fields: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._fields[image] = ReceptiveField((1, 1), (1, 1), (0, 0))
        self._viewed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # base of views

    def field(self, map: Tensor) -> ReceptiveField:
        """Receptive field of a feature map.

        Raises:
            ValueError: If it is unknown.
        """
        field = self._fields.get(map, "a tensor that does not depend on the image")
        if isinstance(field, ReceptiveField):
            return field
        raise ValueError(
            f"expected layers to have a known receptive field, but it is unknown after {field}"
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode, composite operations such as conv2d arrive undecomposed.
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tracked = [tensor for tensor in inputs if tensor in self._fields]
        if not tracked:
            return output
        names = (argument.name for argument in func._schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        operation = str(func.overloadpacket)
        for result in tree_leaves(output):
            if isinstance(result, Tensor):
                field = self._trace(operation, arguments, tracked, result)
                field = operation if field is None else field
                self._fields[result] = field
                if func.is_view:
                    self._viewed[result] = self._viewed.get(tracked[0], tracked[0])
                elif (base := self._viewed.get(result)) is not None:
                    self._write_part(base, field)
        return output

    def _write_part(self, base: Tensor, written: ReceptiveField | str) -> None:
        """Extend the field of a tensor by that of an in-place write to one of its views."""
        before = self._fields[base]
        if isinstance(before, ReceptiveField):
            union = written if isinstance(written, str) else _union([before, written])
            self._fields[base] = "parts of different strides" if union is None else union

    def _trace(
        self, operation: str, arguments: dict[str, Any], tracked: list[Tensor], result: Tensor
    ) -> ReceptiveField | str | None:
        """Field of a result; None if unknown, or the operation that made an input's unknown."""
        fields = [self._fields[tensor] for tensor in tracked]
        for field in fields:
            if isinstance(field, str):
                return field
        if operation in _KERNELS:
            kernel = _KERNELS[operation](arguments)
            if kernel is None or tracked[0] is not next(iter(arguments.values())):
                return None
            # The others are offsets and masks at the unit's own position.
            return _union([through(kernel, fields[0]), *fields[1:]])
        same_size = all(tensor.shape[-2:] == result.shape[-2:] for tensor in tracked)
        if operation in _MIXING or result.ndim < 3 or not same_size:
            return None
        return _union(fields)


# Operations that may keep the size of a map and yet are not pointwise.
_MIXING = {
    *(
        f"aten.{name}"
        for name in (
            *("mm", "bmm", "addmm", "baddbmm", "permute", "transpose", "t", "roll", "flip"),
            *("_adaptive_avg_pool2d", "cumsum", "sort", "gather", "index", "index_select"),
            *("grid_sampler_2d", "_fft_c2c", "index_put_", "scatter"),
            *("avg_pool3d", "max_pool3d_with_indices"),
        )
    ),
    # There may be as many bins as pixels.
    "deformnet.roi_pool",
    *(f"torchvision.{name}" for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")),
}


def _convolution(arguments: dict[str, Any]) -> Kernel | None:
    weight = arguments["weight"]
    if arguments.get("transposed", False) or weight.ndim != 4:
        return None
    numbers = (arguments[name] for name in ("stride", "padding", "dilation"))
    return Kernel(
        (weight.shape[2], weight.shape[3]), *(pair("geometry", number) for number in numbers)
    )


def _torchvision_convolution(arguments: dict[str, Any]) -> Kernel:
    height, width = arguments["weight"].shape[2:]
    stride, padding, dilation = (
        (arguments[f"{name}_h"], arguments[f"{name}_w"]) for name in ("stride", "pad", "dilation")
    )
    return Kernel((height, width), stride, padding, dilation)


def _pooling(arguments: dict[str, Any]) -> Kernel:
    size = pair("geometry", arguments["kernel_size"])
    numbers = (arguments.get(name) for name in ("padding", "dilation"))
    padding, dilation = (
        pair("geometry", number or default) for number, default in zip(numbers, (0, 1), strict=True)
    )
    return Kernel(size, pair("geometry", arguments.get("stride") or size), padding, dilation)


def _padding(arguments: dict[str, Any]) -> Kernel | None:
    left, _, top, *_ = [*arguments["pad" if "pad" in arguments else "padding"], 0, 0, 0]
    return Kernel((1, 1), (1, 1), (top, left), (1, 1))


_KERNELS = {
    "aten.convolution": _convolution,
    "deformnet.deform_conv2d": _convolution,
    "torchvision.deform_conv2d": _torchvision_convolution,
    "aten.max_pool2d_with_indices": _pooling,
    "aten.avg_pool2d": _pooling,
    "aten.constant_pad_nd": _padding,
    "aten.reflection_pad2d": _padding,
    "aten.replication_pad2d": _padding,
}


def through(kernel: Kernel, field: ReceptiveField) -> ReceptiveField:
    """Receptive field of the output of a layer whose input has a known one."""
    axes = [
        (
            field.size[i] + field.stride[i] * kernel.dilation[i] * (kernel.size[i] - 1),
            field.stride[i] * kernel.stride[i],
            field.start[i] - field.stride[i] * kernel.padding[i],
        )
        for i in (0, 1)
    ]
    return ReceptiveField(*(pair("geometry", number) for number in zip(*axes, strict=True)))


def _union(fields: Sequence[ReceptiveField]) -> ReceptiveField | None:
    """Union of receptive fields; None if their strides differ."""
    if len({field.stride for field in fields}) > 1:
        return None
    starts = [min(field.start[i] for field in fields) for i in (0, 1)]
    ends = [max(field.start[i] + field.size[i] for field in fields) for i in (0, 1)]
    size = (ends[0] - starts[0], ends[1] - starts[1])
    return ReceptiveField(size, fields[0].stride, pair("geometry", starts))


def _theoretical(
    model: nn.Module, images: Tensor, layer: str, call: Callable[[Tensor], object] | None
) -> tuple[ReceptiveField, tuple[int, int]]:
    """Receptive field of a layer's units, and the size of its map."""
    with FieldTracer(images) as tracer:
        output = _run(model, images, layer, call).output
    return tracer.field(output), size_of(output)


def _run(
    model: nn.Module, images: Tensor, layer: str, call: Callable[[Tensor], object] | None
) -> Call:
    """The only call of a layer in a forward pass of the model."""
    calls: list[Call] = []
    with recording_calls({layer: find_layer(model, layer)}, calls.append):
        (call or model)(images)
    return the_only(layer, calls)
