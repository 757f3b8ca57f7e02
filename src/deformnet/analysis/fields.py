"""Receptive fields: what a unit can see, and what it does look at.

The theoretical field follows from the sizes of the kernels; the effective one (Luo et al. 2016,
[43] of Dai et al. 2017) is where the unit's gradient lies in the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision  # noqa: F401 (defines torch.ops.torchvision)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import deformnet.ops  # noqa: F401 (defines torch.ops.deformnet)
from deformnet.analysis.layers import Call, Kernel, evaluating, find_layer, size_of, watching

_MASS = 0.95  # of the gradient, in the square whose side is reported


class ReceptiveField(NamedTuple):
    """What the units of a map can see of the image; pairs are (y, x), in pixels.

    Attributes:
        size: of the part of the image that a unit depends on. (With dilation it may have holes;
            at the border it reaches out of the image.)
        stride: from one unit to the next.
        start: the first pixel that unit (0, 0) sees, negative where it sees padding.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    start: tuple[int, int]

    def centre(self, unit: tuple[float, float]) -> tuple[float, float]:
        """The middle of what a unit sees, (y, x); whole numbers are centres of pixels."""
        y, x = (
            start + stride * place + (size - 1) / 2
            for start, stride, place, size in zip(
                self.start, self.stride, unit, self.size, strict=True
            )
        )
        return y, x

    def nearest(self, point: tuple[float, float], units: tuple[int, int]) -> tuple[int, int]:
        """Of a map of so many units (height, width), the (row, column) centred nearest to a point
        (y, x) of the image."""
        first = self.centre((0, 0))
        row, column = (
            min(max(round((place - start) / step), 0), size - 1)
            for place, start, step, size in zip(point, first, self.stride, units, strict=True)
        )
        return row, column


@dataclass(frozen=True)
class EffectiveField:
    """What a unit looks at.

    Attributes:
        gradient: [H, W], |d unit / d pixel|, summed over the image's channels and averaged over
            the images.
        side: of the square around the unit's place that holds 95 % of it, in pixels.
        share_inside: the share of it that lies in the theoretical field of the plain network.
    """

    gradient: Tensor
    side: float
    share_inside: float


