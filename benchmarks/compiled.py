"""Static analysis of the Triton kernels, compiled for GPUs that this machine does not have.

`kernels_of` compiles the kernels of a call on meta tensors as Triton would on the target GPU, and
runs nothing. `Code` summarizes the machine code: registers, spills, the width of loads and atomics,
and whether the matrix unit is used.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deformnet.ops.deform_conv import triton as deform_conv
from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.roi_pool import triton as roi_pool
from deformnet.ops.roi_pool.checks import Rule
from deformnet.ops.triton import tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
"""A100, H200, B200, MI250, MI300X, Radeon RX 7900 XTX."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""By precision: the dtype of all tensors other than positions."""

# PTX and AMD's assembly: the instruction at the start of a line, after a predicate.
_LOAD = re.compile(
    r"^\s*(?:@!?%\w+\s+)?(?:ld\.global\S*?(\.v[248])?\.[bufs](\d+)\b"
    r"|cp\.async\.c[ag]\S*global\S*[^;]*?, 0x([0-9a-f]+)"
    r"|(?:global|buffer)_load_(\w+))",
    re.MULTILINE,
)
_ATOMIC = re.compile(
    r"^\s*(?:@!?%\w+\s+)?(?:(?:atom|red)\S*global\S*\.add\S*?(\.v[248])?\.\w*f(?:32|64)\b"
    r"|(?:global|buffer|flat)_atomic_(\w+))",
    re.MULTILINE,
)
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma|v_wmma)")
_AMD_NUMBER = r"\.{}:\s+(\d+)"
# Bytes of a load by its suffix in AMD's assembly: dwordx4 or b128, short_d16_hi or u16.
_AMD_BYTES = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4, "b": 1, "u": 1, "i": 1}


