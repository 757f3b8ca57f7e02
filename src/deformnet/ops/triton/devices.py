"""GPUs that the kernels run on, from any vendor, and the properties of each kind."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from deformnet.ops.triton import DEVICE_TYPES


class Kind(StrEnum):
    """Kinds of GPUs; those of a kind use the same tiles."""

    AMPERE = "ampere"  # mma.sync, scalar float atomics; also compute capability 8.6, 8.9, 12.0
    HOPPER = "hopper"  # wgmma, vector atomics
    BLACKWELL = "blackwell"  # tcgen05, vector atomics; data-center GPUs only
    CDNA = "cdna"  # mfma
    SMALL = "small"  # AMD's RDNA, where larger tiles spill; also Intel and unknown GPUs


def on_device_of(tensor: Tensor) -> torch.accelerator.device_index:
    """Context manager that selects the tensor's GPU; does nothing if it is not on a GPU."""
    index = tensor.device.index if tensor.device.type in DEVICE_TYPES else None
    return torch.accelerator.device_index(index)


def target() -> tuple[str, str]:
    """Backend and architecture that Triton compiles for on the current GPU.

    For example, ("cuda", "90"), ("hip", "gfx942") or ("xpu", ...); ("", "") in the interpreter.
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
    """Number of warps of the current GPU with as many lanes as `number` warps of 32 lanes.

    Each lane then holds as many elements of a tile, and loads vectors of the same width.
    """
    return max(1, number // 2) if kind_of(*target()) is Kind.CDNA else number


def uses_tf32(backend: str, architecture: str) -> bool:
    """Whether float32 is multiplied in tf32: PyTorch's setting for convolutions, if supported.

    Among AMD GPUs, only gfx942 supports tf32; for the others, Triton refuses to compile it.
    """
    if backend == "hip" and architecture != "gfx942":
        return False
    library = torch.backends.mkldnn if backend == "xpu" else torch.backends.cudnn
    return library.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
