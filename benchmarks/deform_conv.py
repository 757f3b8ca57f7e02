"""Deformable convolution against plain convolution, torchvision and onnxruntime, on the CPU.

    python -m benchmarks.deform_conv [--threads 2] [--rounds 15] [--json FILE]

Float32, 3x3 kernels, as many output as input channels, offsets given (no implementation computes
them). Every implementation is checked against float64 before it is timed.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import torchvision
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.timing import Timing, compare, geometric_mean, median_ratio, setting
from deformnet.ops import cpu, deform_conv2d

PLAIN, TORCHVISION, ONNXRUNTIME, OURS = "conv2d", "torchvision", "onnxruntime", "deformnet"


@dataclass(frozen=True)
class Shape:
    """One layer: N images of C channels, H x W, stride 1, as much padding as dilation."""

    batch: int
    channels: int
    height: int
    width: int
    dilation: int = 1
    offset_groups: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}"


SHAPES = (
    Shape(1, 512, 38, 63, dilation=2, offset_groups=4),  # conv5 of a detector, 600x1000 pixels
    Shape(1, 64, 56, 56),
    Shape(1, 128, 64, 128),
    Shape(8, 128, 28, 28),
    Shape(37, 32, 16, 16),  # a batch that no step of 32 images divides
)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    offset: Tensor
    weight: Tensor
    grad_output: Tensor


def make_tensors(shape: Shape, spread: float) -> Tensors:
    """Random tensors; offsets are normal with a standard deviation of `spread` pixels."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.channels, shape.height, shape.width)
    offsets = (shape.batch, 18 * shape.offset_groups, shape.height, shape.width)
    weight = torch.randn(shape.channels, shape.channels, 3, 3, generator=generator)
    return Tensors(
        input=torch.randn(size, generator=generator).requires_grad_(),
        offset=(spread * torch.randn(offsets, generator=generator)).requires_grad_(),
        weight=(weight / (3 * shape.channels**0.5)).requires_grad_(),
        grad_output=torch.randn(size, generator=generator),
    )