def convolution(
    precision: str, *, groups: int = 1, channels: int = 256, side: int = 40, border: str = "zeros"
) -> Callable[[], None]:
    """Both passes of a modulated 3x3 layer, with offsets in float32 or better."""
    dtype = DTYPES[precision]
    positions = torch.promote_types(dtype, torch.float32)
    offset_groups = 4 if groups == 1 else 1
    input, output = (_meta(1, channels, side, side, dtype=dtype) for _ in range(2))
    weight = _meta(channels, channels // groups, 3, 3, dtype=dtype)
    offset = _meta(1, 18 * offset_groups, side, side, dtype=positions)
    mask = _meta(1, 9 * offset_groups, side, side, dtype=positions)
    geometry = Geometry((1, 1), (1, 1), (1, 1), border)

    def launch() -> None:
        bias = input.new_empty(channels)
        deform_conv.deform_conv2d(input, offset, weight, bias, mask, geometry)
        deform_conv.deform_conv2d_backward(
            output, input, offset, weight, mask, geometry, (True,) * 5
        )

    return launch


def depthwise(precision: str) -> Callable[[], None]:
    """Both passes of a layer with as many groups as channels."""
    return convolution(precision, groups=256)


def pooling(
    precision: str, *, channels: int = 256, side: int = 40, rule: Rule | None = None
) -> Callable[[], None]:
    """Both passes of deformable RoI pooling: 300 boxes, 7x7 bins unless `rule` says otherwise."""
    dtype = DTYPES[precision]
    positions = torch.promote_types(dtype, torch.float32)
    rule = rule or Rule((7, 7), 1 / 16, 0.1, "aligned", 4, False)
    planes = rule.output_size[0] * rule.output_size[1] if rule.position_sensitive else 1
    input = _meta(1, channels * planes, side, side, dtype=dtype)
    boxes, offset = (_meta(300, *size, dtype=positions) for size in [(5,), (2, *rule.output_size)])
    output = _meta(300, channels, *rule.output_size, dtype=dtype)

    def launch() -> None:
        roi_pool.roi_pool(input, boxes, offset, rule)
        roi_pool.roi_pool_backward(output, input, boxes, offset, rule, (True, True))

    return launch


CALLS = {
    "convolution": (convolution, tuple(DTYPES)),
    "depthwise": (depthwise, ("float32", "bfloat16")),
    "RoI pooling": (pooling, ("float32", "bfloat16")),
}
"""The calls in the full table, and their precisions."""


def _meta(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


class Code(NamedTuple):
    """A compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread that do not fit into registers
    shared: int  # bytes per program
    wide_loads: int  # of 8 bytes or more
    narrow_loads: int
    wide_atomics: int  # of two values or more
    narrow_atomics: int
    loops: int  # atomics that the GPU lacks, as compare-and-swap loops
    matrix: str  # instruction of the matrix unit, or ""


def kernels_of(
    launch: Callable[[], object], target: str, *, tf32: bool = False, candidates: bool = False
) -> dict[tuple[str, Any], Any]:
    """The compiled Triton kernels that a function launches, by name and tile.

    Its tensors may be on the meta device, and thus of any size. With `candidates`, each kernel is
    compiled with every tile that autotuning may choose, the default first.
    """
    found = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        found[self.fn.__name__, options["TILE"]] = run(self, *arguments, warmup=True, **options)

    def default(
        on: Tensor, problem: str, tiles: Sequence[Any], run: Callable[[Any], object]
    ) -> Any:
        for tile in tiles if candidates else ():
            run(tile)
        return tiles[0]

    # By the setting's older name; see the operators' tests.
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        with (
            _as_if_on(TARGETS[target]),
            patch.object(JITFunction, "run", compile_only),
            patch.object(tuning, "fastest", default),
        ):
            launch()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return found


def codes(
    call: str, precision: str, target: str, *, candidates: bool
) -> dict[tuple[str, Any], Code]:
    """The kernels of one of `CALLS`, by name and tile; see `kernels_of`."""
    launch = CALLS[call][0](precision)
    found = kernels_of(launch, target, tf32=precision == "tf32", candidates=candidates)
    return {(name.lstrip("_"), tile): code_of(kernel) for (name, tile), kernel in found.items()}


@contextmanager
def _as_if_on(target: GPUTarget) -> Iterator[None]:
    pretended = SimpleNamespace(
        get_current_target=lambda: target,
        # Triton caches kernels by device, so this name has to be unique.
        get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0,
    )
    with patch.object(driver, "_active", pretended):
        yield


def code_of(kernel: Any) -> Code:
    """Analyzes a compiled Triton kernel."""
    shared = kernel.metadata.shared
    if "ptx" in kernel.asm:
        text = kernel.asm["ptx"]
        registers, spilled = _cubin_numbers(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        number = {
            name: int(re.findall(_AMD_NUMBER.format(name), text)[-1])
            for name in ("vgpr_count", "agpr_count", "private_segment_fixed_size")
            if re.search(_AMD_NUMBER.format(name), text)
        }
        registers, spilled = number["vgpr_count"], number["private_segment_fixed_size"]
    widths = [_load_bytes(match) for match in _LOAD.finditer(text)]
    atomics = [match.groups() for match in _ATOMIC.finditer(text)]
    loops = sum("cmpswap" in (amd or "") for _, amd in atomics)
    wide_atomics = sum(vector is not None or "pk" in (amd or "") for vector, amd in atomics)
    matrix = _MATRIX.search(text)
    return Code(
        registers=registers,
        spilled=spilled,
        shared=shared,
        wide_loads=sum(width >= 8 for width in widths),
        narrow_loads=sum(width < 8 for width in widths),
        wide_atomics=wide_atomics,
        narrow_atomics=len(atomics) - wide_atomics - loops,
        loops=loops,
        matrix=matrix[1] if matrix else "",
    )


def table() -> Iterator[str]:
    """Lines of a Markdown table of every call, precision, target, kernel and tile."""
    yield (
        "| call | kernel | precision | target | tile | registers | spilled bytes | shared bytes "
        "| loads: wide + narrow | atomics: wide + narrow + loops | matrix unit |"
    )
    yield "|---" * 11 + "|"
    for call, (_, precisions) in CALLS.items():
        for precision in precisions:
            for target in TARGETS:
                found = codes(call, precision, target, candidates=True)
                for (kernel, tile), code in found.items():
                    cells = (
                        *(call, kernel, precision, target, "x".join(map(str, tile))),
                        *(code.registers, code.spilled, code.shared),
                        f"{code.wide_loads} + {code.narrow_loads}",
                        f"{code.wide_atomics} + {code.narrow_atomics} + {code.loops}",
                        code.matrix or "-",
                    )
                    yield "| " + " | ".join(map(str, cells)) + " |"


def _load_bytes(match: re.Match[str]) -> int:
    vector, bits, copied, amd = match.groups()
    if bits:
        return int(bits) // 8 * int(vector[2:] if vector else 1)
    if copied:
        return int(copied, 16)
    kind = amd.split("_")[0]
    word, _, count = kind.partition("x")
    if word in _AMD_BYTES:
        return _AMD_BYTES[word] * int(count or 1)
    return int(word.lstrip("bui")) // 8  # b128, u16


def _cubin_numbers(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, according to the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", answer)
    assert found, answer
    return int(found[1]), int(found[2])
