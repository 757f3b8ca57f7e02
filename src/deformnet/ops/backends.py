"""Backends: which implementations can run, why the others cannot, and which one a call uses."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch

from deformnet.ops import triton
from deformnet.ops.cpu import loading

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton"]

# Computed once, so that a compiler can treat it as a constant.
CPU_UNAVAILABLE: str | None = loading.why_unavailable()

# The fast implementation for each device type; meta tensors use the operator's fake.
_FAST: dict[str, Backend] = {"cpu": "cpu", "meta": "cpu", "cuda": "triton", "xpu": "triton"}

# Looked up once, as PyTorch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)

_default: ContextVar[Backend] = ContextVar("deformnet_default_backend", default="auto")
_warned: set[str] = set()

_F = TypeVar("_F", bound=Callable[..., Any])


def names() -> tuple[Backend, ...]:
    """Names of the implementations: the values of `backend=` other than "auto"."""
    return get_args(Backend)[1:]


def autocast_enabled(device: str) -> bool:
    """Whether autocast is enabled for a device type."""
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


def why_unavailable(backend: str, device: str | None = None) -> str | None:
    """Returns the reason why an implementation cannot run, or None if it can.

    Args:
        backend: one of `names()`.
        device: device type, such as "cpu" or "cuda"; None means any device of this machine.

    Raises:
        ValueError: if the name is unknown.
    """
    if backend == "reference":
        return None
    if backend == "cpu":
        if device not in (None, "cpu", "meta"):
            return f"the CPU kernels take tensors on the CPU, not on {device}"
        return CPU_UNAVAILABLE
    if backend == "triton":
        if device not in (None, *triton.DEVICE_TYPES, "meta"):
            return f"the Triton kernels take tensors on a GPU, not on {device}"
        return _why_no_triton()
    raise ValueError(
        f"expected backend to be one of {', '.join(get_args(Backend))}, but got {backend!r}"
    )


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Context manager that sets the backend that `backend="auto"` selects.

    For example, to compare a converted model with the reference implementation::

        with deformnet.ops.using("reference"):
            expected = model(images)

    The setting is local to the thread and the asynchronous task. Calls that name their backend
    ignore it. With `torch.utils.checkpoint`, run the backward pass inside the context as well,
    because it recomputes the forward pass. With `torch.compile`, enter the context outside of the
    compiled function, which is then compiled once per setting (before PyTorch 2.14, only for the
    setting at its first call).

    Args:
        backend: "reference", "cpu" or "triton"; "auto" restores the default inside another
            `using`.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if the backend cannot run on this machine; the message says why.
    """
    if backend != "auto":
        _require(backend, None)
    token = _default.set(backend)
    try:
        yield
    finally:
        _default.reset(token)


def resolve(backend: str, device: str) -> str:
    """Returns the implementation that a call with `backend` uses for tensors on a device type.

    "auto" selects the backend of `using`, else the fast one, else the reference, with one warning
    that gives the reason.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if a backend selected by name cannot run.
    """
    if backend == "auto":
        backend = _chosen()
    if backend != "auto":
        _require(backend, device)
        return backend
    fast = _FAST.get(device)
    reason = why_unavailable(fast, device) if fast else f"there are no kernels for {device} tensors"
    if fast and reason is None:
        return fast
    _warn_once(device, reason)
    return "reference"


def _require(backend: str, device: str | None) -> None:
    reason = why_unavailable(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")


def constant(function: _F) -> _F:
    """Decorator: compilers that trace a call treat its result as a constant."""
    # Like torch.compiler.assume_constant_result, which imports torch._dynamo (over a second).
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


# A compiler that traces this does not need to query the GPU driver.
@constant
def _why_no_triton() -> str | None:
    return triton.why_unavailable()


# A compiler cannot trace the warning, so it is issued during tracing.
@constant
def _warn_once(device: str, reason: str | None) -> None:
    if device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"deformnet runs its slow reference implementation on {device} tensors: {reason}",
        RuntimeWarning,
        stacklevel=5,
    )


def _chosen() -> Backend:
    return _default.get()


# PyTorch 2.14 traces the variable, and recompiles when it changes.
if torch.__version__ < "2.14":
    _chosen = constant(_chosen)
