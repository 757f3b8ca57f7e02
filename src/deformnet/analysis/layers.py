"""Deformable convolutions in any model, found by their type, and what they do when it runs."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from deformnet.nn import DeformConv2d

DEFORMABLE = (DeformConv2d, torchvision.ops.DeformConv2d)
"""The first makes its offsets itself; the second is given them in every call."""


class Kernel(NamedTuple):
    """How a convolution or pooling steps over its input; pairs are (y, x).

    Attributes:
        padding: above and left of the input.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, layer: nn.Module) -> "Kernel":
        """
        Raises:
            TypeError: if the layer is none of those.
        """
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            dilation = layer.dilation if isinstance(layer, nn.MaxPool2d) else 1
            numbers = (layer.kernel_size, layer.stride, layer.padding, dilation)
            return cls(*(_pair(number) for number in numbers))
        if not isinstance(layer, nn.Conv2d | torchvision.ops.DeformConv2d):
            raise TypeError(f"wanted a convolution or pooling layer, got a {type(layer).__name__}")
        padding = layer.padding
        if isinstance(padding, str):
            assert isinstance(layer, nn.Conv2d)
            left, _, top, _ = layer._reversed_padding_repeated_twice
            padding = (top, left)
        size, stride, dilation = map(_pair, (layer.kernel_size, layer.stride, layer.dilation))
        return cls(size, stride, _pair(padding), dilation)

    def makes(self, layer: nn.Module, input: tuple[int, int], output: tuple[int, int]) -> bool:
        """Whether the layer that it is of makes such an output, (height, width), of such an input.

        One that pads in its own `forward`, as timm's `Conv2dSame` does, makes a larger one.
        """
        if layer.padding == "same":
            return input == output
        sizes = zip(self.size, self.stride, self.padding, self.dilation, input, output, strict=True)
        most = 1 if getattr(layer, "ceil_mode", False) else 0
        return all(
            0 <= made - ((side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1) <= most
            for taps, stride, padding, dilation, side, made in sizes
        )

    @property
    def taps(self) -> int:
        return self.size[0] * self.size[1]

    def steps(self, device: torch.device) -> Tensor:
        """The taps at rest, (y, x) from the first one: int64 [K, 2]."""
        along = [
            torch.arange(taps, device=device) * dilation
            for taps, dilation in zip(self.size, self.dilation, strict=True)
        ]
        return torch.stack(torch.meshgrid(*along, indexing="ij"), -1).flatten(0, 1)


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        name: of the layer, in `model.named_modules()`.
        input, output: [N, C, H, W] and [N, C_out, Ho, Wo] (or without N).
        offset: [N, 2*G*K, Ho, Wo], per tap (y, x), in cells of the input; None if the layer is not
            deformable.
    """

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor
    offset: Tensor | None


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """
    Raises:
        ValueError: if there is none, with names that are nearly the same.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, cutoff=0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"layers: the model has no module {name!r}{hint}")
    return modules[name]


def find_convolutions(
    model: nn.Module,
) -> dict[str, DeformConv2d | torchvision.ops.DeformConv2d]:
    """The deformable convolutions of a model, deformnet's and torchvision's, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DEFORMABLE)}


def deformable_layers(
    model: nn.Module, names: Sequence[str] | None = None
) -> dict[str, DeformConv2d | torchvision.ops.DeformConv2d]:
    """Those deformable convolutions of a model that are wanted, by name.

    Args:
        names: those that are wanted; None for all.
    Raises:
        ValueError: if the model has none, or a name is unknown.
        TypeError: if a name is that of another kind of layer.
    """
    if names is None:
        found = find_convolutions(model)
        if not found:
            raise ValueError(
                f"model: {type(model).__name__} has no deformable convolution, neither "
                "deformnet's DeformConv2d nor torchvision's"
            )
        return found
    if not names:
        raise ValueError("layers: wanted at least one name, got none")
    found = {}
    for name in names:
        layer = find_layer(model, name)
        if not isinstance(layer, DEFORMABLE):
            raise TypeError(
                f"layers: {name!r} is a {type(layer).__name__}, wanted a deformable convolution"
            )
        found[name] = layer
    return found


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[Call], None]) -> Iterator[None]:
    """Shows every call of some layers to `see`, when it is done."""
    offsets: dict[str, Tensor] = {}

    def note_offset(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            offsets[name] = output

        return hook

    def note(name: str) -> Callable[..., None]:
        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            offset = None
            if isinstance(layer, DeformConv2d):
                taps = layer.kernel_size[0] * layer.kernel_size[1]
                # Masks may follow.
                offset = offsets.pop(name)[:, : 2 * layer.offset_groups * taps]
            elif isinstance(layer, torchvision.ops.DeformConv2d):
                offset = args[1] if len(args) > 1 else kwargs["offset"]
            input = args[0] if args else kwargs["input"]
            output = output if isinstance(output, Tensor) else output[0]
            see(Call(name, layer, input, output, offset))

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            if isinstance(layer, DeformConv2d):
                handles.append(layer.conv_offset.register_forward_hook(note_offset(name)))
            handles.append(layer.register_forward_hook(note(name), with_kwargs=True))
        with hooks_called():
            yield
    finally:
        for handle in handles:
            handle.remove()


def hooks_called() -> AbstractContextManager[None]:
    """Compiled models run as they were written: their code knows no hooks that came later."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def size_of(map: Tensor) -> tuple[int, int]:
    """Height and width of a map."""
    height, width = map.shape[-2:]
    return height, width


def _pair(numbers: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(numbers, int):
        return numbers, numbers
    y, x = numbers
    return y, x
