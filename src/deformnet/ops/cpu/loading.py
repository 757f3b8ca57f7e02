"""The compiled library, and what goes across its border.

The library needs no header of PyTorch, so one build serves every version of it; tensors cross the
border as pointers. It runs on PyTorch's own number of threads, and on the OpenMP runtime that
PyTorch has loaded already.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

# Names an instruction set to use in place of the best one, as ATEN_CPU_CAPABILITY does for
# PyTorch's own kernels.
_CHOICE = "DEFORMNET_INSTRUCTION_SET"

# As `DType` of kernels.h.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def _library_file() -> Path:
    # An editable install keeps the library apart from the sources: the package has two folders.
    package = sys.modules[__name__.rpartition(".")[0]]
    folders = [Path(folder) for folder in package.__path__]
    for folder in folders:
        for name in ("libdeformnet_cpu.so", "libdeformnet_cpu.dylib", "deformnet_cpu.dll"):
            if (folder / name).is_file():
                return folder / name
    raise OSError(f"the compiled library is in none of {', '.join(map(str, folders))}")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_file()))
    library.deformnet_instruction_set.restype = ctypes.c_char_p
    library.deformnet_select_instruction_set.argtypes = [ctypes.c_char_p]
    choice = os.environ.get(_CHOICE)
    if choice is not None and library.deformnet_select_instruction_set(choice.encode()):
        raise OSError(
            f"{_CHOICE}: want amx, avx512, avx2 or baseline, as far as this machine has them, "
            f"got {choice!r}"
        )
    return library


@functools.cache
def why_unavailable() -> str | None:
    """The reason why the kernels cannot run here, or None if they can."""
    try:
        _library()
    except OSError as error:
        return f"the CPU kernels cannot be loaded: {error}"
    return None


def instruction_set() -> str:
    """The instruction set in use: "amx", "avx512", "avx2" or "baseline" (SSE2, NEON).

    The environment variable DEFORMNET_INSTRUCTION_SET names another than the machine's best.
    """
    return _library().deformnet_instruction_set().decode()


def select_instruction_set(name: str) -> None:
    """Use another instruction set than the best one, for tests and comparisons.

    Raises:
        ValueError: if this build or this machine does not have it.
    """
    if _library().deformnet_select_instruction_set(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available on this machine")


def call(name: str, problem: ctypes.Structure, tensors: ctypes.Structure) -> None:
    """Run the library's function of this name, on the structures that it takes."""
    if _library()[f"deformnet_{name}"](ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError(f"no memory for the workspace of {name.removesuffix('_backward')}")


def dense(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor in one of the two memory formats, and whether that is channels-last."""
    if tensor.is_contiguous():
        return tensor, False
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor, True
    return tensor.contiguous(), False


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's numbers lie; no tensor is a null pointer."""
    return None if tensor is None else tensor.data_ptr()
