"""Sampling locations of a unit through several layers (Dai et al. 2017, Figures 5 and 6)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deformnet.analysis.fields import FieldTracer, ReceptiveField, through
from deformnet.analysis.layers import (
    Call,
    Kernel,
    evaluating,
    find_layer,
    recording_calls,
    size_of,
)
from deformnet.ops._arguments import one_of, positive

Between = Literal["bilinear", "rounded"]
"""How to continue at a sample between units of the layer below; see `sampling_locations`."""


class SamplingLocations(NamedTuple):
    """Sampling locations of a unit.

    Attributes:
        points: float64 [N, P, 2], (y, x) in pixels of the image; integers are pixel centers. P is
            the product of G*K over the layers; the taps of the top layer vary slowest.
        inside: bool [N, P], whether the value at a point reaches the unit: the point and all points
            that lead to it lie less than one pixel outside of the maps that they sample.
    """

    points: Tensor
    inside: Tensor


class SamplingStack:
    """Recorded offsets of a stack of layers, for the sampling locations of any unit.

    Returned by `record_sampling`; see `sampling_locations` for the points.

    Attributes:
        names: Names of the layers, the top layer first.
        units: Height and width of the top layer's output.
    """

    def __init__(self, layers: "Sequence[_Layer]", fields: Sequence[ReceptiveField]) -> None:
        """
        Args:
            layers: Layers, the top layer first.
            fields: Receptive fields of the top layer's output, and of the input of each layer.
        """
        self.names = tuple(layer.name for layer in layers)
        self.units = layers[0].output_size
        self._layers = tuple(layers)
        self._fields = tuple(fields)

    def locations(
        self,
        unit: tuple[float, float],
        *,
        depth: int | None = None,
        between: Between = "bilinear",
        zero_offsets: bool = False,
    ) -> SamplingLocations:
        """Sampling locations of a unit.

        Args:
            unit: (y, x) in the top layer's output; may be fractional.
            depth: Number of layers to follow; None for all.
            between: See `sampling_locations`.
            zero_offsets: Whether to ignore the offsets, as if the layers were plain convolutions.

        Raises:
            ValueError: If the unit is outside the map, or `depth` exceeds the number of layers.
        """
        one_of("between", between, get_args(Between))
        depth = len(self._layers) if depth is None else depth
        if not 1 <= depth <= len(self._layers):
            raise ValueError(f"expected depth to be 1 to {len(self._layers)}, but got {depth}")
        height, width = self.units
        if not (0 <= unit[0] <= height - 1 and 0 <= unit[1] <= width - 1):
            raise ValueError(
                f"expected unit to be one of the {height}x{width} units, but got {tuple(unit)}"
            )

        images, device = self._layers[0].images, self._layers[0].device
        points = torch.tensor(unit, dtype=torch.float64, device=device).expand(images, 1, 2)
        inside = torch.ones(points.shape[:2], dtype=torch.bool, device=device)
        for layer in self._layers[:depth]:
            if between == "rounded":
                points = points.round()
            points = layer.samples(points, zero_offsets=zero_offsets)
            size = points.new_tensor(layer.input_size)
            reached = ((points > -1) & (points < size)).all(-1)
            inside = (inside[..., None] & reached).flatten(1)
            points = points.flatten(1, 2)
        field = self._fields[depth]
        points = points * points.new_tensor(field.stride) + points.new_tensor(field.center((0, 0)))
        return SamplingLocations(points, inside)

    def center(self, unit: tuple[float, float]) -> tuple[float, float]:
        """Position (y, x) in the image of a unit of the top layer; integers are pixel centers."""
        return self._fields[0].center(unit)

    def unit_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """Unit (row, column) of the top layer whose center is nearest to a point of the image."""
        return self._fields[0].nearest(point, self.units)


def sampling_locations(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    unit: tuple[float, float],
    *,
    stride: int | None = None,
    between: Between = "bilinear",
    call: Callable[[Tensor], object] | None = None,
) -> SamplingLocations:
    """Sampling locations of a unit through a stack of layers, in pixels of the image.

    The unit samples the map below at the K taps of the top layer, each of these samples at the K
    taps of the next layer, and so on: 9^3 = 729 points for three 3x3 layers. Samples outside a map,
    which are zero, get the offsets of the nearest unit inside and are marked as not `inside`, as
    are all samples that follow from them.

        >>> stack = ["layer4.1.conv2", "layer4.1.conv1", "layer4.0.conv2"]
        >>> points, inside = sampling_locations(resnet, image[None], stack, (7, 4))

    Name every layer with a kernel larger than 1x1 or a stride on the path from the first to the
    last layer. In a residual block that is the branch of the convolutions; the shortcut contributes
    the unit's own position. With several offset groups, all groups of all layers are followed.

    Args:
        model: Model that contains the layers; run once, in evaluation mode without gradients. Use
            `record_sampling` for many units of one image.
        images: Input [N, 3, H, W] of the model.
        layers: Names of convolutions, deformable (deformnet's `DeformConv2d` or torchvision's) or
            not, and of max or average pooling layers, the top layer first.
        unit: (y, x) in the top layer's output; may be fractional.
        stride: Stride of the lowest layer's input, in pixels of the image, whose unit (i, j) is
            then assumed to be centered on pixel (stride*i, stride*j): true if all kernels below are
            odd and padded by half their size, as in ResNets. None traces both through the network,
            as `receptive_field` does.
        between: How to continue at a sample between units of the layer below. "bilinear"
            interpolates the offsets of its four neighbors, as the network interpolates their
            values: the points are the mean of those that the four sample. "rounded" continues at
            the nearest unit, as the authors' script for Figure 6 does.
        call: Function to run in place of `model(images)`.

    Raises:
        ValueError: If a name is unknown, the layers do not run once each in that order, a map is
            not the input of the next layer, a layer pads in its own `forward`, the unit is outside
            the map, or the stride cannot be traced.
        TypeError: If a layer is neither a convolution nor pooling.
    """
    one_of("between", between, get_args(Between))
    recorded = record_sampling(model, images, layers, stride=stride, call=call)
    return recorded.locations(unit, between=between)


def record_sampling(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    *,
    stride: int | None = None,
    call: Callable[[Tensor], object] | None = None,
) -> SamplingStack:
    """Run a model once and record a stack of its layers, for the sampling locations of many units.

        >>> stack = record_sampling(resnet, image[None], ["layer4.1.conv2", "layer4.1.conv1"])
        >>> points, inside = stack.locations(stack.unit_at((120, 64)), depth=1)

    Args:
        model, images, layers, stride, call: See `sampling_locations`.

    Raises:
        ValueError, TypeError: As `sampling_locations`.
    """
    if not layers:
        raise ValueError("expected layers to be at least one name, but got none")
    if stride is not None:
        positive("stride", stride)
    named = {name: find_layer(model, name) for name in layers}
    kernels = {name: Kernel.of(layer, name) for name, layer in named.items()}
    calls: list[Call] = []
    tracer = FieldTracer(images)
    tracing = tracer if stride is None else nullcontext()
    with torch.no_grad(), evaluating(model), recording_calls(named, calls.append), tracing:
        (call or model)(images)
    order = [it.name for it in calls]
    if order != list(reversed(layers)):
        raise ValueError(
            "expected layers to run once each, the first one last, "
            f"but they ran in the order {order}"
        )
    stack = [_Layer.of(it, kernels[it.name]) for it in calls]
    # Of the input of each layer, and of the output of the last.
    if stride is None:
        fields = [tracer.field(calls[0].input)]
    else:
        fields = [ReceptiveField((1, 1), (stride, stride), (0, 0))]
    for layer in stack:
        fields.append(through(layer.kernel, fields[-1]))
    stack.reverse()
    for above, below in pairwise(stack):
        if above.input_size != below.output_size:
            raise ValueError(
                f"expected layers to be consecutive, but the input of {above.name} is "
                f"{_size(above.input_size)} and the output of {below.name} is "
                f"{_size(below.output_size)}: name the layer between them"
            )
        if above.images != below.images:
            raise ValueError(
                "expected layers to run on the same batch, but "
                f"{above.name} ran on {above.images} images and {below.name} on {below.images}"
            )
    return SamplingStack(stack, fields[::-1])


class _Layer(NamedTuple):
    """Recorded call of a layer.

    Attributes:
        images: Batch size N.
        input_size, output_size: Height and width of its input and output.
        offset: [N, 2*G*K, Ho, Wo]; None for a plain layer.
    """

    name: str
    kernel: Kernel
    images: int
    device: torch.device
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    offset: Tensor | None

    @classmethod
    def of(cls, call: Call, kernel: Kernel) -> "_Layer":
        """Record a call of a layer, which is expected to pad as its attributes say."""
        input_size, output_size = size_of(call.input), size_of(call.output)
        if not kernel.explains(call.layer, input_size, output_size):
            raise ValueError(
                "expected layers to pad as their attributes say, but the output of "
                f"{call.name} is {_size(output_size)} for an input of {_size(input_size)}"
            )
        images = call.output.shape[0] if call.output.ndim == 4 else 1
        device = call.output.device
        return cls(call.name, kernel, images, device, input_size, output_size, call.offset)

    def samples(self, units: Tensor, *, zero_offsets: bool) -> Tensor:
        """Sampling locations [N, P, G*K, 2] in the input of units [N, P, 2] of the output."""
        steps = self.kernel.steps(units.device)
        corner = units * units.new_tensor(self.kernel.stride)
        corner = (corner - units.new_tensor(self.kernel.padding))[:, :, None]
        if self.offset is None:
            return corner + steps
        steps = steps.repeat(self.offset.shape[1] // (2 * len(steps)), 1)
        if zero_offsets:
            return corner + steps
        return corner + steps + self._offsets_at(self.offset, units)

    def _offsets_at(self, offset: Tensor, units: Tensor) -> Tensor:
        """Bilinear interpolation of offsets at positions [N, P, 2]: [N, P, G*K, 2]."""
        # grid_sample's coordinates in [-1, 1] would add rounding errors, which move points at the
        # border out of the map or into it.
        height, width = self.output_size
        last = units.new_tensor((height - 1, width - 1))
        positions = units.clamp(min=0).minimum(last)
        low = positions.nan_to_num().floor()
        high = (low + 1).minimum(last)
        fraction = positions - low
        cells = offset.double().flatten(2)
        total = cells.new_zeros(*cells.shape[:2], units.shape[1])
        for rows, row_weight in ((low, 1 - fraction), (high, fraction)):
            for columns, column_weight in ((low, 1 - fraction), (high, fraction)):
                index = (rows[..., 0] * width + columns[..., 1]).long()
                read = cells.gather(2, index[:, None].expand(-1, cells.shape[1], -1))
                weight = (row_weight[..., 0] * column_weight[..., 1])[:, None]
                total += torch.where(weight == 0, 0, weight * read)
        return total.unflatten(1, (-1, 2)).permute(0, 3, 1, 2)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
