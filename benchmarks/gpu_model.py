"""A performance model of the kernels on three GPUs: convolution, depthwise too, and RoI pooling.

For one layer and tile, the model counts matrix multiplication, including the padding of tiles;
bytes that programs read from L2 and add to it, if no program finds another's data in L1; moving
every tensor from or to memory once; and the arithmetic of bilinear interpolation. Each takes its
amount divided by the GPU's rate; the kernel takes as long as the slowest of them, divided by the
fraction of multiprocessors that have a program. Latency, launch overhead and imperfect overlap are
ignored, so real kernels are slower.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2

from benchmarks import roi_pool
from benchmarks.shapes import SHAPES, Shape
from deformnet.ops.deform_conv.triton import _NARROW_CHANNELS, _NARROW_TILE
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
LAYERS = SHAPES[0], SHAPES[3]
DEPTHWISE = Shape(8, 320, 24, 24)
POOLING = roi_pool.POOLINGS[0]
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
# Of a multiprocessor, as registers allow: a thread has up to 255 in the matrix kernels, and about
# 128 in the others (40 to 168).
_MATRIX_WARPS, _VECTOR_THREADS = 8, 512
# Of bilinear interpolation for each channel of a sample, and of its backward pass.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 12, 30
# RoI pooling computes positions anew in each thread, for its four channels.
_POSITION_OPERATIONS = 40 // 4
# Of L2: what a number takes whose neighbors in a program are not its neighbors in memory.
_SECTOR = 32


@dataclass(frozen=True)
class Work:
    """The work of one launch."""

    programs: int
    at_once: int  # programs of a multiprocessor
    flops: float  # of the matrix unit
    least_flops: float  # without the padding of tiles
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
    size = _size(precision)
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
            at_once=max(1, _MATRIX_WARPS // tile.warps),
            flops=flops,
            least_flops=shape.forward_flops,
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
            at_once=max(1, _MATRIX_WARPS // tile.warps),
            flops=flops,
            least_flops=shape.forward_flops,
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
        at_once=max(1, _MATRIX_WARPS // tile.warps),
        flops=flops,
        least_flops=shape.forward_flops,
        operations=_FORWARD_OPERATIONS * samples * out_tiles,
        l2_bytes=(corner_bytes + offset_bytes) * out_tiles
        + rows * _TAPS * groups * channel_tiles * channels * size
        + 2 * splits * 4 * _TAPS * channels**2,
        atomics=0,
        memory_bytes=2 * map_bytes + offset_bytes + weight_bytes,
    )


def narrow_tile_of(shape: Shape) -> tuple[int, int]:
    """Rows and channels of a tile of the kernels for depthwise layers."""
    channels = min(_NARROW_CHANNELS, next_power_of_2(shape.channels // shape.offset_groups))
    return _NARROW_TILE // channels, channels


def narrow_work_of(kernel: str, shape: Shape, precision: str) -> Work:
    """The work of a kernel for a depthwise layer: each channel samples and multiplies once."""
    size = _size(precision)
    tile_rows, tile_channels = narrow_tile_of(shape)
    rows, channels, groups = shape.positions, shape.channels, shape.offset_groups
    row_tiles = math.ceil(rows / tile_rows)
    channel_tiles = math.ceil(channels / groups / tile_channels)
    samples = rows * _TAPS * channels
    sample_bytes = 4 * samples * size
    offset_bytes = 4 * 2 * _TAPS * groups * rows
    weight_bytes = _TAPS * channels * size
    map_bytes = rows * channels * size
    programs = channel_tiles * groups
    operations, atomics = _FORWARD_OPERATIONS + 2, 0
    memory_bytes = 2 * map_bytes + offset_bytes + weight_bytes
    if kernel == "forward":
        programs *= row_tiles
        l2_bytes = offset_bytes * channel_tiles + row_tiles * weight_bytes + map_bytes
    elif kernel == "positions":
        programs = row_tiles * _TAPS * groups
        operations, atomics = _BACKWARD_OPERATIONS + 2, 4 * samples
        l2_bytes = 2 * offset_bytes + samples * size + row_tiles * weight_bytes
        memory_bytes += 4 * rows * channels + offset_bytes
    else:
        programs *= _TAPS
        splits = max(1, min(row_tiles, 512 // programs))
        programs *= splits
        l2_bytes = offset_bytes * channel_tiles + samples * size + 2 * splits * 4 * _TAPS * channels
    return Work(
        programs=programs,
        at_once=_VECTOR_THREADS // 128,
        flops=0,
        least_flops=0,
        operations=operations * samples,
        l2_bytes=sample_bytes + l2_bytes,
        atomics=atomics,
        memory_bytes=memory_bytes,
    )


def pooling_work_of(kernel: str, pooling: roi_pool.Pooling, precision: str) -> Work:
    """The work of RoI pooling of the boxes in `benchmarks.roi_pool`, by the rule "aligned".

    A program has one bin of 256 channels, and reads each pixel of its samples once.
    """
    size = _size(precision)
    boxes, channels = roi_pool.random_boxes(), pooling.channels
    (columns, _), (rows, row_cells) = (
        _samples_of(boxes[:, axis], boxes[:, axis + 2], length)
        for axis, length in ((1, roi_pool.WIDTH), (2, roi_pool.HEIGHT))
    )
    bins = len(boxes) * roi_pool.BINS**2
    pixels = (rows * columns).sum().item() * channels
    # Inner loops end with a step without a sample; those that complete no row are skipped.
    steps = row_cells.sum().item() * roi_pool.BINS * (roi_pool.SAMPLES + 1) * channels
    positions_bytes = 4 * bins * (5 + 2)
    map_bytes = roi_pool.HEIGHT * roi_pool.WIDTH * channels
    backward = kernel == "backward"
    operations = _BACKWARD_OPERATIONS if backward else _FORWARD_OPERATIONS
    return Work(
        programs=bins * math.ceil(channels / 256),
        at_once=_VECTOR_THREADS // 64,
        flops=0,
        least_flops=0,
        operations=(operations + _POSITION_OPERATIONS) * steps,
        # The output, and its gradient, are [R, C, ph, pw].
        l2_bytes=pixels * size + positions_bytes + _SECTOR * bins * channels,
        atomics=pixels if backward else 0,
        memory_bytes=map_bytes * (size + 4 * backward) + bins * (channels * size + 4 * 2),
    )


def _samples_of(low: Tensor, high: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pixels and cells of the map that the samples of each box meet on one axis, [R].

    Summed over the bins, of which each counts its own.
    """
    number = roi_pool.BINS * roi_pool.SAMPLES
    size = (high - low) * roi_pool.SCALE
    step = (size / number)[:, None]
    at = low[:, None] * roi_pool.SCALE - 0.5 + (torch.arange(number) + 0.5) * step
    cells = at.clamp(0, length - 1).floor().unflatten(1, (roi_pool.BINS, roi_pool.SAMPLES))
    moved = cells.diff(dim=2)
    # A cell has two pixels, of which the next cell may share one.
    pixels = 2 + moved.clamp(max=2).sum(2) - (cells[..., -1] == length - 1).to(cells.dtype)
    return pixels.sum(1), (1 + (moved > 0).sum(2)).sum(1)


