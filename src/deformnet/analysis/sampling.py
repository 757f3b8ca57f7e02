"""Where in the image a unit looks, through several layers (Dai et al. 2017, Figures 5 and 6)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from deformnet.analysis.fields import FieldTracer, ReceptiveField, through
from deformnet.analysis.layers import Call, Kernel, evaluating, find_layer, size_of, watching


class SamplingLocations(NamedTuple):
    """
    Attributes:
        points: float64 [N, P, 2], (y, x) in pixels of the image, whole at the centres of pixels.
            P is the product of G*K over the layers; the taps of the top layer vary slowest.
        inside: bool [N, P], whether the value there can reach the unit: the point lies less than
            one cell outside the map that it samples, and so did all points that led to it.
    """

    points: Tensor
    inside: Tensor


class SamplingStack:
    """A stack of layers in one run of a model: what any unit sampled, without another run.

    Made by `record_sampling`; `sampling_locations` says what the points mean.

    Attributes:
        names: of the layers, the top one first.
        units: (height, width) of the map that the top layer makes.
    """

    def __init__(self, layers: "Sequence[_Layer]", fields: Sequence[ReceptiveField]) -> None:
        """
        Args:
            layers: the top one first.
            fields: what the units of the maps see: of the top layer's own, and of those that each
                of the layers reads.
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
        between: Literal["bilinear", "rounded"] = "bilinear",
        at_rest: bool = False,
    ) -> SamplingLocations:
        """
        Args:
            unit: (y, x) in the top layer's map; may be fractional.
            depth: how many layers to go down; None is all.
            between: as in `sampling_locations`.
            at_rest: leave the offsets out: where the same layers would sample if they were plain.
        Raises:
            ValueError: if the unit is not in the map, or there are not so many layers.
        """
        if between not in ("bilinear", "rounded"):
            raise ValueError(f"between: wanted 'bilinear' or 'rounded', got {between!r}")
        depth = len(self._layers) if depth is None else depth
        if not 1 <= depth <= len(self._layers):
            raise ValueError(f"depth: wanted 1 to {len(self._layers)}, got {depth}")
        height, width = self.units
        if not (0 <= unit[0] <= height - 1 and 0 <= unit[1] <= width - 1):
            raise ValueError(f"unit: wanted one of the {height}x{width} units, got {tuple(unit)}")

        images, device = self._layers[0].images, self._layers[0].device
        points = torch.tensor(unit, dtype=torch.float64, device=device).expand(images, 1, 2)
        inside = torch.ones(points.shape[:2], dtype=torch.bool, device=device)
        for layer in self._layers[:depth]:
            if between == "rounded":
                points = points.round()
            points = layer.samples(points, at_rest=at_rest)
            size = points.new_tensor(layer.input_size)
            reached = ((points > -1) & (points < size)).all(-1)
            inside = (inside[..., None] & reached).flatten(1)
            points = points.flatten(1, 2)
        field = self._fields[depth]
        points = points * points.new_tensor(field.stride) + points.new_tensor(field.centre((0, 0)))
        return SamplingLocations(points, inside)

    def centre(self, unit: tuple[float, float]) -> tuple[float, float]:
        """Where a unit of the top map lies in the image, (y, x); whole at centres of pixels."""
        return self._fields[0].centre(unit)

    def unit_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """The unit (row, column) of the top map whose centre is nearest to a point of the image."""
        return self._fields[0].nearest(point, self.units)


def sampling_locations(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    unit: tuple[float, float],
    *,
    stride: int | None = None,
    between: Literal["bilinear", "rounded"] = "bilinear",
    call: Callable[[Tensor], object] | None = None,
) -> SamplingLocations:
    """The points that one unit samples through a stack of layers, in pixels of the image.

    The unit samples the map below at the K taps of the top layer; each of these samples at the K
    taps of the next layer; and so on: 9^3 = 729 points for three 3x3 layers. Samples outside a map,
    which are zero, have the offsets of the nearest unit in it and are marked, like all that follows
    from them, as not `inside`.

        >>> stack = ["layer4.1.conv2", "layer4.1.conv1", "layer4.0.conv2"]
        >>> points, inside = sampling_locations(resnet, image[None], stack, (7, 4))

    Name every layer with a kernel larger than 1x1, and every strided one, between the first and the
    last of the stack, along the way that the samples are to take. In a residual block that is the
    branch of the convolutions; what the shortcut adds is the unit's own position. With several
    offset groups, every group of every layer is followed.

    Args:
        model: holds the layers; it is run once, in evaluation mode and without gradients. To look
            at many units of one image, use `record_sampling`.
        images: [N, 3, H, W] as the model takes them.
        layers: names of convolutions, deformable (deformnet's `DeformConv2d` or torchvision's) or
            plain, and of max or average pooling layers; the top one first.
        unit: (y, x) in the map that the top layer makes; may be fractional.
        stride: pixels of the image between cells of the map that the lowest layer reads. Cell
            (i, j) of it is then taken to be centred on pixel (stride*i, stride*j), which holds
            where every kernel below is odd and padded by half its width, as in ResNets. None finds
            both from the network, as `receptive_field` does.
        between: what is done where a sample falls between units of the layer below. "bilinear"
            mixes the offsets of the four units around it, as the network mixes their values: the
            points are then the mean of those that the four sample. "rounded" goes on from the
            nearest unit, as the script by which the authors drew Figure 6 does.
        call: what to run in the place of `model(images)`.

    Raises:
        ValueError: if a name is unknown, the layers do not run once each in that order, a map is
            not the one that the next layer reads, a layer pads in its own way, the unit is not in
            the top layer's map, or the stride cannot be found.
        TypeError: if a layer is neither a convolution nor pooling.
    """
    if between not in ("bilinear", "rounded"):
        raise ValueError(f"between: wanted 'bilinear' or 'rounded', got {between!r}")
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
    """Runs a model once and keeps what a stack of its layers did, to look at many units.

        >>> stack = record_sampling(resnet, image[None], ["layer4.1.conv2", "layer4.1.conv1"])
        >>> points, inside = stack.locations(stack.unit_at((120, 64)), depth=1)

    Args:
        model, images, layers, stride, call: as for `sampling_locations`.
    Raises:
        ValueError, TypeError: as `sampling_locations`.
    """
    if not layers:
        raise ValueError("layers: wanted at least one name, got none")
    if stride is not None and stride < 1:
        raise ValueError(f"stride: wanted at least 1, got {stride}")
    stack, fields = _record(model, images, layers, stride, call)
    for above, below in pairwise(stack):
        if above.input_size != below.output_size:
            raise ValueError(
                f"layers: {above.name} reads a map of {_size(above.input_size)}, {below.name} "
                f"makes one of {_size(below.output_size)}: a layer between them is not named"
            )
        if above.images != below.images:
            raise ValueError(
                f"layers: {above.name} ran on {above.images} images, {below.name} on {below.images}"
            )
    return SamplingStack(stack, fields)


