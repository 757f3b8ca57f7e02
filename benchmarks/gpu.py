"""Deformable convolution against plain convolution and torchvision, on a GPU.

    python -m benchmarks.gpu [--rounds 50] [--layers 1x64x56x56 ...] [--json FILE] [--tiles]
    python -m benchmarks.gpu --static    # what the kernels compile to; needs no GPU; minutes
    python -m benchmarks.gpu --model     # a performance model for three GPUs; needs no GPU

3x3 kernels, as many output as input channels, offsets as float32 inputs. Times are GPU times
between two events; a kernel that waits hides the launch overhead of Python. The L2 cache is either
cold (overwritten before each call) or warm (the same call has just run); do not compare the two.
Outputs and gradients are first checked against float64; wrong implementations are not timed.

The floor is the minimum time of the card, for the products or for moving each tensor once. The
fraction of the floor is this time over the measured time, printed for cards with known rates.

deformnet autotunes its tiles as usual; with DEFORMNET_AUTOTUNE=0, the default tiles are timed. The
kernels are first compiled on all CPU cores.

--tiles only times deformnet's kernels, in many tile configurations, to find the best ones for
`deformnet.ops.deform_conv.triton_tiles.TILES`. They are first compiled on all CPU cores: on 16
cores, this takes two minutes for three layers.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.shapes import SHAPES, Shape, make_tensors
from deformnet import __version__
from deformnet._files import write_json
from deformnet.ops import backends, deform_conv2d
from deformnet.ops.deform_conv.operator import OPERATOR
from deformnet.paper.timing import Timing

if TYPE_CHECKING:
    from deformnet.ops.deform_conv import triton_tiles
    from deformnet.ops.deform_conv.triton_geometry import Tile

LAYERS = (
    *SHAPES,
    Shape(8, 512, 38, 63, dilation=2, offset_groups=4),
    Shape(1, 512, 64, 128, dilation=2, offset_groups=4),  # conv5 on 1024x2048 pixels
    Shape(32, 256, 28, 28),
)
PLAIN, TORCHVISION, OURS = "conv2d", "torchvision", "deformnet"
PASSES: tuple[str, ...] = ("forward", "backward", "forward + backward")
CACHES = ("cold L2", "warm L2")
# Maximum error, relative to the largest number in each tensor.
PRECISIONS = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2}
WARM_UP = 5
# Maximum number of tiles that autotuning chooses from.
_MOST_CANDIDATES = 3
# Longer than the launch overhead of a forward and a backward pass; about two milliseconds.
WAIT_CYCLES = 4_000_000


@dataclass(frozen=True)
class Card:
    """Peak rates of a card, per second."""

    flops: Mapping[str, float]
    bytes: float


# bfloat16 and the bandwidth as measured on an H200, the others from NVIDIA's data sheets.
_HOPPER = {"bfloat16": 790e12, "tf32": 400e12, "float32": 67e12}
CARDS = {
    "NVIDIA H100 80GB HBM3": Card(_HOPPER, 3.35e12),
    "NVIDIA H200": Card(_HOPPER, 4.3e12),
}


@dataclass(frozen=True)
class Call:
    """One implementation of one layer."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_output: Tensor

    def both(self) -> list[Tensor]:
        """The output and all gradients."""
        output = self.forward()
        return [output.detach(), *torch.autograd.grad(output, self.leaves, self.grad_output)]

    def passes(self) -> dict[str, Callable[[], object]]:
        output = self.forward()

        def forward() -> Tensor:
            with torch.no_grad():
                return self.forward()

        def backward() -> object:
            return torch.autograd.grad(output, self.leaves, self.grad_output, retain_graph=True)

        return dict(zip(PASSES, (forward, backward, self.both), strict=True))