def receptive_field(
    model: nn.Module,
    images: Tensor,
    layer: str,
    *,
    call: Callable[[Tensor], object] | None = None,
) -> ReceptiveField:
    """The theoretical receptive field of a layer's units, deformable layers taken at rest.

    It is followed through the operations of one run, whatever the network's shape; where branches
    meet, their fields unite. Known are convolution (deformable, too), pooling and padding; what
    keeps the size of a map is taken to work at each place by itself. (So normalisation by
    statistics of the map, as in group norm, is not counted.)

    Args:
        model: any network; run once, in evaluation mode and without gradients.
        images: [N, 3, H, W] as the model takes them.
        layer: name of a module with an output [N, C, H', W']; "" is the model itself.
        call: what to run in the place of `model(images)`.
    Raises:
        ValueError: if there is no such layer, if it does not run exactly once, or if on its way
            from the image there is an operation whose field is not known, such as a matrix product,
            interpolation or a mean over the map.
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
    """Where in the image the gradient of a unit lies: what it looks at, and how much.

    The unit is the sum of a layer's channels at one place. What the pixels do to the offsets of
    deformable layers counts, too. Results of the same unit of a plain and a deformable network can
    be compared.

    Args:
        model: any network; run twice, in evaluation mode. Gradients of its parameters are left
            alone.
        images: [N, 3, H, W] as the model takes them.
        layer: name of a module with an output [N, C, H', W']; "" is the model itself.
        unit: (row, column) in that output.
        call: what to run in the place of `model(images)`.
    Raises:
        ValueError: as `receptive_field`; if the unit is not in the map, or no gradient comes from
            it to the image.
    """
    with evaluating(model):
        with torch.no_grad():
            field, (height, width) = _theoretical(model, images, layer, call)
        if not (0 <= unit[0] < height and 0 <= unit[1] < width):
            raise ValueError(f"unit: wanted one of the {height}x{width} units, got {tuple(unit)}")
        with torch.enable_grad():
            pixels = images.detach().clone().requires_grad_()
            output = _run(model, pixels, layer, call).output
            value = output[..., unit[0], unit[1]].sum()
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, pixels, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        raise ValueError(f"unit: no gradient comes to the image from {tuple(unit)} of {layer!r}")
    heat = gradient.abs().double().sum(dim=1).mean(dim=0)

    rows, columns = (torch.arange(side, device=heat.device) for side in heat.shape)
    y, x = field.centre(unit)
    # A square around the unit's place holds the pixels that are no farther along either axis.
    far = torch.maximum((rows - y).abs()[:, None], (columns - x).abs())
    order = far.flatten().argsort()
    held = heat.flatten()[order].cumsum(0) / heat.sum()
    reach = far.flatten()[order][int((held < _MASS).sum())]
    side = 2 * float(reach) + 1  # from edge to edge of the pixels
    inside = ((rows - y).abs() <= (field.size[0] - 1) / 2)[:, None] & (
        (columns - x).abs() <= (field.size[1] - 1) / 2
    )
    share = float(heat[inside].sum() / heat.sum())
    return EffectiveField(heat.to(gradient.dtype), side, share)


class FieldTracer(TorchDispatchMode):
    """Follows receptive fields through whatever is computed from an image while it is active."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        # A text is the name of the operation behind which the field is not known.
        self._fields: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._fields[image] = ReceptiveField((1, 1), (1, 1), (0, 0))
        self._viewed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of views, the whole

    def field(self, map: Tensor) -> ReceptiveField:
        """The field of a tensor that was computed.

        Raises:
            ValueError: if it is not known.
        """
        found = self._fields.get(map, "something that does not depend on the image")
        if isinstance(found, ReceptiveField):
            return found
        raise ValueError(f"layers: the receptive field behind {found} is not known")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode a convolution, say, comes whole, and not as what it consists of.
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
        for result in tree_leaves(output):
            if isinstance(result, Tensor):
                field = self._follow(func.overloadpacket, arguments, tracked, result)
                field = str(func.overloadpacket) if field is None else field
                self._fields[result] = field
                if func.is_view:
                    self._viewed[result] = self._viewed.get(tracked[0], tracked[0])
                elif (whole := self._viewed.get(result)) is not None:
                    self._write_part(whole, field)
        return output

    def _write_part(self, whole: Tensor, written: ReceptiveField | str) -> None:
        """Adds what was written to a view, in place, to what the tensor sees that it is of."""
        before = self._fields[whole]
        if isinstance(before, ReceptiveField):
            union = written if isinstance(written, str) else _union([before, written])
            self._fields[whole] = "parts of different strides" if union is None else union

    def _follow(
        self, operation: Any, arguments: dict[str, Any], tracked: list[Tensor], result: Tensor
    ) -> ReceptiveField | str | None:
        """The field of a result; None if it is not known, or the name of what hid it before."""
        fields = [self._fields[tensor] for tensor in tracked]
        for field in fields:
            if isinstance(field, str):
                return field
        if operation in _KERNELS:
            kernel = _KERNELS[operation](arguments)
            if kernel is None or tracked[0] is not next(iter(arguments.values())):
                return None
            # The others are offsets and masks, which come from each unit's own place.
            return _union([through(kernel, fields[0]), *fields[1:]])
        same_size = all(tensor.shape[-2:] == result.shape[-2:] for tensor in tracked)
        if operation in _MIXING or result.ndim < 3 or not same_size:
            return None
        return _union(fields)


_ATEN = torch.ops.aten
# What may keep the size of a map and yet carry things from one place to another.
_MIXING = {
    getattr(_ATEN, name)
    for name in (
        *("mm", "bmm", "addmm", "baddbmm", "permute", "transpose", "t", "roll", "flip"),
        *("_adaptive_avg_pool2d", "cumsum", "sort", "gather", "index", "index_select"),
        *(
            "grid_sampler_2d",
            "_fft_c2c",
            "index_put_",
            "scatter",
            "avg_pool3d",
            "max_pool3d_with_indices",
        ),
    )
} | {
    # Bins may be as many as cells.
    torch.ops.deformnet.roi_pool,
    torch.ops.torchvision.roi_align,
    torch.ops.torchvision.roi_pool,
    torch.ops.torchvision.ps_roi_align,
    torch.ops.torchvision.ps_roi_pool,
}