class _Layer(NamedTuple):
    """What one layer did in one run.

    Attributes:
        images: N, of the batch that it ran on.
        input_size, output_size: (height, width) of its maps.
        offset: [N, 2*G*K, Ho, Wo]; None for a plain layer.
    """

    name: str
    kernel: Kernel
    images: int
    device: torch.device
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    offset: Tensor | None

    def samples(self, units: Tensor, *, at_rest: bool) -> Tensor:
        """Where units [N, P, 2] of the output sample the input: [N, P, G*K, 2]."""
        steps = self.kernel.steps(units.device)
        corner = units * units.new_tensor(self.kernel.stride)
        corner = (corner - units.new_tensor(self.kernel.padding))[:, :, None]
        if self.offset is None:
            return corner + steps
        steps = steps.repeat(self.offset.shape[1] // (2 * len(steps)), 1)
        return corner + steps if at_rest else corner + steps + self._offsets_at(self.offset, units)

    def _offsets_at(self, offset: Tensor, units: Tensor) -> Tensor:
        """Offsets at positions [N, P, 2] between units: [N, P, G*K, 2]."""
        # By hand, as grid_sample's coordinates from -1 to 1 would move a point by a rounding error,
        # and one at the very border out of the map or into it.
        height, width = self.output_size
        last = units.new_tensor((height - 1, width - 1))
        places = units.clamp(min=0).minimum(last)
        low = places.nan_to_num().floor()
        high = (low + 1).minimum(last)
        part = places - low
        cells = offset.double().flatten(2)
        total = cells.new_zeros(*cells.shape[:2], units.shape[1])
        for rows, row_share in ((low, 1 - part), (high, part)):
            for columns, column_share in ((low, 1 - part), (high, part)):
                index = (rows[..., 0] * width + columns[..., 1]).long()
                read = cells.gather(2, index[:, None].expand(-1, cells.shape[1], -1))
                share = (row_share[..., 0] * column_share[..., 1])[:, None]
                total += torch.where(share == 0, 0, share * read)
        return total.unflatten(1, (-1, 2)).permute(0, 3, 1, 2)


def _record(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    stride: int | None,
    call: Callable[[Tensor], object] | None,
) -> tuple[list[_Layer], list[ReceptiveField]]:
    """What the named layers do when the model runs, the top one first; and what is seen by the
    units of its map and of those that the layers read."""
    found = {name: find_layer(model, name) for name in names}
    kernels: dict[str, Kernel] = {}
    for name, layer in found.items():
        try:
            kernels[name] = Kernel.of(layer)
        except TypeError as error:
            kind = type(layer).__name__
            raise TypeError(
                f"layers: {name!r} is a {kind}, wanted a convolution or pooling"
            ) from error
    calls: list[Call] = []
    tracer = FieldTracer(images) if stride is None else None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(watching(found, calls.append))
        if tracer is not None:
            stack.enter_context(tracer)
        (call or model)(images)

    order = [it.name for it in calls]
    if order != list(reversed(names)):
        raise ValueError(
            f"layers: wanted each to run once, the first named last; they ran in the order {order}"
        )
    for it in calls:
        if not kernels[it.name].makes(it.layer, size_of(it.input), size_of(it.output)):
            raise ValueError(
                f"layers: {it.name} makes a map of {_size(size_of(it.output))} from one of "
                f"{_size(size_of(it.input))}, which its kernel, stride and padding do not"
            )
    calls.reverse()
    layers = [
        _Layer(
            it.name,
            kernels[it.name],
            it.output.shape[0] if it.output.ndim == 4 else 1,
            it.output.device,
            size_of(it.input),
            size_of(it.output),
            it.offset,
        )
        for it in calls
    ]
    if tracer is not None:
        fields = [tracer.field(calls[-1].input)]
    else:
        assert stride is not None
        fields = [ReceptiveField((1, 1), (stride, stride), (0, 0))]
    for layer in reversed(layers):
        fields.append(through(layer.kernel, fields[-1]))
    fields.reverse()
    return layers, fields


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