def _size(precision: str) -> int:
    return 2 if precision == "bfloat16" else 4


def seconds_of(work: Work, precision: str, card: Card) -> tuple[float, str]:
    """Time of a launch, and what bounds it."""
    shares = {
        "products": work.flops / card.flops[precision],
        "sampling": work.operations / card.flops["float32"],
        # An atomic addition reads and writes its value.
        "L2": (work.l2_bytes + 8 * work.atomics) / card.l2_bytes,
    }
    at_once = card.processors * work.at_once
    busy = work.programs / (math.ceil(work.programs / at_once) * at_once)
    times = {name: time / busy for name, time in shares.items()}
    times["memory"] = work.memory_bytes / card.bytes
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def floor_of(work: Work, precision: str, card: Card) -> float:
    """The minimum time: matrix multiplication alone, or moving each tensor once."""
    return max(work.least_flops / card.flops[precision], work.memory_bytes / card.bytes)


def launches(card: Card) -> Iterator[tuple[str, str, str, str, Work]]:
    """Layer, precision, kernel, tile and work of every row of a GPU's table."""
    for shape in LAYERS:
        for precision in ("bfloat16", "tf32"):
            for kernel in KERNELS:
                tile = tile_of(kernel, shape, precision, card)
                work = work_of(kernel, shape, precision, tile)
                yield str(shape), precision, kernel, "x".join(map(str, tile)), work
    for precision in ("bfloat16", "float32"):
        for kernel in KERNELS:
            work = narrow_work_of(kernel, DEPTHWISE, precision)
            tile = "x".join(map(str, narrow_tile_of(DEPTHWISE)))
            yield f"{DEPTHWISE}, depthwise", precision, kernel, tile, work
    for precision in ("bfloat16", "float32"):
        for kernel in ("forward", "backward"):
            work = pooling_work_of(kernel, POOLING, precision)
            yield (
                f"{POOLING.name} pooling, {POOLING.channels} channels",
                precision,
                kernel,
                "1x256",
                work,
            )


def table() -> Iterator[str]:
    """Lines of a Markdown table."""
    yield (
        "| GPU | layer | precision | kernel | tile | L2 MB | atomics, M | memory MB | model, us "
        "| bound by | floor, us | H200 in one run, us |"
    )
    yield "|---" * 12 + "|"
    for name, card in CARDS.items():
        for layer, precision, kernel, tile, work in launches(card):
            seconds, bound = seconds_of(work, precision, card)
            floor = floor_of(work, precision, card)
            measured = MEASURED.get((kernel, precision, layer), "-")
            cells = (
                *(name, layer, precision, kernel, tile),
                *(f"{work.l2_bytes / 1e6:.0f}", f"{work.atomics / 1e6:.1f}"),
                *(f"{work.memory_bytes / 1e6:.1f}", f"{1e6 * seconds:.0f}", bound),
                *(f"{1e6 * floor:.0f}", measured if name == "H200" else "-"),
            )
            yield "| " + " | ".join(map(str, cells)) + " |"