@dataclass(frozen=True)
class Layer:
    """The tensors of a layer on the GPU."""

    shape: Shape
    input: Tensor
    offset: Tensor
    weight: Tensor
    grad_output: Tensor

    def call(self, name: str, backend: backends.Backend = "auto") -> Call:
        x, offset, w = self.input, self.offset, self.weight
        d = self.shape.dilation, self.shape.dilation

        def forward() -> Tensor:
            if name == PLAIN:
                return F.conv2d(x, w, None, 1, d, d)
            if name == TORCHVISION:
                return torchvision.ops.deform_conv2d(x, offset, w, None, (1, 1), d, d)
            return deform_conv2d(x, offset, w, None, 1, d, d, backend=backend)

        leaves = (x, w) if name == PLAIN else (x, w, offset)
        return Call(forward, leaves, self.grad_output)

    def to(self, dtype: torch.dtype, memory_format: torch.memory_format) -> "Layer":
        """Converts to another dtype and memory format; for half precision, offsets are float32."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype=dtype, memory_format=memory_format)

        return Layer(
            self.shape,
            cast(self.input).requires_grad_(),
            self.offset.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
            cast(self.weight).requires_grad_(),
            cast(self.grad_output),
        )


def make_layer(shape: Shape, precision: str) -> Layer:
    """Contiguous tensors of numbers that `precision` can represent."""
    tensors = make_tensors(shape)
    # Exact in float32, and never whole numbers, where derivatives jump.
    offset = (256 * tensors.offset.detach()).floor() / 256 + 1 / 512
    layer = Layer(
        shape,
        tensors.input.cuda(),
        offset.cuda(),
        tensors.weight.cuda(),
        tensors.grad_output.cuda(),
    )
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return layer.to(dtype, torch.contiguous_format)


def set_precision(precision: str) -> None:
    """Sets float32 precision of convolutions, and of cuBLAS, which torchvision uses."""
    value = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = value  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cuda.matmul.fp32_precision = value  # pyright: ignore[reportAttributeAccessIssue]


def calls_of(layer: Layer) -> dict[str, Call]:
    """All implementations that support the layer's dtype."""
    last = layer.to(layer.input.dtype, torch.channels_last)
    calls = {PLAIN: layer.call(PLAIN), f"{PLAIN}, channels-last": last.call(PLAIN)}
    if layer.input.dtype == torch.float32:
        calls[TORCHVISION] = layer.call(TORCHVISION)
    return calls | {OURS: layer.call(OURS), f"{OURS}, channels-last": last.call(OURS)}


