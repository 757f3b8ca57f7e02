"""GPUs that the kernels run on, of whatever make, and what is known about each kind."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from deformnet.ops.triton import DEVICE_TYPES


class Kind(StrEnum):
    """GPUs that take the same tiles."""

    AMPERE = "ampere"  # mma.sync, scalar float atomics: also 8.6, 8.9 and 12.0
    HOPPER = "hopper"  # wgmma, vector atomics
    BLACKWELL = "blackwell"  # tcgen05, vector atomics; of data centers
    CDNA = "cdna"  # mfma
    SMALL = "small"  # larger tiles spill: AMD's RDNA; also Intel's and unknown ones


def on_device_of(tensor: Tensor) -> torch.accelerator.device_index:
    """Context manager in which the kernels run on the tensor's GPU; does nothing for others."""
    index = tensor.device.index if tensor.device.type in DEVICE_TYPES else None
    return torch.accelerator.device_index(index)


def target() -> tuple[str, str]:
    """Backend and architecture that Triton compiles for on the current GPU.

    Such as ("cuda", "90"), ("hip", "gfx942") or ("xpu", ...); empty in Triton's interpreter.
    """
    if knobs.runtime.interpret:
        return "", ""
    found: Any = driver.active.get_current_target()
    return found.backend, str(found.arch)


def kind_of(backend: str, architecture: str) -> Kind:
    """The kind of a `target`."""
    if backend == "cuda":
        generation = int(architecture) // 10
        return {9: Kind.HOPPER, 10: Kind.BLACKWELL}.get(generation, Kind.AMPERE)
    if backend == "hip" and architecture.startswith("gfx9"):
        return Kind.CDNA
    return Kind.SMALL


def warps_of_32(number: int) -> int:
    """As many warps as have the lanes of `number` warps of 32, on the current GPU: each lane then
    has as many numbers of a tile, and loads vectors as wide."""
    return max(1, number // 2) if kind_of(*target()) is Kind.CDNA else number


def uses_tf32(backend: str, architecture: str) -> bool:
    """Whether float32 is multiplied in tf32: PyTorch's switch for convolutions, where there is
    such an instruction. Of AMD's GPUs only gfx942 has it; for others Triton refuses to compile."""
    if backend == "hip" and architecture != "gfx942":
        return False
    library = torch.backends.mkldnn if backend == "xpu" else torch.backends.cudnn
    return library.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