def _convolution(arguments: dict[str, Any]) -> Kernel | None:
    weight = arguments["weight"]
    if arguments.get("transposed", False) or weight.ndim != 4:
        return None
    numbers = (arguments[name] for name in ("stride", "padding", "dilation"))
    return Kernel((weight.shape[2], weight.shape[3]), *(_pair(number) for number in numbers))


def _torchvision_convolution(arguments: dict[str, Any]) -> Kernel:
    height, width = arguments["weight"].shape[2:]
    stride, padding, dilation = (
        (arguments[f"{name}_h"], arguments[f"{name}_w"]) for name in ("stride", "pad", "dilation")
    )
    return Kernel((height, width), stride, padding, dilation)


def _pooling(arguments: dict[str, Any]) -> Kernel:
    size = _pair(arguments["kernel_size"])
    numbers = (arguments.get(name) for name in ("padding", "dilation"))
    padding, dilation = (
        _pair(number or default) for number, default in zip(numbers, (0, 1), strict=True)
    )
    return Kernel(size, _pair(arguments.get("stride") or size), padding, dilation)


def _padding(arguments: dict[str, Any]) -> Kernel | None:
    left, _, top, *_ = [*arguments["pad" if "pad" in arguments else "padding"], 0, 0, 0]
    return Kernel((1, 1), (1, 1), (top, left), (1, 1))


_KERNELS = {
    _ATEN.convolution: _convolution,
    torch.ops.deformnet.deform_conv2d: _convolution,
    torch.ops.torchvision.deform_conv2d: _torchvision_convolution,
    _ATEN.max_pool2d_with_indices: _pooling,
    _ATEN.avg_pool2d: _pooling,
    _ATEN.constant_pad_nd: _padding,
    _ATEN.reflection_pad2d: _padding,
    _ATEN.replication_pad2d: _padding,
}


def through(kernel: Kernel, field: ReceptiveField) -> ReceptiveField:
    """The field of units that read others by a kernel."""
    size, stride, start = zip(
        *(
            (
                field.size[i] + field.stride[i] * kernel.dilation[i] * (kernel.size[i] - 1),
                field.stride[i] * kernel.stride[i],
                field.start[i] - field.stride[i] * kernel.padding[i],
            )
            for i in (0, 1)
        ),
        strict=True,
    )
    return ReceptiveField(_pair(size), _pair(stride), _pair(start))


def _union(fields: Sequence[ReceptiveField]) -> ReceptiveField | None:
    """What units see that see all of these; None if they lie on different grids."""
    if len({field.stride for field in fields}) > 1:
        return None
    starts, ends = [], []
    for i in (0, 1):
        starts.append(min(field.start[i] for field in fields))
        ends.append(max(field.start[i] + field.size[i] for field in fields))
    size = (ends[0] - starts[0], ends[1] - starts[1])
    return ReceptiveField(size, fields[0].stride, _pair(starts))


def _theoretical(
    model: nn.Module, images: Tensor, layer: str, call: Callable[[Tensor], object] | None
) -> tuple[ReceptiveField, tuple[int, int]]:
    """The field of a layer's units, and the size of its map."""
    with FieldTracer(images) as tracer:
        output = _run(model, images, layer, call).output
    return tracer.field(output), size_of(output)


def _run(
    model: nn.Module, images: Tensor, layer: str, call: Callable[[Tensor], object] | None
) -> Call:
    """What a layer did when the model ran."""
    calls: list[Call] = []
    with watching({layer: find_layer(model, layer)}, calls.append):
        (call or model)(images)
    if len(calls) != 1:
        raise ValueError(f"layers: wanted {layer!r} to run once, it ran {len(calls)} times")
    return calls[0]


def _pair(numbers: Any) -> tuple[int, int]:
    """Operators take one number, or a list of one or two, for both axes."""
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return numbers[0], numbers[-1]