def error_of(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error, relative to the largest number in each tensor."""
    errors = (
        ((one - other).abs().max() / other.abs().max()).item()
        for one, other in zip(found, exact, strict=True)
    )
    return max(errors, key=lambda error: error if error == error else float("inf"))


def right_ones(calls: dict[str, Call], layer: Layer, tolerance: float) -> dict[str, Call]:
    """The calls with correct results; prints the errors of the others."""
    double = layer.to(torch.float64, torch.contiguous_format)
    exact = {
        True: double.call(PLAIN).both(),
        False: double.call(OURS, "reference").both(),
    }
    right = {}
    for name, call in calls.items():
        error = error_of(call.both(), exact[name.startswith(PLAIN)])
        if error < tolerance:
            right[name] = call
        else:
            print(f"{name} is off by {error:.2g} on {layer.shape}; not timed", file=sys.stderr)
    return right


def compare(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, flush: Tensor | None
) -> dict[str, Timing]:
    """Seconds of every call on the GPU, in an order that rotates from round to round.

    Args:
        flush: tensor written before each call for a cold L2 cache; None keeps the cache warm.
    """
    names = list(calls)
    for name in names:
        for _ in range(WARM_UP):
            calls[name]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if flush is None:
                calls[name]()
            torch.cuda._sleep(WAIT_CYCLES)
            if flush is not None:
                flush.zero_()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def floor_seconds(shape: Shape, precision: str, step: str, card: Card, *, plain: bool) -> float:
    """Minimum time of a pass: the products, or moving each tensor once."""
    size = 2 if precision == "bfloat16" else 4
    map_bytes = size * shape.channels * shape.positions
    weight_bytes = size * 9 * shape.channels**2
    offset_bytes = 0 if plain else 4 * 18 * shape.offset_groups * shape.positions
    # The backward pass reads the output's gradient and what the forward pass has read, and writes
    # as much as that.
    read = map_bytes + weight_bytes + offset_bytes
    forward, backward = read + map_bytes, 2 * read + map_bytes
    moved = dict(zip(PASSES, (forward, backward, forward + backward), strict=True))
    products = dict(zip(PASSES, (1, 2, 3), strict=True))[step] * shape.forward_flops
    return max(products / card.flops[precision], moved[step] / card.bytes)


def _processes() -> ProcessPoolExecutor:
    """Processes that compile kernels; their code stays in Triton's cache on disk."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def _compile_layer(shape: Shape, precision: str, number: int) -> None:
    """Compile the kernels with the candidate of this index, or the last one, without timing."""
    from deformnet.ops.deform_conv import triton_tiles

    one = {
        kind: {key: tiles[number : number + 1] or tiles[-1:] for key, tiles in table.items()}
        for kind, table in triton_tiles.TILES.items()
    }
    triton_tiles.candidates.cache_clear()
    set_precision(precision)
    with patch.dict(triton_tiles.TILES, one):
        for name, call in calls_of(make_layer(shape, precision)).items():
            if name.startswith(OURS):
                call.both()


def measure(layers: Sequence[Shape], rounds: int) -> list[dict[str, object]]:
    """One dict per measurement."""
    card = CARDS.get(torch.cuda.get_device_name())
    with _processes() as pool:
        jobs = itertools.product(layers, PRECISIONS, range(_MOST_CANDIDATES))
        for _ in pool.map(_compile_layer, *zip(*jobs, strict=True)):
            pass
    flush = _larger_than_the_cache()
    # cuDNN then looks for its fastest kernel.
    torch.backends.cudnn.benchmark = True
    figures: list[dict[str, object]] = []
    for shape, (precision, tolerance) in itertools.product(layers, PRECISIONS.items()):
        set_precision(precision)
        print(f"{shape}, {precision}", file=sys.stderr)
        layer = make_layer(shape, precision)
        calls = right_ones(calls_of(layer), layer, tolerance)
        passes = {name: call.passes() for name, call in calls.items()}
        for cache, step in itertools.product(CACHES, PASSES):
            times = compare(
                {name: passes[name][step] for name in calls},
                rounds=rounds,
                flush=flush if cache == "cold L2" else None,
            )
            for name, timing in times.items():
                floor = None
                if card is not None:
                    plain = name.startswith(PLAIN)
                    floor = floor_seconds(shape, precision, step, card, plain=plain)
                figures.append(
                    {
                        "layer": _name(shape),
                        "precision": precision,
                        "pass": step,
                        "cache": cache,
                        "implementation": name,
                        "median_ms": 1e3 * timing.median,
                        "p20_ms": 1e3 * timing.quantile(0.2),
                        "p80_ms": 1e3 * timing.quantile(0.8),
                        "min_ms": 1e3 * timing.fastest,
                        "fraction_of_floor": None if floor is None else floor / timing.median,
                    }
                )
    return figures


def _larger_than_the_cache() -> Tensor:
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _name(shape: Shape) -> str:
    return f"{shape}, dilation {shape.dilation}, {shape.offset_groups} offset groups"


def report(figures: list[dict[str, object]]) -> None:
    """Prints a table for each pass and cache state."""
    names = list(dict.fromkeys(str(figure["implementation"]) for figure in figures))
    for cache, step in itertools.product(CACHES, PASSES):
        print(f"\n{step}, {cache}: median milliseconds (p20-p80, min), fraction of the floor\n")
        print("| layer | precision | " + " | ".join(names) + " |")
        print("|---" * (2 + len(names)) + "|")
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for figure in figures:
            if (figure["cache"], figure["pass"]) == (cache, step):
                row = rows.setdefault((str(figure["layer"]), str(figure["precision"])), {})
                row[str(figure["implementation"])] = _cell(figure)
        for row, cells in rows.items():
            print("| " + " | ".join([*row, *(cells.get(name, "-") for name in names)]) + " |")


def _cell(figure: Mapping[str, object]) -> str:
    median, low, high, least = (figure[f"{key}_ms"] for key in ("median", "p20", "p80", "min"))
    text = f"{median:.3f} ({low:.3f}-{high:.3f}, {least:.3f})"
    fraction = figure["fraction_of_floor"]
    return text if fraction is None else f"{text} {fraction:.0%}"


# By kernel and precision: (rows, out, channels), warps, stages. For the matrix unit the products
# of forward are as wide in O as registers allow, those of positions and weight in the channels.
_SHORT = [(64, 64, 32), (64, 128, 32), (128, 64, 32), (128, 128, 32), (64, 64, 16), (32, 128, 32)]
_CANDIDATES = {
    "forward": {
        "float32": [(*tile, 8, 2) for tile in _SHORT] + [(64, 64, 32, 4, 2), (64, 128, 32, 8, 3)],
        "tf32": [
            *((64, 128, 32, 4, 2), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 256, 32, 8, 2)),
            *((128, 128, 32, 8, 2), (128, 128, 32, 8, 3), (128, 256, 32, 8, 2)),
            *((64, 128, 64, 8, 2), (128, 64, 32, 8, 2), (64, 128, 32, 8, 1)),
        ],
        "bfloat16": [
            *((64, 128, 32, 4, 2), (64, 128, 64, 4, 2), (64, 128, 64, 8, 2), (64, 128, 64, 4, 3)),
            *((64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 256, 32, 8, 2), (64, 256, 32, 8, 3)),
            *((64, 256, 64, 8, 1), (64, 256, 128, 8, 1), (64, 512, 32, 8, 2), (128, 128, 32, 8, 2)),
            *((128, 128, 64, 8, 2), (128, 128, 64, 8, 1), (128, 256, 32, 8, 2)),
            *((128, 256, 32, 8, 3), (128, 256, 64, 8, 1), (128, 256, 64, 8, 2)),
        ],
    },
    "positions": {
        "float32": [(*tile, 8, 2) for tile in _SHORT] + [(64, 32, 64, 8, 2), (32, 32, 32, 4, 2)],
        "tf32": [
            *((64, 32, 64, 8, 2), (64, 64, 32, 8, 2), (64, 64, 64, 8, 2), (64, 32, 32, 4, 2)),
            *((128, 32, 32, 8, 2), (64, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 32, 64, 8, 2)),
        ],
        "bfloat16": [
            *((64, 64, 64, 8, 2), (64, 64, 64, 4, 2), (64, 128, 64, 8, 2), (64, 128, 32, 8, 2)),
            *((64, 64, 32, 4, 2), (128, 64, 32, 8, 2), (128, 64, 64, 8, 2), (128, 128, 64, 8, 2)),
            *((64, 64, 128, 8, 2), (64, 64, 64, 8, 3), (64, 128, 32, 4, 3)),
        ],
    },
    "weight": {
        "float32": [(*tile, 8, 2) for tile in _SHORT] + [(32, 64, 64, 8, 2), (32, 128, 64, 8, 2)],
        "tf32": [
            *((32, 128, 32, 8, 2), (32, 128, 64, 8, 2), (32, 128, 64, 4, 2), (64, 128, 64, 8, 2)),
            *((32, 128, 128, 8, 2), (32, 256, 64, 8, 2), (32, 64, 64, 4, 2), (64, 128, 32, 4, 2)),
        ],
        "bfloat16": [
            *((64, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 128, 64, 4, 3), (64, 128, 128, 8, 2)),
            *((64, 256, 128, 8, 2), (32, 256, 64, 8, 2), (32, 256, 64, 8, 3), (32, 128, 128, 8, 3)),
            *((64, 256, 64, 8, 1), (32, 256, 128, 8, 2), (128, 128, 64, 8, 2)),
        ],
    },
}  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """One kernel with one tile on one layer."""

    kernel: str
    precision: str
    shape: Shape
    tile: "Tile"

    def prepare(self) -> Callable[[], list[Tensor]]:
        """Sets tile and precision; channels-last, so that nothing is copied."""
        from deformnet.ops.deform_conv import triton_tiles

        set_precision(self.precision)
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        _tiles()[self.kernel, _kept(self.precision)] = (self.tile,)
        triton_tiles.candidates.cache_clear()
        layer = make_layer(self.shape, self.precision).to(dtype, torch.channels_last)
        return _of_kernel(self.kernel, layer)

    def compile(self) -> bool:
        """Whether the kernel runs."""
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            self.prepare()()
        except (OutOfResources, PTXASError):
            return False
        return True


