"""Which implementation can run where, and why the others cannot."""

import warnings
from typing import Literal, TypeAlias, get_args

import torch

from deformnet.ops import library

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton"]

# The fast implementation for each type of device; meta tensors take the operator's fake.
_FAST = {"cpu": "cpu", "meta": "cpu", "cuda": "triton"}

_warned: set[str] = set()


def names() -> tuple[str, ...]:
    """The implementations by name: what `backend=` takes, less "auto"."""
    return get_args(Backend)[1:]


def why_unavailable(backend: str, device: str | None = None) -> str | None:
    """Why an implementation cannot run, or None if it can.

    Args:
        backend: one of `names()`.
        device: a type of device, such as "cpu" or "cuda"; without it, the question is whether
            the implementation can run on this machine at all.

    Raises:
        ValueError: for an unknown name.
    """
    if backend == "reference":
        return None
    if backend == "cpu":
        if device not in (None, "cpu", "meta"):
            return f"the CPU kernels take tensors on the CPU, not on {device}"
        return library.CPU_UNAVAILABLE
    if backend == "triton":
        if device not in (None, "cuda", "meta"):
            return f"the Triton kernels take tensors on a GPU, not on {device}"
        return _why_no_triton()
    raise ValueError(f"backend: want one of {', '.join(get_args(Backend))}, got {backend!r}")


def resolve(backend: str, device: str) -> str:
    """The implementation that a call with `backend` runs for tensors on this type of device.

    "auto" takes the fast one, or else the reference, with one warning that gives the reason.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if an implementation is asked for by name and cannot run.
    """
    if backend != "auto":
        reason = why_unavailable(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
        return backend
    fast = _FAST.get(device)
    if fast is None:
        reason = f"there are no kernels for {device} tensors"
    else:
        reason = why_unavailable(fast, device)
        if reason is None:
            return fast
    _warn_once(device, reason)
    return "reference"


# A compiler that traces this need not ask the GPU's driver.
@torch.compiler.assume_constant_result
def _why_no_triton() -> str | None:
    return library.triton.why_unavailable()


# Without this a compiler would refuse to trace the warning; so it is given while tracing.
@torch.compiler.assume_constant_result
def _warn_once(device: str, reason: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"deformnet runs its slow reference implementation on {device} tensors: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
