"""Parameters, floating-point operations, memory and run time of networks with deformable layers."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deformnet.analysis.layers import evaluating, hooks
from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.ops._arguments import positive
from deformnet.ops.deform_conv.operator import multiply_adds


def _flop_counter() -> FlopCounterMode:
    """PyTorch's counter with torchvision's deformable convolution, if torchvision is imported."""
    formulas: dict[Any, Callable[..., int]] = {}
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        formulas[torch.ops.torchvision.deform_conv2d] = _torchvision
        formulas[torch.ops.torchvision._deform_conv2d_backward] = _torchvision_backward
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call, forward or backward.

    A multiply-add is two operations. As in PyTorch's `FlopCounterMode`, convolutions and matrix
    products count (with every tap, also at the border, and without biases), and also:

    - Deformable convolution, including torchvision's: the multiply-adds of the plain convolution,
      and four for each channel of each sample, one for each pixel of the bilinear read. A mask is
      free, as it is multiplied into the four weights. `conv_offset` counts as any convolution.
    - Deformable RoI pooling, position-sensitive or not, with and without offsets: four
      multiply-adds for each channel of each sample. The sampling rule defines the number of samples
      of a box, whether they lie on the feature map or not.
    - Backward: one such product for the gradients of all samples and one for those of the weights;
      and four multiply-adds for each channel of each sample wherever it is read again (for the
      weights), scattered to the map, or compared with its pixels (for offsets and masks).

    These are the operations of the definition, whatever a kernel saves or adds. Element-wise
    operations, normalization, max pooling, interpolation, torchvision's other operators (such as
    `nms` and `roi_align`) and the reference implementation (`backend="reference"`), except its
    matrix products, do not count.

    Args:
        call: Computation such as `lambda: model(images)`; called once, on real or meta tensors.

    Raises:
        ValueError: If it pools boxes without values (on the meta device) by a sampling rule whose
            number of samples depends on them.
    """
    with _flop_counter() as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class LayerCost:
    """Cost of a layer in a forward pass, over all of its calls.

    Attributes:
        layer: Name of the layer.
        kind: Class of the layer.
        parameters: Number of parameters.
        flops: Floating-point operations; see `count_flops`.
        output: Shape of the output of the last call; None if it is not a single tensor.
        output_bytes: Memory of all outputs, most of which training keeps for the backward pass.
        seconds: Median run time.
    """

    layer: str
    kind: str
    parameters: int
    flops: int
    output: tuple[int, ...] | None
    output_bytes: int
    seconds: float


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model in a forward pass; `dataclasses.asdict` converts it for JSON.

    Attributes:
        layers: Layers in the order of their first calls. Operations outside of them are only in the
            totals.
        parameters: Number of parameters of the model.
        flops: Floating-point operations of the model.
        seconds: Median run time of the model, without timing its layers.
        peak_bytes: Peak GPU memory of the pass above the memory before it; None on other devices.
    """

    layers: list[LayerCost]
    parameters: int
    flops: int
    seconds: float
    peak_bytes: int | None


def model_cost(model: nn.Module, *inputs: Any, repeats: int = 5) -> ModelCost:
    """Measure parameters, operations, output size and run time of each layer of a model.

    A layer is a module without children, or a deformable layer of this package together with the
    layer that predicts its offsets. On a GPU, the run times of layers add up to more than the
    model's, as each layer has to finish before the next starts. Layers of a compiled model are
    timed without compilation.

    Args:
        model: Any network; run in evaluation mode without gradients.
        inputs: Arguments of the model.
        repeats: Timed passes of the layers and of the model, each after a warmup; at least 1.

    Raises:
        ValueError: If `repeats` is less than 1.
    """
    positive("repeats", repeats)
    layers = _layers(model)
    device = next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    cuda = device is not None and device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    flops: dict[str, int] = {}
    outputs: dict[str, tuple[int, ...] | None] = {}
    output_bytes: dict[str, int] = {}
    passes: list[dict[str, float]] = []
    with torch.no_grad(), evaluating(model):
        with _flop_counter() as counter:

            def count(name: str, before: float, output: Any) -> None:
                flops[name] = flops.get(name, 0) + int(counter.get_total_flops() - before)
                outputs[name] = tuple(output.shape) if isinstance(output, Tensor) else None
                tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                output_bytes[name] = output_bytes.get(name, 0) + sum(t.nbytes for t in tensors)

            with _measuring(layers, counter.get_total_flops, count):
                model(*inputs)
        for _ in range(repeats):
            seconds = dict.fromkeys(flops, 0.0)

            def add(name: str, before: float, _: Any, seconds: dict[str, float] = seconds) -> None:
                seconds[name] += now() - before

            with _measuring(layers, now, add):
                model(*inputs)
            passes.append(seconds)
        model(*inputs)  # a compiled model may compile here
        totals = []
        held_bytes = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            start = now()
            model(*inputs)
            totals.append(now() - start)
        peak = torch.cuda.max_memory_allocated(device) - held_bytes if cuda else None
    rows = [
        LayerCost(
            name,
            type(layers[name]).__name__,
            sum(parameter.numel() for parameter in layers[name].parameters()),
            flops[name],
            outputs[name],
            output_bytes[name],
            statistics.median(seconds[name] for seconds in passes),
        )
        for name in flops
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(rows, parameters, counter.get_total_flops(), statistics.median(totals), peak)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to measure, each once, by name."""
    whole = (DeformConv2d, DeformRoIPool2d, DeformPSRoIPool2d)
    layers: dict[str, nn.Module] = {}
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():  # parents come first
        if isinstance(module, whole):
            inner.update(child for child in module.modules() if child is not module)
        if module not in inner and (isinstance(module, whole) or not list(module.children())):
            layers[name] = module
    return layers


@contextmanager
def _measuring(
    layers: dict[str, nn.Module],
    before: Callable[[], float],
    after: Callable[[str, float, Any], None],
) -> Iterator[None]:
    """Call `before` when a layer starts, and `after` with its result when the layer returns."""
    stack: list[float] = []

    def start(_: nn.Module, args: Any) -> None:
        stack.append(before())

    def end(name: str, _: nn.Module, args: Any, output: Any) -> None:
        after(name, stack.pop(), output)

    with hooks() as handles:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(start))
            handles.append(layer.register_forward_hook(partial(end, name)))
        yield


# torchvision's formulas take the shapes of the tensors.


def _torchvision(
    input: Sequence[int], weight: Sequence[int], *others: object, out_shape: Sequence[int]
) -> int:
    products, reads = multiply_adds(input, out_shape, weight)
    return 2 * (products + reads)


def _torchvision_backward(
    grad_output: Sequence[int],
    input: Sequence[int],
    weight: Sequence[int],
    *others: object,
    out_shape: object,
) -> int:
    # It computes all gradients, needed or not.
    products, reads = multiply_adds(input, grad_output, weight)
    return 2 * (2 * products + 3 * reads)