def _kept(precision: str) -> str:
    """The name of the precision in the table of tiles."""
    return "half" if precision == "bfloat16" else precision


def _tiles() -> "triton_tiles.Table":
    """The table of tiles for this GPU."""
    from deformnet.ops.deform_conv import triton_tiles
    from deformnet.ops.triton import devices

    return triton_tiles.TILES[devices.kind_of(*devices.target())]


def measure_tiles(layers: Sequence[Shape], rounds: int) -> list[dict[str, object]]:
    """One dict per kernel, layer, precision and valid configuration; prints the best.

    Results are checked against the float64 kernel, which tests compare with the reference.
    """
    from deformnet.ops.deform_conv.triton_geometry import Tile

    jobs = []
    for kernel, precision, shape in itertools.product(_CANDIDATES, PRECISIONS, layers):
        usual = _tiles()[kernel, _kept(precision)]
        tiles = [*usual, *(Tile(*tile) for tile in _CANDIDATES[kernel][precision])]
        jobs += [_Job(kernel, precision, shape, tile) for tile in dict.fromkeys(tiles)]
    with _processes() as pool:
        runs = list(pool.map(_Job.compile, jobs))
    jobs = [job for job, ran in zip(jobs, runs, strict=True) if ran]

    figures: list[dict[str, object]] = []
    for (kernel, precision), same in itertools.groupby(jobs, lambda j: (j.kernel, j.precision)):
        # Seconds of every layer, by configuration.
        medians: dict[Tile, list[float]] = {}
        for shape, some in itertools.groupby(same, lambda job: job.shape):
            layer = make_layer(shape, precision).to(torch.float64, torch.channels_last)
            exact = _of_kernel(kernel, layer)()
            for job in some:
                call = job.prepare()
                if not error_of(call(), exact) < PRECISIONS[precision]:
                    print(f"{kernel}: {job.tile} is wrong on {shape}", file=sys.stderr)
                    continue
                seconds = compare({"": call}, rounds=rounds, flush=None)[""].median
                medians.setdefault(job.tile, []).append(seconds)
                figures.append(
                    {
                        "kernel": kernel,
                        "layer": _name(shape),
                        "precision": precision,
                        "tiles": job.tile._asdict(),
                        "median_ms": 1e3 * seconds,
                    }
                )
        _print_best(f"{kernel}, {precision}", medians, layers)
    return figures


