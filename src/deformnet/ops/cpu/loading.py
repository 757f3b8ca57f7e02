"""Loading of the compiled library, and calls into it.

The library does not use PyTorch's headers, so one build works with every version; tensors are
passed as pointers. It uses PyTorch's number of threads and is not linked to an OpenMP runtime: its
calls go to the one that PyTorch loaded, so it runs on the same threads.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Selects an instruction set, as ATEN_CPU_CAPABILITY does for PyTorch's own kernels.
_CHOICE = "DEFORMNET_INSTRUCTION_SET"
_FILES = ("libdeformnet_cpu.so", "libdeformnet_cpu.dll")
# Parts of the system's error if no OpenMP runtime is loaded: with GCC, Clang, and on Windows.
_NO_OPENMP = ("GOMP_", "omp_", "__kmpc_", "or one of its dependencies")

# As `DType` of common.h.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def _library_file() -> Path:
    # An editable install keeps the library apart from the sources: the package has two folders.
    folders = sys.modules[__name__.rpartition(".")[0]].__path__
    for file in (Path(folder) / name for folder in folders for name in _FILES):
        if file.is_file():
            return file
    # CMake leaves the reason here.
    notes = [note for folder in folders if (note := Path(folder) / "not_built.txt").is_file()]
    reason = notes[0].read_text().strip() if notes else "no C++ compiler was found"
    raise FileNotFoundError(
        f"the CPU kernels were not built when deformnet was installed: {reason}; "
        "install GCC (Clang on macOS and Windows) and reinstall deformnet, or install a wheel"
    )


def _load(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if not any(name in str(error) for name in _NO_OPENMP):
            raise
        raise OSError(
            "expected PyTorch to have loaded an OpenMP runtime, but got none "
            f"({error}); install PyTorch's own build (pip install torch), or preload a runtime "
            "(on Linux, LD_PRELOAD=libgomp.so.1)"
        ) from error


@functools.cache
def _library() -> ctypes.CDLL:
    library = _load(_library_file())
    library.deformnet_instruction_set.restype = ctypes.c_char_p
    library.deformnet_select_instruction_set.argtypes = [ctypes.c_char_p]
    choice = os.environ.get(_CHOICE)
    if choice is not None and library.deformnet_select_instruction_set(choice.encode()):
        raise OSError(
            f"expected {_CHOICE} to be amx, avx512_bf16, avx512, avx2 or baseline, and supported "
            f"by this machine, but got {choice!r}"
        )
    return library


@functools.cache
def why_unavailable() -> str | None:
    """The reason why the kernels cannot run on this machine, or None if they can."""
    try:
        _library()
    except FileNotFoundError as error:
        return str(error)
    except OSError as error:
        return f"the CPU kernels cannot be loaded: {error}"
    return None


def instruction_set() -> str:
    """The instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "baseline".

    "baseline" is SSE2 on x86-64 and NEON on ARM64.

    The environment variable DEFORMNET_INSTRUCTION_SET overrides the best one of the machine.
    """
    return _library().deformnet_instruction_set().decode()


def select_instruction_set(name: str) -> None:
    """Select an instruction set other than the best one, for tests and comparisons.

    Raises:
        ValueError: if this build or this machine does not support it.
    """
    if _library().deformnet_select_instruction_set(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available on this machine")


@functools.cache
def _function(name: str) -> Callable[..., int]:
    return _library()[f"deformnet_{name}"]


def call(name: str, problem: bytes, *tensors: Tensor | None) -> None:
    """Call the library's function of this name.

    Args:
        problem: The function's first argument, packed with `struct.Struct`, which takes a third of
            the time of filling a `ctypes.Structure`.
        tensors: The fields of its second argument, a structure of pointers; None is null.
    """
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if _function(name)(problem, struct.pack(f"{len(pointers)}P", *pointers)):
        raise MemoryError(f"not enough memory for the workspace of {name}")


def dense(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor in one of the two memory formats, and whether that is channels-last."""
    if tensor.is_contiguous():
        return tensor, False
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor, True
    return tensor.contiguous(), False
