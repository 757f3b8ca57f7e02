"""Where in the image a unit looks, through several layers (Dai et al. 2017, Figures 5 and 6)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformnet.nn import DeformConv2d


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


def sampling_locations(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    unit: tuple[float, float],
    *,
    stride: int,
) -> SamplingLocations:
    """The points that one unit samples through a stack of convolutions, in pixels of the image.

    The unit samples the map below at the K taps of the top layer; each of these samples at the K
    taps of the next layer; and so on: 9^3 = 729 points for three 3x3 layers. Where a sample falls
    between units of the layer below, the offsets of the four units around it are mixed bilinearly,
    as their values are. Samples outside that map, which are zero, have the offsets of the nearest
    unit in it and are marked, like all that follows from them, as not `inside`.

        >>> stack = ["layer4.1.conv2", "layer4.1.conv1", "layer4.0.conv2"]
        >>> points, inside = sampling_locations(resnet, image[None], stack, (7, 4), stride=16)

    Name every convolution larger than 1x1, and every strided one, between the first and the last
    of the stack, along the way that the samples are to take. In a residual block that is the
    branch of the convolutions; what the shortcut adds is the unit's own position. With several
    offset groups, every group of every layer is followed.

    Args:
        model: holds the layers; it is run once, in evaluation mode and without gradients.
        images: [N, 3, H, W] as the model takes them.
        layers: names of `DeformConv2d` or `nn.Conv2d` modules, the top one first.
        unit: (y, x) in the map that the top layer makes; may be fractional.
        stride: pixels of the image between cells of the map that the lowest layer reads. Cell
            (i, j) of it is taken to be centred on pixel (stride*i, stride*j), which holds where
            every kernel below is odd and padded by half its width, as in ResNets. (Where it does
            not hold, the cells are shifted by a constant: add it to the points.)

    Raises:
        ValueError: if a name is unknown, the layers do not run once each in that order, a map is
            not the one that the next layer reads, or the unit is not in the top layer's map.
        TypeError: if a layer is no convolution.
    """
    if not layers:
        raise ValueError("layers: wanted at least one name, got none")
    if stride < 1:
        raise ValueError(f"stride: wanted at least 1, got {stride}")
    stack = _record(model, images, layers)
    for above, below in pairwise(stack):
        if above.input_size != below.output_size:
            raise ValueError(
                f"layers: {above.name} reads a map of {_size(above.input_size)}, {below.name} "
                f"makes one of {_size(below.output_size)}: a layer between them is not named"
            )
    height, width = stack[0].output_size
    if not (0 <= unit[0] <= height - 1 and 0 <= unit[1] <= width - 1):
        raise ValueError(f"unit: wanted one of the {height}x{width} units, got {tuple(unit)}")

    device = images.device
    points = torch.tensor(unit, dtype=torch.float64, device=device).expand(len(images), 1, 2)
    inside = torch.ones(points.shape[:2], dtype=torch.bool, device=device)
    for layer in stack:
        points = layer.samples(points)
        size = points.new_tensor(layer.input_size)
        reached = ((points > -1) & (points < size)).all(-1)
        inside = (inside[..., None] & reached).flatten(1)
        points = points.flatten(1, 2)
    return SamplingLocations(points * stride, inside)


@dataclass(frozen=True)
class _Layer:
    """What one convolution did in one run.

    Attributes:
        input_size, output_size: (height, width) of its maps.
        offset: [N, 2*G*K, Ho, Wo]; None for a plain convolution.
    """

    name: str
    conv: nn.Conv2d
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    offset: Tensor | None

    def samples(self, units: Tensor) -> Tensor:
        """Where units [N, P, 2] of the output sample the input: [N, P, G*K, 2]."""
        steps = [
            torch.arange(taps, device=units.device) * dilation
            for taps, dilation in zip(self.conv.kernel_size, self.conv.dilation, strict=True)
        ]
        taps = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 2)
        if isinstance(self.conv.padding, str):
            left, _, top, _ = self.conv._reversed_padding_repeated_twice
        else:
            top, left = self.conv.padding
        corner = units * units.new_tensor(self.conv.stride) - units.new_tensor((top, left))
        if self.offset is None:
            return corner[:, :, None] + taps
        moved = self._offsets_at(units)
        return corner[:, :, None] + taps.repeat(moved.shape[2] // len(taps), 1) + moved

    def _offsets_at(self, units: Tensor) -> Tensor:
        """Offsets at positions [N, P, 2] between units: [N, P, G*K, 2]."""
        assert self.offset is not None
        last = units.new_tensor(self.output_size) - 1
        grid = (2 * units / last.clamp(min=1) - 1).flip(-1)  # grid_sample wants (x, y), -1 to 1
        read = F.grid_sample(
            self.offset.double(),
            grid[:, None],
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )
        return read[:, :, 0].unflatten(1, (-1, 2)).permute(0, 3, 1, 2)


def _record(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[_Layer]:
    """Runs the model and notes what the named layers did."""
    convolutions = {name: _find(model, name) for name in names}
    runs: list[tuple[str, Tensor, Tensor]] = []
    offsets: dict[str, Tensor] = {}
    handles = []
    for name, conv in convolutions.items():

        def note(
            conv: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            runs.append((name, args[0], output))

        def note_offset(
            conv: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            offsets[name] = output

        handles.append(conv.register_forward_hook(note))
        if isinstance(conv, DeformConv2d):
            handles.append(conv.conv_offset.register_forward_hook(note_offset))
    try:
        with torch.no_grad(), _evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()

    order = [name for name, _, _ in runs]
    if order != list(reversed(names)):
        raise ValueError(
            f"layers: wanted each to run once, the first named last; they ran in the order {order}"
        )
    stack = []
    for name, input, output in reversed(runs):
        conv, offset = convolutions[name], None
        if isinstance(conv, DeformConv2d):
            taps = conv.kernel_size[0] * conv.kernel_size[1]
            offset = offsets[name][:, : 2 * conv.offset_groups * taps]  # masks may follow
        (height, width), (out_height, out_width) = input.shape[-2:], output.shape[-2:]
        stack.append(_Layer(name, conv, (height, width), (out_height, out_width), offset))
    return stack


def _find(model: nn.Module, name: str) -> nn.Conv2d:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"layers: the model has no module {name!r}") from None
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"layers: {name!r} is a {type(module).__name__}, wanted an nn.Conv2d")
    return module


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