def _print_best(
    title: str, medians: Mapping["Tile", Sequence[float]], layers: Sequence[Shape]
) -> None:
    """The fastest tiles over all layers, with the time of each layer."""
    valid = {tile: times for tile, times in medians.items() if len(times) == len(layers)}
    print(f"\n{title}: microseconds of {', '.join(str(shape) for shape in layers)}")
    for tile in sorted(valid, key=lambda tile: statistics.geometric_mean(valid[tile]))[:6]:
        times = ", ".join(f"{1e6 * seconds:.1f}" for seconds in valid[tile])
        print(f"{times}  {tuple(tile)}")


def _of_kernel(kernel: str, layer: Layer) -> Callable[[], list[Tensor]]:
    """Runs one kernel of the table."""
    x, offset, w = layer.input.detach(), layer.offset.detach(), layer.weight.detach()
    d = layer.shape.dilation, layer.shape.dilation
    geometry = (1, 1), d, d, "zeros"
    if kernel == "forward":
        return lambda: [OPERATOR.forward(x, offset, w, None, None, *geometry)]
    positions = kernel == "positions"
    needs = [positions, positions, not positions, False, False]
    return lambda: OPERATOR.backward(layer.grad_output, x, offset, w, None, *geometry, needs)


def conditions(layers: Sequence[Shape]) -> dict[str, object]:
    """Machine and versions of the measurements."""
    import triton

    properties = torch.cuda.get_device_properties()
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        driver = dict(zip(fields, (field.strip() for field in answer.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        driver = {"nvidia-smi": str(error)}
    return {
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "driver": driver,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "deformnet": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "layers": [asdict(shape) for shape in layers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    names = [str(shape) for shape in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--tiles", action="store_true", help="only time tile configurations")
    parser.add_argument("--static", action="store_true", help="only analyze the compiled kernels")
    parser.add_argument("--model", action="store_true", help="only print the performance model")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args()
    if options.static or options.model:
        from benchmarks import compiled, gpu_model

        for line in compiled.table() if options.static else gpu_model.table():
            print(line, flush=True)
        return
    reason = backends.why_unavailable("triton")
    if reason is not None:
        sys.exit(f"benchmarks.gpu: no GPU to measure on: {reason}")

    layers = [shape for shape in LAYERS if str(shape) in options.layers]
    found = conditions(layers)
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "layers"))
    if options.tiles:
        figures = measure_tiles(layers, options.rounds)
    else:
        figures = measure(layers, options.rounds)
        report(figures)
    if options.json:
        write_json(options.json, found | {"rounds": options.rounds, "figures": figures})


if __name__ == "__main__":
    main()
