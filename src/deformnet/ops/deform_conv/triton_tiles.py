"""Tiles of the matrix kernels of deformable convolution, by kind of GPU, kernel and precision.

The first tile of each tuple is the default; the others are candidates for `ops.triton.tuning`. The
defaults for Hopper were the fastest on an H200, or close to it, among those without spills (`python
-m benchmarks.gpu --tiles --layers 1x512x38x63 8x128x28x28`). Those for other kinds have not been
run on any GPU. No tile spills registers, except 16 bytes in float64 (`python -m benchmarks.gpu
--static`); `tests/ops/test_compiled_triton.py` checks this for the defaults, and with
DEFORMNET_FUZZ for all tiles.

The forward kernel samples again for every tile of output channels, and the weight kernel for every
tile and split of rows, so their tiles are as wide in O as registers allow. All tiles fit into the
shared memory of every GPU of their kind: 99 KB for Ampere, 227 KB for Hopper and Blackwell, and
64 KB otherwise.
"""

import functools

import triton

from deformnet.ops.deform_conv.triton_geometry import Tile
from deformnet.ops.triton.devices import Kind

Table = dict[tuple[str, str], tuple[Tile, ...]]

# By kernel and precision: (rows, out, channels), warps, stages.
_FLOAT64: Table = {
    ("forward", "float64"): (Tile(32, 32, 16, 4, 2),),
    ("positions", "float64"): (Tile(32, 16, 16, 4, 2),),
    ("weight", "float64"): (Tile(32, 32, 16, 4, 2),),
}
_NVIDIA: Table = _FLOAT64 | {
    ("forward", "float32"): (Tile(64, 128, 32, 8, 2), Tile(64, 64, 32, 8, 2)),
    ("positions", "float32"): (Tile(32, 32, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    ("weight", "float32"): (Tile(32, 128, 32, 8, 2), Tile(64, 128, 32, 8, 2)),
    ("weight", "half"): (Tile(32, 256, 64, 8, 2), Tile(64, 256, 64, 8, 1)),
    ("weight", "tf32"): (Tile(32, 128, 32, 8, 2), Tile(64, 128, 32, 8, 2)),
}
TILES: dict[Kind, Table] = {
    Kind.AMPERE: _NVIDIA
    | {
        ("forward", "half"): (Tile(64, 128, 64, 8, 2), Tile(64, 128, 32, 8, 2)),
        ("forward", "tf32"): (Tile(64, 128, 32, 8, 2), Tile(32, 128, 32, 8, 2)),
        ("positions", "half"): (Tile(64, 128, 32, 8, 2), Tile(32, 64, 64, 8, 2)),
        ("positions", "tf32"): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
        ("weight", "float32"): (Tile(32, 128, 32, 8, 2), Tile(64, 64, 32, 8, 2)),
    },
    Kind.HOPPER: _NVIDIA
    | {
        ("forward", "half"): (
            *(Tile(64, 256, 64, 8, 1), Tile(64, 256, 64, 8, 2), Tile(64, 256, 32, 8, 2)),
        ),
        ("forward", "tf32"): (Tile(64, 128, 32, 8, 2), Tile(64, 128, 32, 8, 1)),
        ("positions", "half"): (Tile(64, 64, 64, 8, 3), Tile(64, 64, 32, 4, 2)),
        ("positions", "float32"): (Tile(32, 32, 32, 4, 2), Tile(64, 32, 64, 8, 2)),
        ("positions", "tf32"): (Tile(64, 64, 64, 8, 2), Tile(64, 32, 64, 8, 2)),
        ("weight", "float32"): (Tile(64, 128, 32, 8, 2), Tile(32, 64, 64, 8, 2)),
    },
    Kind.BLACKWELL: _NVIDIA
    | {
        ("forward", "half"): (Tile(64, 256, 32, 8, 2), Tile(128, 128, 64, 8, 1)),
        ("forward", "tf32"): (Tile(64, 128, 32, 8, 1), Tile(64, 128, 32, 4, 2)),
        ("positions", "half"): (Tile(64, 128, 32, 8, 2), Tile(64, 64, 64, 8, 2)),
        ("positions", "tf32"): (Tile(64, 64, 32, 8, 2), Tile(64, 32, 64, 8, 2)),
        ("weight", "tf32"): (Tile(64, 128, 32, 8, 2),),
    },
    Kind.CDNA: _FLOAT64
    | {
        ("forward", "half"): (Tile(64, 256, 64, 8, 1), Tile(64, 128, 64, 8, 2)),
        ("forward", "tf32"): (Tile(64, 128, 32, 8, 2),),
        ("forward", "float32"): (Tile(64, 128, 32, 8, 2),),
        ("positions", "half"): (Tile(64, 64, 64, 8, 2), Tile(64, 64, 32, 8, 2)),
        ("positions", "tf32"): (Tile(64, 32, 64, 8, 2),),
        ("positions", "float32"): (Tile(64, 32, 64, 8, 2),),
        ("weight", "half"): (Tile(32, 256, 64, 8, 2), Tile(64, 256, 64, 8, 1)),
        ("weight", "tf32"): (Tile(32, 128, 32, 8, 2),),
        ("weight", "float32"): (Tile(32, 128, 32, 8, 2),),
    },
    Kind.SMALL: _FLOAT64
    | {
        ("forward", "half"): (Tile(64, 128, 32, 8, 1), Tile(32, 128, 32, 8, 1)),
        ("forward", "tf32"): (Tile(32, 64, 32, 8, 1),),
        ("forward", "float32"): (Tile(32, 64, 32, 8, 1),),
        ("positions", "half"): (Tile(32, 64, 32, 8, 1), Tile(64, 64, 32, 8, 1)),
        ("positions", "tf32"): (Tile(32, 32, 32, 8, 1),),
        ("positions", "float32"): (Tile(32, 32, 32, 8, 1),),
        ("weight", "half"): (Tile(32, 128, 32, 8, 1), Tile(32, 64, 32, 4, 1)),
        ("weight", "tf32"): (Tile(32, 64, 32, 8, 1),),
        ("weight", "float32"): (Tile(32, 64, 32, 8, 1),),
    },
}


@functools.cache
def candidates(
    kind: Kind, kernel: str, precision: str, rows: int, out: int, channels: int
) -> tuple[Tile, ...]:
    """Tiles for a problem, no larger than it, but at least 16, the minimum of `tl.dot`.

    Args:
        kernel: "forward", "positions" or "weight".
        precision: "half", "tf32", "float32" or "float64".
        rows: number of rows.
        out: output channels of a group.
        channels: input channels of a segment.
    """

    def fitting(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    fitted = (
        tile._replace(
            rows=fitting(rows, tile.rows),
            out=fitting(out, tile.out),
            channels=fitting(channels, tile.channels),
        )
        for tile in TILES[kind][kernel, precision]
    )
    return tuple(dict.fromkeys(fitted))
