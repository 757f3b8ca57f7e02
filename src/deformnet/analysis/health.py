"""Whether offsets stay useful while a model trains: where training of deformable layers fails."""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from deformnet.analysis.bins import PoolCall, bins_in, roi_pools, watching_pools
from deformnet.analysis.layers import Call, Kernel, find_convolutions, size_of, watching
from deformnet.nn import DeformConv2d

_LOST = 0.5
_FAR = 0.5
# Operations with a weight in the graph of the gradient, and at which place they have it.
_WEIGHTS = {"ConvolutionBackward": 1, "AddmmBackward": 2, "MmBackward": 1}


@dataclass(frozen=True)
class LayerHealth:
    """How a layer's offsets were in one step; shifts are in cells of the layer's input.

    Of deformable RoI pooling a sample is the middle of a bin, and there are no weights of its own.

    Attributes:
        layer: its name.
        mean_shift, largest_shift: how far samples were moved.
        outside: share of the samples that lay outside the map, where they read nothing and no
            gradient brings them back.
        outside_at_rest: the same share without offsets (in the padding).
        gradient_ratio: norm of the gradient of the weights that make the offsets, by that of the
            layer's own weights. None without gradients, if the latter is zero, or if the weights
            are frozen.
        map_side: the longer side of the map.
    """

    layer: str
    mean_shift: float
    largest_shift: float
    outside: float
    outside_at_rest: float
    gradient_ratio: float | None
    map_side: int

    def runaway(self) -> str | None:
        """What shows that the offsets run away, in words; None if nothing does.

        Any of three signs, none of which a filter has a use for:

        - a sample was moved by more than the map is long, and so off it wherever it started;
        - the mean shift is more than half of that;
        - of the samples that the plain filter has on the map, more than half have left it: the
          layer mostly sees zeros, and as samples out there have no gradient, they stay.

        Numbers that are not finite count as such signs.
        """
        # "Not at most" is also true of NaN.
        if not self.mean_shift <= _FAR * self.map_side:
            return (
                f"its samples are moved by {self.mean_shift:.3g} cells in the mean, "
                f"on a map of {self.map_side}"
            )
        if not self.largest_shift <= self.map_side:
            return (
                f"a sample is moved by {self.largest_shift:.3g} cells, on a map of {self.map_side}"
            )
        if not self.outside - self.outside_at_rest <= _LOST * (1 - self.outside_at_rest):
            return (
                f"{self.outside:.0%} of its samples lie outside the map, "
                f"{self.outside_at_rest:.0%} without offsets"
            )
        return None


def holds_offsets(model: nn.Module) -> bool:
    """Whether a model has a deformable layer."""
    return bool(find_convolutions(model) or roi_pools(model))


