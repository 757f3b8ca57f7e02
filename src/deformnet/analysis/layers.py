"""Deformable convolutions of any model, and recording of their calls."""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deformnet.nn import DeformConv2d
from deformnet.nn.deform_conv import margins
from deformnet.nn.given_offsets import GivenOffsetsConv2d
from deformnet.ops._arguments import pair

_T = TypeVar("_T")


class TorchvisionConv(nn.Module):
    """Typing of `torchvision.ops.DeformConv2d`, whose `forward(input, offset, mask=None)` is given
    its offsets."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    weight: Tensor


def is_torchvision_conv(layer: nn.Module) -> TypeGuard[TorchvisionConv]:
    """Whether a layer is a `torchvision.ops.DeformConv2d`, without importing torchvision."""
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(layer, ops.DeformConv2d)


Deformable = DeformConv2d | GivenOffsetsConv2d | TorchvisionConv
"""The first computes its offsets itself; the others take them as an argument."""


class Kernel(NamedTuple):
    """Geometry of a convolution or pooling layer; pairs are (y, x).

    Attributes:
        size: Height and width of the kernel.
        stride: Stride.
        padding: Padding above and left of the input.
        dilation: Spacing between taps.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: nn.Module, name: str = "layer") -> "Kernel":
        """Geometry of a layer, whose name is for messages.

        Raises:
            TypeError: If the layer is not a 2-D convolution or pooling.
        """
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            dilation = layer.dilation if isinstance(layer, nn.MaxPool2d) else 1
            numbers = (layer.kernel_size, layer.stride, layer.padding, dilation)
            return cls(*(pair("geometry", number) for number in numbers))
        if isinstance(layer, nn.Conv2d):
            top, _, left, _ = margins(layer)
            padding = (top, left)
        elif is_torchvision_conv(layer):
            padding = pair("padding", layer.padding)
        else:
            raise TypeError(
                f"expected {name!r} to be a convolution or pooling layer, "
                f"but got a {type(layer).__name__}"
            )
        return cls(
            pair("kernel_size", layer.kernel_size),
            pair("stride", layer.stride),
            padding,
            pair("dilation", layer.dilation),
        )

    def explains(self, layer: nn.Module, input: tuple[int, int], output: tuple[int, int]) -> bool:
        """Whether a layer with this kernel maps an input size to an output size (height, width).

        False for layers that pad in their own `forward`, such as timm's `Conv2dSame`.
        """
        if layer.padding == "same":
            return input == output
        sizes = zip(self.size, self.stride, self.padding, self.dilation, input, output, strict=True)
        slack = 1 if getattr(layer, "ceil_mode", False) else 0
        return all(
            0 <= length - ((side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1) <= slack
            for taps, stride, padding, dilation, side, length in sizes
        )

    @property
    def taps(self) -> int:
        """Number of taps K."""
        return self.size[0] * self.size[1]

    def steps(self, device: torch.device) -> Tensor:
        """Regular grid of the taps, (y, x) from the first one: int64 [K, 2]."""
        along = [
            torch.arange(taps, device=device) * dilation
            for taps, dilation in zip(self.size, self.dilation, strict=True)
        ]
        return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).flatten(0, 1)


class Call(NamedTuple):
    """A call of a layer.

    Attributes:
        name: Name of the layer in `model.named_modules()`.
        layer: The layer.
        input, output: [N, C, H, W] and [N, C_out, Ho, Wo] (or without N).
        offset: [N, 2*G*K, Ho, Wo], per tap (y, x), in pixels of the input; None if the layer is not
            deformable.
    """

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor
    offset: Tensor | None


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """A submodule by name.

    Raises:
        ValueError: If there is none; the message lists similar names.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, cutoff=0.4)
        hint = f"; near misses: {', '.join(near)}" if near else ""
        raise ValueError(
            f"expected layers to be names of modules of the model, but got {name!r}{hint}"
        )
    return modules[name]


def is_deformable(layer: nn.Module) -> TypeGuard[Deformable]:
    """Whether a layer is a deformable convolution of deformnet or torchvision."""
    return isinstance(layer, DeformConv2d | GivenOffsetsConv2d) or is_torchvision_conv(layer)


def find_convolutions(model: nn.Module) -> dict[str, Deformable]:
    """Deformable convolutions of a model, deformnet's and torchvision's, by name."""
    return {name: layer for name, layer in model.named_modules() if is_deformable(layer)}


def deformable_layers(
    model: nn.Module, names: Sequence[str] | None = None
) -> dict[str, Deformable]:
    """Selected deformable convolutions of a model, by name.

    Args:
        model: Any model.
        names: Names of the layers; None for all.

    Raises:
        ValueError: If the model has none, or a name is unknown.
        TypeError: If a layer is not a deformable convolution.
    """
    if names is None:
        layers = find_convolutions(model)
        if not layers:
            raise ValueError(
                "expected model to have a deformable convolution, deformnet's DeformConv2d or "
                f"torchvision's, but {type(model).__name__} has none"
            )
        return layers
    if not names:
        raise ValueError("expected layers to be at least one name, but got none")
    layers = {}
    for name in names:
        layer = find_layer(model, name)
        if not is_deformable(layer):
            raise TypeError(
                f"expected {name!r} to be a deformable convolution, "
                f"but got a {type(layer).__name__}"
            )
        layers[name] = layer
    return layers


@contextmanager
def recording_calls(
    layers: Mapping[str, nn.Module], record: Callable[[Call], None]
) -> Iterator[None]:
    """Pass every call of the layers to `record` when it returns."""
    offsets: dict[str, Tensor] = {}

    def keep_offset(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        offsets[name] = output

    def record_call(
        name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        offset = None
        if isinstance(layer, DeformConv2d):
            offset = layer.offsets_of(offsets.pop(name))
        elif is_deformable(layer):
            offset = args[1] if len(args) > 1 else kwargs["offset"]
        input = args[0] if args else kwargs["input"]
        output = output if isinstance(output, Tensor) else output[0]
        record(Call(name, layer, input, output, offset))

    with hooks() as handles:
        for name, layer in layers.items():
            if isinstance(layer, DeformConv2d):
                handles.append(layer.conv_offset.register_forward_hook(partial(keep_offset, name)))
            hook = partial(record_call, name)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        yield


@contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """A list of hooks, which are removed at the end.

    Compiled models run eagerly, as their compiled code does not call new hooks.
    """
    handles: list[RemovableHandle] = []
    try:
        with torch.compiler.set_stance("force_eager"):
            yield handles
    finally:
        for handle in handles:
            handle.remove()


def the_only(name: str, calls: Sequence[_T]) -> _T:
    """The recorded call of a layer that is expected to run once.

    Raises:
        ValueError: If it ran another number of times.
    """
    if len(calls) != 1:
        raise ValueError(f"expected {name!r} to run once, but it ran {len(calls)} times")
    return calls[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and restore the mode of each module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def size_of(map: Tensor) -> tuple[int, int]:
    """Height and width of a feature map."""
    height, width = map.shape[-2:]
    return height, width
