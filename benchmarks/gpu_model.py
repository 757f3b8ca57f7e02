"""A performance model of the deformable convolution kernels on three GPUs.

For one layer and tile, the model counts matrix multiplication, including the padding of tiles;
bytes that programs read from L2 and add to it, if no program finds another's data in L1; moving
every tensor from or to memory once; and the arithmetic of bilinear interpolation. Each takes its
amount divided by the GPU's rate; the kernel takes as long as the slowest of them, divided by the
fraction of multiprocessors that have a program. Latency, launch overhead and imperfect overlap are
ignored, so real kernels are slower.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.shapes import Shape
from deformnet.ops.deform_conv.triton_geometry import Tile
from deformnet.ops.deform_conv.triton_tiles import candidates
from deformnet.ops.triton.devices import Kind


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU, per second."""

    kind: Kind
    processors: int
    flops: dict[str, float]  # of the matrix unit; for float32, of the vector unit
    bytes: float  # of memory
    l2_bytes: float


# From data sheets, without sparsity. Peak L2 rates are from the vendors' white papers: 5120 bytes
# per clock at 1.41 GHz on the A100, and 128 bytes per clock in each of 8x16 channels at 2.1 GHz on
# the MI300X. NVIDIA publishes none for the H200, so 5.5 TB/s is an assumption.
CARDS = {
    "H200": Card(
        Kind.HOPPER, 132, {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}, 4.8e12, 5.5e12
    ),
    "A100": Card(
        Kind.AMPERE, 108, {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}, 2.04e12, 7.2e12
    ),
    "MI300X": Card(
        Kind.CDNA, 304, {"bfloat16": 1307e12, "tf32": 654e12, "float32": 163e12}, 5.3e12, 34.4e12
    ),
}
KERNELS = "forward", "positions", "weight"
# Microseconds on an H200 with earlier tiles, in the only run on a GPU (see docs/benchmarks.md).
MEASURED = {
    ("forward", "bfloat16", "1x512x38x63"): 126,
    ("positions", "bfloat16", "1x512x38x63"): 157,
    ("weight", "bfloat16", "1x512x38x63"): 133,
    ("forward", "tf32", "1x512x38x63"): 792,
    ("positions", "tf32", "1x512x38x63"): 261,
    ("weight", "tf32", "1x512x38x63"): 312,
    ("forward", "bfloat16", "8x128x28x28"): 29,
    ("positions", "bfloat16", "8x128x28x28"): 80,
    ("weight", "bfloat16", "8x128x28x28"): 40,
    ("forward", "tf32", "8x128x28x28"): 104,
    ("positions", "tf32", "8x128x28x28"): 95,
    ("weight", "tf32", "8x128x28x28"): 59,
}
_TAPS = 9
# Per multiprocessor, for tiles of 8 warps: registers allow no more.
_PROGRAMS_OF_8_WARPS = 1
# Of bilinear interpolation for each channel of a sample, and of its backward pass.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 12, 30


@dataclass(frozen=True)
class Work:
    """The work of one launch."""

    programs: int
    flops: float
    operations: float  # of the vector unit
    l2_bytes: float  # without atomics
    atomics: float  # values added
    memory_bytes: float


def tile_of(kernel: str, shape: Shape, precision: str, card: Card) -> Tile:
    """The default tile."""
    half = "half" if precision == "bfloat16" else precision
    segment = shape.channels // shape.offset_groups
    return candidates(card.kind, kernel, half, shape.positions, shape.channels, segment)[0]


