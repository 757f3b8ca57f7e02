"""The performance model of the GPU kernels."""

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import gpu_model
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
                seconds, _ = gpu_model.seconds_of(work, precision, tile, card)
                assert seconds >= gpu_model.floor_of(kernel, shape, precision, card)


def test_the_model_is_near_what_was_measured_and_not_above():
    """Kernels take longer than the model, which ignores latency, but not much longer."""
    shapes = {str(shape): shape for shape in SHAPES}
    for (kernel, precision, name), microseconds in MEASURED.items():
        tile = gpu_model.tile_of(kernel, shapes[name], precision, CARDS["H200"])
        work = gpu_model.work_of(kernel, shapes[name], precision, tile)
        seconds, _ = gpu_model.seconds_of(work, precision, tile, CARDS["H200"])
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
