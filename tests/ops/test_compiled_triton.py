"""Static checks of the Triton kernels, compiled for GPUs that this machine does not have.

Kernels can become slow without giving wrong results: a division that hides divisibility by 16 from
the compiler makes loads and atomics scalar, and a tile that is too large spills registers. Every
call, precision and target is compiled with the default tiles (two minutes), and with DEFORMNET_FUZZ
also with all other tiles that autotuning may choose.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels for the interpreter cannot be compiled", allow_module_level=True)

import triton
from benchmarks.compiled import (
    CALLS,
    TARGETS,
    Code,
    codes,
    convolution,
    kernels_of,
    pooling,
)

from deformnet.ops.deform_conv.triton_geometry import Tile
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.triton import tuning

EVERY = [
    (call, precision, target)
    for call, (_, precisions) in CALLS.items()
    for precision in precisions
    for target in TARGETS
]
# KB of a program; GPUs of compute capability 8.6, 8.9 and 12.0 use the kernels of 8.0.
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx90a": 64, "gfx942": 64, "gfx1100": 64}
MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx90a": "v_mfma",
    "gfx942": "v_mfma",
    "gfx1100": "v_wmma",
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory) -> Iterator[None]:
    """An empty cache, because Triton does not recompile cached kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(autouse=True, scope="module")
def long_lived_objects() -> Iterator[None]:
    """Hides PyTorch's objects from garbage collection, which a sixth of the time went to."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def ptxas() -> None:
    try:
        triton.backends.nvidia.compiler.get_ptxas(80)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("call", "precision", "target"), EVERY)
def test_compiled_code_keeps_what_makes_it_fast(call, precision, target):
    found = codes(call, precision, target, candidates="DEFORMNET_FUZZ" in os.environ)
    failed = {
        (kernel, tile): (missing, code)
        for (kernel, tile), code in found.items()
        if (missing := faults(call, kernel, precision, target, code))
    }
    assert failed == {}


def test_candidates_are_all_tiles_that_autotuning_may_choose():
    compiled: list[Tile] = []
    tiles = Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2)

    def launch() -> None:
        compiled.append(tuning.fastest(torch.empty(0, device="meta"), "", tiles, compiled.append))

    kernels_of(launch, "sm_80")
    assert compiled == [tiles[0]]
    compiled.clear()
    kernels_of(launch, "sm_80", candidates=True)
    assert compiled == [*tiles, tiles[0]]


def faults(call: str, kernel: str, precision: str, target: str, code: Code) -> list[str]:
    """The checks that a kernel fails."""
    matrix, adds = call == "convolution", kernel in ("backward_positions", "backward")
    # ptxas accepts a few spills where they let one more program run.
    spill = 0 if matrix and precision != "float64" else 32
    # Offsets, masks and boxes are read as scalars.
    most_narrow = 48 if call == "RoI pooling" else 40 if adds else 20
    vector_atomics = target in ("sm_90", "sm_100") and precision != "float64"
    no_atomics = target in ("gfx90a", "gfx1100")  # compiled to compare-and-swap loops
    kept = {
        "no spills": code.spilled <= spill,
        "registers": code.registers <= (240 if precision in ("bfloat16", "float16") else 256),
        "shared memory": code.shared <= 1024 * SHARED[target],
        "vector loads": code.wide_loads >= 4,
        "no scalar loads": code.narrow_loads - code.loops <= most_narrow,
        "matrix unit": code.matrix == unit(kernel, precision, target) if matrix else True,
        "atomics": (code.wide_atomics + code.narrow_atomics + code.loops > 0) == adds,
        "vector atomics": code.narrow_atomics == 0 or not vector_atomics,
        "no loops": code.loops == 0 or no_atomics,
    }
    return [name for name, has in kept.items() if not has]


def unit(kernel: str, precision: str, target: str) -> str:
    """The matrix instruction of a kernel, or "": float32 without tf32 has one only on CDNA."""
    if target.startswith("gfx9"):
        return MATRIX[target]
    if precision == "float32" or (target == "gfx1100" and precision in ("tf32", "float64")):
        return ""
    # In tf32, the layout of the weight kernel's operands rules out the larger instructions.
    if precision == "float64" or (precision == "tf32" and kernel == "backward_weight"):
        return "mma.sync"
    return MATRIX[target]


def test_the_compiled_gate_can_fail():
    good = Code(192, 0, 49152, 20, 22, 16, 0, 0, "wgmma.mma_async")
    arguments = "convolution", "backward_positions", "bfloat16", "sm_90"
    assert faults(*arguments, good) == []
    for change, fault in [
        ({"spilled": 8}, "no spills"),
        ({"registers": 255}, "registers"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"wide_loads": 2, "narrow_loads": 73}, "vector loads"),
        ({"narrow_loads": 73}, "no scalar loads"),
        ({"matrix": ""}, "matrix unit"),
        ({"wide_atomics": 0}, "atomics"),
        ({"wide_atomics": 0, "narrow_atomics": 32}, "vector atomics"),
        ({"loops": 16}, "no loops"),
    ]:
        assert fault in faults(*arguments, good._replace(**change))


# A side of 47,000 has more than 2**31 pixels: indices and some sizes take 64 bits.
@pytest.mark.parametrize(
    ("groups", "precision", "target", "deterministic"),
    [(1, "bfloat16", "sm_100", False), (16, "float64", "gfx942", True)],
)
def test_wide_indices_compile(groups, precision, target, deterministic):
    launch = convolution(precision, groups=groups, channels=16, side=47_000, border="msra2017")
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = kernels_of(launch, target)
    finally:
        torch.use_deterministic_algorithms(False)
    others = {"_forward", "_backward_weight"} if groups == 1 else {"forward", "backward_weight"}
    assert {name for name, _ in found} == {"_backward_positions", *others}


@pytest.mark.parametrize(
    ("precision", "target", "rule", "more"),
    [
        ("float32", "sm_90", Rule((7, 7), 0.5, 0.1, "bins", 4, False), {"channels": 64}),
        ("bfloat16", "sm_80", Rule((7, 7), 0.5, 0.1, "aligned", 0, True), {"channels": 32}),
        ("bfloat16", "sm_90", Rule((1, 1), 0.5, 0.1, "msra", 4, False), {"side": 47_000}),
        ("float64", "gfx1100", Rule((1, 1), 0.5, 0.1, "aligned", 0, True), {"channels": 1}),
    ],
)
def test_pooling_compiles_as_the_reference_computes(precision, target, rule, more):
    torch.use_deterministic_algorithms(rule.position_sensitive)
    try:
        found = kernels_of(pooling(precision, rule=rule, **more), target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {name for name, _ in found} == {"_forward", "_backward"}
    for kernel in found.values():
        # Positions match the reference only if no multiply-adds are fused.
        assert "fma.rn.f64" not in kernel.asm.get("ptx", "")
        # Triton 3.6 and 3.7 would turn the length of a loop into a constant.
        assert '"tt.reduce"(%cst' not in kernel.asm["ttgir"]
