"""How much arithmetic a network does, its deformable layers included.

PyTorch's `torch.utils.flop_counter.FlopCounterMode` counts convolutions and matrix products, and
the operators of this package. This module also counts torchvision's deformable convolution.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision  # noqa: F401 (defines torch.ops.torchvision)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deformnet.analysis.layers import evaluating, hooks_called
from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d


def _flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which also knows torchvision's operator where torchvision is imported."""
    formulas: dict[Any, Callable[..., int]] = {}
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        formulas[torch.ops.torchvision.deform_conv2d] = _torchvision
        formulas[torch.ops.torchvision._deform_conv2d_backward] = _torchvision_backward
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_flops(call: Callable[[], object]) -> int:
    """The floating-point operations of whatever a call computes, forward or backward.

    A multiply-add is two operations. Counted are convolutions and matrix products, as PyTorch's
    `FlopCounterMode` does (every tap counts, at the border too; biases do not), and:

    - deformable convolution: the multiply-adds of the plain convolution, and four for each channel
      of each sample, one for each pixel of the bilinear read. A mask costs nothing besides, as it
      goes into the four weights. Its `conv_offset` is a convolution like any other. torchvision's
      costs the same.
    - deformable RoI pooling, plain and position-sensitive, with and without offsets: four
      multiply-adds for each channel of each sample. How many samples a box has is decided by the
      rule of sampling, whether they lie on the map or not.
    - backward, one such product for the gradients of all that is sampled and one for those of the
      weights; and four multiply-adds for each channel of each sample wherever it is read again
      (for the weights), spread over the map, or compared with its pixels (for offsets and masks).

    It is arithmetic by definition, not what a kernel saves or adds. Not counted are element-wise
    operations, normalisation, max pooling and interpolation; torchvision's other operators, such
    as `nms` and `roi_align`; and the reference implementation (`backend="reference"`), but for the
    matrix products inside.

    Args:
        call: computes something, such as `lambda: model(images)`; it is called once, on real or on
            meta tensors.
    Raises:
        ValueError: if it pools boxes without values (on the meta device) by a rule whose number of
            samples depends on them.
    """
    with _flop_counter() as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs in one forward pass, over all its calls.

    Attributes:
        layer, kind: its name and its class.
        parameters: how many numbers it holds.
        flops: as `count_flops` counts them.
        output: shape of what it made, in its last call; None if that is not one tensor.
        output_bytes: memory of all that it made; training keeps most of it for the backward pass.
        seconds: median of the repeats.
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
    """What a model costs in one forward pass; `dataclasses.asdict` makes it ready for JSON.

    Attributes:
        layers: those that ran, in the order of their first calls. What the model does besides, in
            its own code, is in the totals only.
        parameters: of the whole model.
        flops: of the whole model.
        seconds: of the whole model, median of the repeats; no layer is timed meanwhile.
        peak_bytes: the most memory that the pass had on the GPU beyond what was there before it;
            None on other devices, where PyTorch does not count it.
    """

    layers: list[LayerCost]
    parameters: int
    flops: int
    seconds: float
    peak_bytes: int | None


def model_cost(model: nn.Module, *inputs: Any, repeats: int = 5) -> ModelCost:
    """Parameters, arithmetic, output size and time of each layer of a model.

    A layer is a module without children; the deformable layers of this package are one each, with
    what makes their offsets. On a GPU the layers are timed one at a time, as it has to finish each
    before the next begins, so that their times add up to more than the model's. Those of a compiled
    model are timed as they are without compilation.

    Args:
        model: any network; run in evaluation mode and without gradients.
        inputs: what it is called with.
        repeats: timed passes, of the layers and of the whole, each after one that warms up; at
            least 1.
    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: wanted at least 1, got {repeats}")
    layers = _layers(model)
    device = next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    cuda = device is not None and device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    flops: dict[str, int] = {}
    outputs: dict[str, tuple[int, ...] | None] = {}
    made: dict[str, int] = {}
    passes: list[dict[str, float]] = []
    with torch.no_grad(), evaluating(model):
        with _flop_counter() as counter:

            def note(name: str, before: float, output: Any) -> None:
                flops[name] = flops.get(name, 0) + int(counter.get_total_flops() - before)
                outputs[name] = tuple(output.shape) if isinstance(output, Tensor) else None
                tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                made[name] = made.get(name, 0) + sum(tensor.nbytes for tensor in tensors)

            with _around(layers, counter.get_total_flops, note):
                model(*inputs)
        for _ in range(repeats):
            seconds = dict.fromkeys(flops, 0.0)

            def add(name: str, before: float, _: Any, seconds: dict[str, float] = seconds) -> None:
                seconds[name] += now() - before

            with _around(layers, now, add):
                model(*inputs)
            passes.append(seconds)
        model(*inputs)  # one that is compiled may have to be now
        totals = []
        held = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            start = now()
            model(*inputs)
            totals.append(now() - start)
        peak = torch.cuda.max_memory_allocated(device) - held if cuda else None
    rows = [
        LayerCost(
            name,
            type(layers[name]).__name__,
            sum(parameter.numel() for parameter in layers[name].parameters()),
            flops[name],
            outputs[name],
            made[name],
            statistics.median(seconds[name] for seconds in passes),
        )
        for name in flops
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(rows, parameters, counter.get_total_flops(), statistics.median(totals), peak)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are rows of the table, each once, by name."""
    whole = (DeformConv2d, DeformRoIPool2d, DeformPSRoIPool2d)
    found: dict[str, nn.Module] = {}
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():  # parents come first
        if isinstance(module, whole):
            inner.update(child for child in module.modules() if child is not module)
        if module not in inner and (isinstance(module, whole) or not list(module.children())):
            found[name] = module
    return found


@contextmanager
def _around(
    layers: dict[str, nn.Module],
    before: Callable[[], float],
    after: Callable[[str, float, Any], None],
) -> Iterator[None]:
    """Calls `before` as each layer begins, and `after` with what that said as it ends."""
    handles = []
    for name, layer in layers.items():
        begun: list[float] = []

        def begin(_: nn.Module, args: Any, begun: list[float] = begun) -> None:
            begun.append(before())

        def end(
            _: nn.Module, args: Any, output: Any, name: str = name, begun: list[float] = begun
        ) -> None:
            after(name, begun.pop(), output)

        handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        with hooks_called():
            yield
    finally:
        for handle in handles:
            handle.remove()


# torchvision's formulas take the shapes of the tensors.


def _torchvision(
    input: Sequence[int], weight: Sequence[int], *others: object, out_shape: Sequence[int]
) -> int:
    products, reads = _multiply_adds(input, weight, out_shape)
    return 2 * (products + reads)


def _torchvision_backward(
    grad_output: Sequence[int],
    input: Sequence[int],
    weight: Sequence[int],
    *others: object,
    out_shape: object,
) -> int:
    # It computes all gradients, needed or not.
    products, reads = _multiply_adds(input, weight, grad_output)
    return 2 * (2 * products + 3 * reads)


def _multiply_adds(
    input: Sequence[int], weight: Sequence[int], output: Sequence[int]
) -> tuple[int, int]:
    """Those of the convolution's products, N*Ho*Wo*C_out*C/groups*K, and of the reads."""
    out_channels, group_channels, kh, kw = weight
    taps = output[0] * output[2] * output[3] * kh * kw
    return taps * out_channels * group_channels, taps * input[1] * 4