class OffsetObserver:
    """Watches the offsets of a model's deformable layers through a step of training.

        >>> with OffsetObserver(model) as observer:
        ...     loss(model(images)).backward()
        >>> for layer in observer.health():
        ...     print(layer, layer.runaway())

    While it watches, it computes a few numbers for each call and keeps them on the device; only
    `health` waits for them. When it does not watch, it costs nothing. (What makes the offsets of
    RoI pooling runs once more when it is watched.)

    Args:
        model: holds deformnet's or torchvision's `DeformConv2d`, or deformable RoI pooling.
    Raises:
        ValueError: if it has neither.
    """

    def __init__(self, model: nn.Module) -> None:
        if not holds_offsets(model):
            raise ValueError(
                f"model: {type(model).__name__} has no deformable layer, neither deformnet's nor "
                "torchvision's"
            )
        self._convolutions, self._pools = find_convolutions(model), roi_pools(model)
        self._watching: ExitStack | None = None
        self._calls: dict[str, list[_CallNumbers]] = {}
        self._makers: dict[str, Tensor | None] = {}

    def __enter__(self) -> Self:
        """Begins anew."""
        self.stop()
        self._calls, self._makers = {}, {}
        self._watching = ExitStack()
        self._watching.enter_context(watching(self._convolutions, self._see))
        self._watching.enter_context(watching_pools(self._pools, self._see_pool))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends watching; what was seen stays."""
        if self._watching is not None:
            self._watching.close()
            self._watching = None

    def health(self) -> list[LayerHealth]:
        """What was seen since watching began, of all layers that ran, over all their calls.

        The gradients are those that the weights have now: call it after `backward`, before they are
        set to zero. (Clipping by norm leaves their ratio as it is.)
        """
        numbers: list[Tensor] = []
        for name, calls in self._calls.items():
            for call in calls:
                numbers += [call.mean, call.largest, call.off, call.off_at_rest]
            convolution = self._convolutions.get(name)
            own = None if convolution is None else convolution.weight
            numbers += _gradient_norms(self._makers[name], own, calls[0].mean.device)
        # One wait for the device, not one for each number.
        values = iter(torch.stack(numbers).tolist() if numbers else [])
        found = []
        for name, calls in self._calls.items():
            samples = sum(call.samples for call in calls)
            mean = outside = at_rest = 0.0
            largest: list[float] = []
            for call in calls:
                share = call.samples / max(samples, 1)
                mean += share * next(values)
                largest.append(next(values))
                outside += share * next(values)
                at_rest += share * next(values)
            made, own = next(values), next(values)
            found.append(
                LayerHealth(
                    name,
                    mean,
                    # max() would pass over a NaN.
                    next((far for far in largest if far != far), max(largest)),
                    outside,
                    at_rest,
                    made / own if made >= 0 and own > 0 else None,
                    max(call.side for call in calls),
                )
            )
        return found

    def _see(self, done: Call) -> None:
        numbers = _measure(done)
        self._calls.setdefault(done.name, []).append(numbers)
        if isinstance(done.layer, DeformConv2d):
            self._makers[done.name] = done.layer.conv_offset.weight
        elif self._makers.get(done.name) is None:
            assert done.offset is not None
            self._makers[done.name] = _nearest_weight(done.offset)

    def _see_pool(self, done: PoolCall) -> None:
        numbers = _measure_pool(done)
        self._calls.setdefault(done.name, []).append(numbers)
        self._makers[done.name] = None  # there is no weight to compare with


@dataclass(frozen=True)
class _CallNumbers:
    """Of one call of a layer: numbers on the device, and what is known without it."""

    mean: Tensor
    largest: Tensor
    off: Tensor
    off_at_rest: Tensor
    samples: int
    side: int


@torch.no_grad()
def _measure(done: Call) -> _CallNumbers:
    assert done.offset is not None
    kernel, (height, width) = Kernel.of(done.layer), size_of(done.input)
    # [N, G, K, (y, x), Ho, Wo]
    offset = done.offset.float().unflatten(1, (-1, kernel.taps, 2))
    out_height, out_width = size_of(done.output)
    steps = kernel.steps(torch.device("cpu"))
    rows = torch.arange(out_height) * kernel.stride[0] - kernel.padding[0] + steps[:, :1]
    columns = torch.arange(out_width) * kernel.stride[1] - kernel.padding[1] + steps[:, 1:]
    on_map = _within(rows, height).float().mean(1) * _within(columns, width).float().mean(1)
    device = offset.device
    y = offset[:, :, :, 0] + rows.to(device)[:, :, None]
    x = offset[:, :, :, 1] + columns.to(device)[:, None, :]
    shift = torch.linalg.vector_norm(offset, dim=3)
    on = _within(y, height) & _within(x, width)
    return _numbers(shift, on, on_map, max(height, width))


def _measure_pool(done: PoolCall) -> _CallNumbers:
    bins, (height, width) = bins_in(done), size_of(done.features)
    # Middles of bins, x and y, in cells from the map's edge.
    plain, moved = (
        (corners[..., :2] + corners[..., 2:]) / 2 * done.pool.spatial_scale
        for corners in (bins.plain, bins.moved)
    )
    sides = moved.new_tensor([width, height])
    at_rest, on = (((at >= 0) & (at <= sides)).all(-1) for at in (plain, moved))
    shift = torch.linalg.vector_norm(moved - plain[:, None], dim=-1)
    return _numbers(shift, on, at_rest, max(height, width))


def _numbers(shift: Tensor, on: Tensor, on_at_rest: Tensor, side: int) -> _CallNumbers:
    """Of how far samples are moved, and whether they lie on the map (or to which part)."""
    nothing = shift.new_zeros(())
    empty = shift.numel() == 0
    return _CallNumbers(
        mean=nothing if empty else shift.mean(),
        largest=nothing if empty else shift.amax(),
        off=nothing if empty else 1 - on.float().mean(),
        off_at_rest=nothing if empty else 1 - on_at_rest.to(shift.device).float().mean(),
        samples=shift.numel(),
        side=side,
    )


def _within(positions: Tensor, side: int) -> Tensor:
    """Whether positions read anything of a map: those less than a cell outside do."""
    return (positions > -1) & (positions < side)


def _gradient_norms(
    made_by: Tensor | None, own: Tensor | None, device: torch.device
) -> list[Tensor]:
    """Norms of two gradients; -1 where there is none."""
    missing = torch.full((), -1.0, device=device)
    grads = [None if weight is None else weight.grad for weight in (made_by, own)]
    return [missing if g is None else torch.linalg.vector_norm(g.detach().float()) for g in grads]


def _nearest_weight(offset: Tensor) -> Tensor | None:
    """The weight that made offsets, of a convolution or a linear layer, by their gradient's graph.

    torchvision's layer is given its offsets, which may have been cut out of a larger tensor first.
    None if there is no graph, or if the weight is frozen.
    """
    level: list[Any] = [offset.grad_fn]
    seen = {None}
    while level:
        level = [node for node in dict.fromkeys(level) if node not in seen]
        seen.update(level)
        for node in level:
            place = _WEIGHTS.get(node.name().removesuffix("0"))
            if place is not None:
                weight = node.next_functions[place][0]
                while weight is not None and not hasattr(weight, "variable"):
                    weight = weight.next_functions[0][0]  # copied by autocast, or transposed
                return None if weight is None else weight.variable
        level = [before for node in level for before, _ in node.next_functions]
    return None
