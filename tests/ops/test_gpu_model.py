"""The performance model of the GPU kernels."""

import math

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import gpu_model, roi_pool
from benchmarks.gpu_model import CARDS, KERNELS, MEASURED
from benchmarks.shapes import SHAPES, Shape

from deformnet.ops.deform_conv.triton_geometry import Tile


@pytest.mark.parametrize("name", CARDS)
def test_no_kernel_is_faster_than_its_floor(name):
    card = CARDS[name]
    for shape in SHAPES:
        for kernel in KERNELS:
            for precision in card.flops:
                tile = gpu_model.tile_of(kernel, shape, precision, card)
                work = gpu_model.work_of(kernel, shape, precision, tile)
                seconds, _ = gpu_model.seconds_of(work, precision, card)
                assert seconds >= gpu_model.floor_of(work, precision, card)
    for _layer, precision, _kernel, _tile, work in gpu_model.launches(card):
        seconds, _ = gpu_model.seconds_of(work, precision, card)
        assert seconds >= gpu_model.floor_of(work, precision, card) > 0


def test_the_model_is_near_what_was_measured_and_not_above():
    """Kernels take longer than the model, which ignores latency, but not much longer."""
    shapes = {str(shape): shape for shape in SHAPES}
    for (kernel, precision, name), microseconds in MEASURED.items():
        tile = gpu_model.tile_of(kernel, shapes[name], precision, CARDS["H200"])
        work = gpu_model.work_of(kernel, shapes[name], precision, tile)
        seconds, _ = gpu_model.seconds_of(work, precision, CARDS["H200"])
        assert 0.4 * microseconds < 1e6 * seconds < 1.1 * microseconds, (kernel, precision, name)


def test_the_work_of_a_layer_that_fits_its_tiles():
    shape = Shape(1, 64, 8, 16)
    forward = gpu_model.work_of("forward", shape, "bfloat16", Tile(64, 64, 64, 8, 1))
    assert forward.programs == 2
    assert forward.flops == shape.forward_flops
    corners, offsets, weight, output = (
        4 * 128 * 9 * 64 * 2,
        128 * 18 * 4,
        9 * 64 * 64 * 2,
        128 * 128,
    )
    assert forward.l2_bytes == corners + offsets + 2 * weight + output
    narrow = gpu_model.work_of("forward", shape, "bfloat16", Tile(64, 32, 64, 8, 1))
    assert narrow.l2_bytes == forward.l2_bytes + corners + offsets
    positions = gpu_model.work_of("positions", shape, "bfloat16", Tile(64, 64, 64, 8, 1))
    assert positions.atomics == 4 * 128 * 9 * 64
    assert positions.programs == 2 * 9


def test_the_work_of_a_depthwise_layer_that_fits_its_tiles():
    shape = Shape(1, 64, 8, 16)
    forward, positions, weight = (
        gpu_model.narrow_work_of(kernel, shape, "float32") for kernel in KERNELS
    )
    rows, samples, offsets = 128, 128 * 9 * 64, 4 * 128 * 18
    assert gpu_model.narrow_tile_of(shape) == (8, 64)
    assert forward.programs == rows // 8
    assert forward.l2_bytes == 4 * 4 * samples + offsets + 16 * 4 * 9 * 64 + 4 * rows * 64
    assert positions.programs == 9 * rows // 8
    assert positions.l2_bytes == 5 * 4 * samples + 2 * offsets + 16 * 4 * 9 * 64
    assert positions.atomics == 4 * samples
    assert weight.programs == 9 * 16  # as many splits as tiles of rows
    assert weight.l2_bytes == 5 * 4 * samples + offsets + 2 * 16 * 4 * 9 * 64
    assert weight.atomics == 0
    bfloat16 = gpu_model.narrow_work_of("forward", shape, "bfloat16")
    assert bfloat16.l2_bytes == (forward.l2_bytes + offsets) / 2


def test_pooling_meets_the_pixels_of_its_samples():
    boxes, pooling = roi_pool.random_boxes(), roi_pool.POOLINGS[0]
    pixels = steps = 0
    for _, x1, y1, x2, y2 in boxes.double().tolist():
        rows, row_cells = pixels_and_cells(y1, y2, roi_pool.HEIGHT)
        columns, _ = pixels_and_cells(x1, x2, roi_pool.WIDTH)
        pixels += rows * columns
        steps += row_cells * roi_pool.BINS * (roi_pool.SAMPLES + 1)
    forward = gpu_model.pooling_work_of("forward", pooling, "float32")
    backward = gpu_model.pooling_work_of("backward", pooling, "float32")
    bins = 300 * 49
    assert forward.programs == bins
    # Rounding may move a sample to another pixel.
    assert backward.atomics == pytest.approx(256 * pixels, rel=1e-3)
    assert forward.operations == pytest.approx(256 * steps * (12 + 10), rel=1e-3)
    assert forward.l2_bytes == 4 * backward.atomics + 4 * bins * 7 + 32 * bins * 256
    assert backward.l2_bytes == forward.l2_bytes


def pixels_and_cells(low: float, high: float, length: int) -> tuple[int, int]:
    """Of the samples of a box on one axis, summed over its bins."""
    low, high = low / 16 - 0.5, high / 16 - 0.5
    pixels = cells = 0
    for i in range(roi_pool.BINS):
        positions = (low + (high - low) * (i + (s + 0.5) / 4) / roi_pool.BINS for s in range(4))
        tops = {math.floor(min(max(position, 0), length - 1)) for position in positions}
        cells += len(tops)
        pixels += len({top + k for top in tops for k in (0, 1)} & set(range(length)))
    return pixels, cells
