"""Health of the offsets in training: detection of offsets that run away."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deformnet.analysis.bins import PoolCall, locate_bins, recording_pools, roi_pools
from deformnet.analysis.layers import Call, Kernel, find_convolutions, recording_calls, size_of
from deformnet.nn import DeformConv2d

# Fractions of the samples inside the map, and of the map size, from which offsets run away.
_MAX_LOST = 0.5
_MAX_MEAN_SHIFT = 0.5
# Autograd nodes of operations with a weight, and the index of that input.
_WEIGHTS = {"ConvolutionBackward": 1, "AddmmBackward": 2, "MmBackward": 1}


@dataclass(frozen=True)
class LayerHealth:
    """Statistics of a layer's offsets in one step; shifts are in pixels of the layer's input.

    In deformable RoI pooling, a sample is the center of a bin, and there is no gradient ratio.

    Attributes:
        layer: Name of the layer.
        mean_shift, max_shift: Mean and maximum length of the offsets.
        outside: Fraction of samples outside the map, which are zero and have no gradient.
        outside_without_offsets: The same fraction without offsets (inside the padding).
        gradient_ratio: Norm of the gradient of the weights that predict the offsets, divided by
            that of the layer's own weights. None if there is no gradient or it is zero, or if the
            weights are frozen.
        map_size: Maximum of height and width of the map.
    """

    layer: str
    mean_shift: float
    max_shift: float
    outside: float
    outside_without_offsets: float
    gradient_ratio: float | None
    map_size: int

    def runaway(self) -> str | None:
        """Reason why the offsets run away; None if they do not.

        They run away if any of these conditions holds, none of which is useful to a filter:

        - the maximum shift exceeds the map size, so that a sample is outside wherever its unit is;
        - the mean shift exceeds half of the map size;
        - more than half of the samples inside the map without offsets are outside with them: the
          layer mostly reads zeros, and as these samples have no gradient, they stay outside.

        Non-finite values meet these conditions.
        """
        # `not x <= y` is also true for NaN.
        where = f"pixels on a feature map of size {self.map_size}"
        if not self.mean_shift <= _MAX_MEAN_SHIFT * self.map_size:
            return f"mean offset of {self.mean_shift:.3g} {where}"
        if not self.max_shift <= self.map_size:
            return f"maximum offset of {self.max_shift:.3g} {where}"
        if not self.outside - self.outside_without_offsets <= _MAX_LOST * (
            1 - self.outside_without_offsets
        ):
            return (
                f"{self.outside:.0%} of the samples outside the feature map, "
                f"{self.outside_without_offsets:.0%} without offsets"
            )
        return None


def has_deformable_layers(model: nn.Module) -> bool:
    """Whether a model has a deformable convolution or deformable RoI pooling."""
    return bool(find_convolutions(model) or roi_pools(model))


class OffsetObserver:
    """Records the offsets of a model's deformable layers in a training step.

        >>> with OffsetObserver(model) as observer:
        ...     loss(model(images)).backward()
        >>> for layer in observer.health():
        ...     print(layer, layer.runaway())

    Each recorded call computes a few statistics on the device; only `health` synchronizes. Outside
    of the context there is no overhead. (RoI pooling computes its offsets twice in a recorded
    call.)

    Args:
        model: Model with deformnet's or torchvision's `DeformConv2d`, or deformable RoI pooling.

    Raises:
        ValueError: If it has none of them.
    """

    def __init__(self, model: nn.Module) -> None:
        if not has_deformable_layers(model):
            raise ValueError(
                "expected model to have a deformable layer, deformnet's or torchvision's, "
                f"but {type(model).__name__} has none"
            )
        self._convolutions, self._pools = find_convolutions(model), roi_pools(model)
        self._hooks: ExitStack | None = None
        self._calls: dict[str, list[_CallNumbers]] = {}
        self._offset_weights: dict[str, Tensor | None] = {}

    def __enter__(self) -> Self:
        """Start a new recording."""
        self.stop()
        self._calls, self._offset_weights = {}, {}
        self._hooks = hooks = ExitStack()
        hooks.enter_context(recording_calls(self._convolutions, self._record))
        hooks.enter_context(recording_pools(self._pools, self._record_pool))
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop recording, and keep what was recorded."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def health(self) -> list[LayerHealth]:
        """Statistics of all layers that ran in this recording, over all of their calls.

        Call it after `backward` and before `zero_grad`, because it reads the current gradients.
        (Clipping by norm does not change their ratio.)
        """
        numbers: list[Tensor] = []
        for name, calls in self._calls.items():
            for call in calls:
                numbers += [call.mean, call.max, call.outside, call.outside_without_offsets]
            convolution = self._convolutions.get(name)
            own = None if convolution is None else convolution.weight
            numbers += _gradient_norms(self._offset_weights[name], own, calls[0].mean.device)
        # A single synchronization.
        values = iter(torch.stack(numbers).tolist() if numbers else [])
        layers = []
        for name, calls in self._calls.items():
            samples = sum(call.samples for call in calls)
            mean = outside = without_offsets = 0.0
            maxima: list[float] = []
            for call in calls:
                weight = call.samples / max(samples, 1)
                mean += weight * next(values)
                maxima.append(next(values))
                outside += weight * next(values)
                without_offsets += weight * next(values)
            of_offsets, own = next(values), next(values)
            layers.append(
                LayerHealth(
                    name,
                    mean,
                    # max() would ignore a NaN.
                    next((value for value in maxima if value != value), max(maxima)),
                    outside,
                    without_offsets,
                    of_offsets / own if of_offsets >= 0 and own > 0 else None,
                    max(call.map_size for call in calls),
                )
            )
        return layers

    def _record(self, call: Call) -> None:
        self._calls.setdefault(call.name, []).append(_measure(call))
        if isinstance(call.layer, DeformConv2d):
            self._offset_weights[call.name] = call.layer.conv_offset.weight
        elif self._offset_weights.get(call.name) is None:
            assert call.offset is not None
            self._offset_weights[call.name] = _nearest_weight(call.offset)

    def _record_pool(self, call: PoolCall) -> None:
        self._calls.setdefault(call.name, []).append(_measure_pool(call))
        self._offset_weights[call.name] = None  # there are no other weights to compare with


@dataclass(frozen=True)
class _CallNumbers:
    """Statistics of a call, on the device; the weight of the call and the map size."""

    mean: Tensor
    max: Tensor
    outside: Tensor
    outside_without_offsets: Tensor
    samples: int
    map_size: int


@torch.no_grad()
def _measure(call: Call) -> _CallNumbers:
    assert call.offset is not None
    kernel, (height, width) = Kernel.of(call.layer), size_of(call.input)
    # [N, G, K, (y, x), Ho, Wo]
    offset = call.offset.float().unflatten(1, (-1, kernel.taps, 2))
    out_height, out_width = size_of(call.output)
    steps = kernel.steps(torch.device("cpu"))
    rows = torch.arange(out_height) * kernel.stride[0] - kernel.padding[0] + steps[:, :1]
    columns = torch.arange(out_width) * kernel.stride[1] - kernel.padding[1] + steps[:, 1:]
    regular_inside = _inside(rows, height).float().mean(1) * _inside(columns, width).float().mean(1)
    device = offset.device
    y = offset[:, :, :, 0] + rows.to(device)[:, :, None]
    x = offset[:, :, :, 1] + columns.to(device)[:, None, :]
    shift = torch.linalg.vector_norm(offset, dim=3)
    inside = _inside(y, height) & _inside(x, width)
    return _numbers(shift, inside, regular_inside, max(height, width))


def _measure_pool(call: PoolCall) -> _CallNumbers:
    bins, (height, width) = locate_bins(call), size_of(call.features)
    # Centers of bins, (x, y), in pixels of the map from its edge.
    regular, deformed = (
        (corners[..., :2] + corners[..., 2:]) / 2 * call.pool.spatial_scale for corners in bins
    )
    size = deformed.new_tensor([width, height])
    regular_inside, inside = (
        ((centers >= 0) & (centers <= size)).all(-1) for centers in (regular, deformed)
    )
    shift = torch.linalg.vector_norm(deformed - regular[:, None], dim=-1)
    return _numbers(shift, inside, regular_inside, max(height, width))


def _numbers(shift: Tensor, inside: Tensor, regular_inside: Tensor, map_size: int) -> _CallNumbers:
    """Statistics of shifts and of masks (or fractions) of samples inside the map."""
    if not shift.numel():
        zero = shift.new_zeros(())
        return _CallNumbers(zero, zero, zero, zero, 0, map_size)
    return _CallNumbers(
        mean=shift.mean(),
        max=shift.amax(),
        outside=1 - inside.float().mean(),
        outside_without_offsets=1 - regular_inside.to(shift.device).float().mean(),
        samples=shift.numel(),
        map_size=map_size,
    )


def _inside(positions: Tensor, length: int) -> Tensor:
    """Mask of positions less than a pixel outside the map, whose samples are not zero."""
    return (positions > -1) & (positions < length)


def _gradient_norms(
    of_offsets: Tensor | None, own: Tensor | None, device: torch.device
) -> list[Tensor]:
    """Norms of the gradients of two weights; -1 if there is no gradient."""
    missing = torch.full((), -1.0, device=device)
    grads = [None if weight is None else weight.grad for weight in (of_offsets, own)]
    return [missing if g is None else torch.linalg.vector_norm(g.detach().float()) for g in grads]


def _nearest_weight(offset: Tensor) -> Tensor | None:
    """Weight of the convolution or linear layer that predicted offsets, from the autograd graph.

    torchvision's layer takes its offsets as an argument, which may be a slice of a larger tensor.
    None if there is no graph, or if the weight is frozen.
    """
    level: list[Any] = [offset.grad_fn]
    seen = {None}
    while level:
        level = [node for node in dict.fromkeys(level) if node not in seen]
        seen.update(level)
        for node in level:
            index = _WEIGHTS.get(node.name().removesuffix("0"))
            if index is not None:
                weight = node.next_functions[index][0]
                while weight is not None and not hasattr(weight, "variable"):
                    weight = weight.next_functions[0][0]  # cast by autocast, or transposed
                return None if weight is None else weight.variable
        level = [parent for node in level for parent, _ in node.next_functions]
    return None