def work_of(kernel: str, shape: Shape, precision: str, tile: Tile) -> Work:
    """The work of a kernel for a layer, derived from its grid and loops."""
    size = 2 if precision == "bfloat16" else 4
    rows, channels, groups = shape.positions, shape.channels, shape.offset_groups
    segment = channels // groups
    row_tiles, out_tiles = math.ceil(rows / tile.rows), math.ceil(channels / tile.out)
    channel_tiles = math.ceil(segment / tile.channels)
    samples = rows * _TAPS * channels
    corner_bytes = 4 * samples * size
    offset_bytes = 4 * 2 * _TAPS * groups * rows
    weight_bytes = _TAPS * channels**2 * size
    map_bytes = rows * channels * size
    flops = 2.0 * row_tiles * tile.rows * _TAPS * channels**2
    if kernel == "forward":
        return Work(
            programs=row_tiles * out_tiles,
            flops=flops,
            operations=_FORWARD_OPERATIONS * samples * out_tiles,
            l2_bytes=(corner_bytes + offset_bytes) * out_tiles
            + row_tiles * weight_bytes
            + map_bytes,
            atomics=0,
            memory_bytes=2 * map_bytes + offset_bytes + weight_bytes,
        )
    if kernel == "positions":
        return Work(
            programs=row_tiles * _TAPS * groups,
            flops=flops,
            operations=_BACKWARD_OPERATIONS * samples,
            # grad_output is read for each tile of channels, the weight for each tile of rows.
            l2_bytes=corner_bytes
            + 2 * offset_bytes
            + rows * _TAPS * groups * channel_tiles * channels * size
            + row_tiles * weight_bytes,
            atomics=4 * samples,
            memory_bytes=2 * map_bytes + 4 * rows * channels + 2 * offset_bytes + weight_bytes,
        )
    programs = _TAPS * groups * channel_tiles * out_tiles
    splits = max(1, min(row_tiles, 512 // programs))
    return Work(
        programs=programs * splits,
        flops=flops,
        operations=_FORWARD_OPERATIONS * samples * out_tiles,
        l2_bytes=(corner_bytes + offset_bytes) * out_tiles
        + rows * _TAPS * groups * channel_tiles * channels * size
        + 2 * splits * 4 * _TAPS * channels**2,
        atomics=0,
        memory_bytes=2 * map_bytes + offset_bytes + weight_bytes,
    )


def seconds_of(work: Work, precision: str, tile: Tile, card: Card) -> tuple[float, str]:
    """Time of a launch, and what bounds it."""
    shares = {
        "products": work.flops / card.flops[precision],
        "sampling": work.operations / card.flops["float32"],
        # An atomic addition reads and writes its value.
        "L2": (work.l2_bytes + 8 * work.atomics) / card.l2_bytes,
    }
    at_once = card.processors * max(1, _PROGRAMS_OF_8_WARPS * 8 // tile.warps)
    busy = work.programs / (math.ceil(work.programs / at_once) * at_once)
    times = {name: time / busy for name, time in shares.items()}
    times["memory"] = work.memory_bytes / card.bytes
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def floor_of(kernel: str, shape: Shape, precision: str, card: Card) -> float:
    """The minimum time: matrix multiplication alone, or moving each tensor once."""
    work = work_of(kernel, shape, precision, tile_of(kernel, shape, precision, card))
    return max(shape.forward_flops / card.flops[precision], work.memory_bytes / card.bytes)


def table(shapes: Sequence[Shape], precisions: Sequence[str]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield (
        "| GPU | layer | precision | kernel | tile | L2 MB | atomics, M | memory MB | model, us "
        "| bound by | floor, us | H200 in one run, us |"
    )
    yield "|---" * 12 + "|"
    for name, card in CARDS.items():
        for shape in shapes:
            for precision in precisions:
                for kernel in KERNELS:
                    tile = tile_of(kernel, shape, precision, card)
                    work = work_of(kernel, shape, precision, tile)
                    seconds, bound = seconds_of(work, precision, tile, card)
                    floor = floor_of(kernel, shape, precision, card)
                    measured = MEASURED.get((kernel, precision, str(shape)), "-")
                    cells = (
                        *(name, shape, precision, kernel, "x".join(map(str, tile))),
                        *(f"{work.l2_bytes / 1e6:.0f}", f"{work.atomics / 1e6:.1f}"),
                        *(f"{work.memory_bytes / 1e6:.1f}", f"{1e6 * seconds:.0f}", bound),
                        *(f"{1e6 * floor:.0f}", measured if name == "H200" else "-"),
                    )
                    yield "| " + " | ".join(map(str, cells)) + " |"