def torch_calls(shape: Shape, tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    x, offset, w, d = tensors.input, tensors.offset, tensors.weight, shape.dilation
    return {
        PLAIN: lambda: F.conv2d(x, w, None, 1, d, d),
        OURS: lambda: deform_conv2d(x, offset, w, None, 1, d, d),
        TORCHVISION: lambda: torchvision.ops.deform_conv2d(x, offset, w, None, 1, d, d),
    }


def onnxruntime_call(shape: Shape, tensors: Tensors, threads: int) -> Callable[[], Tensor]:
    feeds = {
        "x": tensors.input.detach().numpy(),
        "w": tensors.weight.detach().numpy(),
        "offset": tensors.offset.detach().numpy(),
    }
    node = helper.make_node(
        "DeformConv",
        list(feeds),
        ["y"],
        kernel_shape=[3, 3],
        pads=[shape.dilation] * 4,
        dilations=[shape.dilation] * 2,
        offset_group=shape.offset_groups,
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(feeds["x"].shape))
    model = helper.make_model(
        helper.make_graph([node], "deform_conv", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning into the turn of the next implementation.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def check(shape: Shape, tensors: Tensors, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Refuse to time what computes something else."""
    d = shape.dilation
    exact = deform_conv2d(
        *(tensors.input.double(), tensors.offset.double(), tensors.weight.double()),
        *(None, 1, d, d),
        backend="reference",
    )
    for name in (OURS, TORCHVISION, ONNXRUNTIME):
        error = (calls[name]() - exact).abs().max().item()
        if not error < 1e-4:
            raise AssertionError(f"{name} is off by {error} on {shape}")


def with_backward(
    call: Callable[[], Tensor], tensors: Tensors, *, plain: bool
) -> Callable[[], object]:
    wanted = [tensors.input, tensors.weight] + ([] if plain else [tensors.offset])
    return lambda: torch.autograd.grad(call(), wanted, tensors.grad_output)


def measure(
    shape: Shape, *, spread: float, threads: int, rounds: int, backward: bool
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    tensors = make_tensors(shape, spread)
    forward = torch_calls(shape, tensors)
    both = {
        name: with_backward(call, tensors, plain=name == PLAIN) for name, call in forward.items()
    }
    forward[ONNXRUNTIME] = onnxruntime_call(shape, tensors, threads)
    with torch.no_grad():
        check(shape, tensors, forward)
        forward_times = compare(forward, rounds=rounds)
    return forward_times, compare(both, rounds=rounds) if backward else {}


def measure_bfloat16(shape: Shape, *, spread: float, rounds: int) -> dict[str, Timing]:
    """Forward passes in both formats; the bfloat16 ones are checked against float64 first."""
    tensors = make_tensors(shape, spread)
    x, offset, w, d = tensors.input, tensors.offset, tensors.weight, shape.dilation
    low, low_w = x.bfloat16(), w.bfloat16()
    calls: dict[str, Callable[[], Tensor]] = {
        "conv2d, float32": lambda: F.conv2d(x, w, None, 1, d, d),
        "conv2d, bfloat16": lambda: F.conv2d(low, low_w, None, 1, d, d),
        "deformnet, float32": lambda: deform_conv2d(x, offset, w, None, 1, d, d),
        "deformnet, bfloat16": lambda: deform_conv2d(low, offset, low_w, None, 1, d, d),
    }
    with torch.no_grad():
        exact = deform_conv2d(
            *(low.double(), offset.double(), low_w.double(), None, 1, d, d), backend="reference"
        )
        error = (calls["deformnet, bfloat16"]() - exact).abs().max().item()
        if not error < 2e-2 * exact.abs().max().item():
            raise AssertionError(f"bfloat16 is off by {error} on {shape}")
        return compare(calls, rounds=rounds)


def report_bfloat16(shape: Shape, times: dict[str, Timing]) -> None:
    base = times["deformnet, float32"]
    print(f"\nforward, {shape}: how many times as long as deformnet in float32")
    for name, timing in times.items():
        print(f"  {name}: {timing.median / base.median:.2f} ({_range(timing, base.median)})")


def _range(timing: Timing, unit: float) -> str:
    return f"{timing.quantile(0.2) / unit:.2f}-{timing.quantile(0.8) / unit:.2f}"


def report(title: str, rows: dict[Shape, dict[str, Timing]]) -> None:
    names = [name for name in (TORCHVISION, ONNXRUNTIME, OURS) if name in next(iter(rows.values()))]
    print(f"\n{title}: milliseconds of conv2d, and how many times as long the others take")
    print("(medians; in brackets the 20 % and 80 % quantiles)")
    print("| shape | conv2d, ms | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")
    for shape, times in rows.items():
        plain = times[PLAIN]
        cells = [f"{1e3 * plain.median:.2f} ({_range(plain, 1e-3)})"]
        for name in names:
            ratio = median_ratio(times, name, PLAIN)
            cells.append(f"{ratio:.2f} ({_range(times[name], plain.median)})")
        print(f"| {shape} | " + " | ".join(cells) + " |")
    means = [
        f"{geometric_mean([median_ratio(times, name, PLAIN) for times in rows.values()]):.2f}"
        for name in names
    ]
    print("| geometric mean | | " + " | ".join(means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--spread", type=float, default=1.0, help="standard deviation of the offsets, in pixels"
    )
    parser.add_argument("--json", type=Path, help="file for all timings")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    where = f"{setting()}, {cpu.instruction_set()} kernels"
    print(where)
    forward: dict[Shape, dict[str, Timing]] = {}
    both: dict[Shape, dict[str, Timing]] = {}
    for shape in SHAPES:
        forward[shape], both[shape] = measure(
            *(shape,),
            spread=options.spread,
            threads=options.threads,
            rounds=options.rounds,
            backward=True,
        )
    halves = measure_bfloat16(SHAPES[0], spread=options.spread, rounds=options.rounds)
    report("forward", forward)
    report("forward + backward", both)
    report_bfloat16(SHAPES[0], halves)
    if options.json:
        content = {
            "machine": where,
            "spread": options.spread,
            "bfloat16": {name: timing.seconds for name, timing in halves.items()},
            **{
                key: {
                    str(shape): {name: timing.seconds for name, timing in times.items()}
                    for shape, times in rows.items()
                }
                for key, rows in (("forward", forward), ("forward + backward", both))
            },
        }
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
