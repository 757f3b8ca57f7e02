"""Fixtures of the operators' tests.

They run over the reference and the CPU kernels. On a machine with a GPU they run over the Triton
kernels as well; with TRITON_INTERPRET=1 also without one, in Triton's interpreter (an hour for all
of them).
"""

import os
from pathlib import Path

import pytest
import torch
from on_triton import put_triton_behind_cpu

from deformnet.ops import backends, cpu
from deformnet.ops.cpu import loading

# On a GPU, each of the many small calls in these tests would be autotuned.
os.environ.setdefault("DEFORMNET_AUTOTUNE", "0")

# `make sanitize` tests another build of the kernels.
if "DEFORMNET_TEST_LIBRARY" in os.environ:
    loading._library_file = lambda: Path(os.environ["DEFORMNET_TEST_LIBRARY"])
    loading._library.cache_clear()

TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
FAST = ["cpu", "triton"] if TRITON else ["cpu"]


def _needs(backend: str) -> None:
    reason = backends.why_unavailable(backend)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def one_thread():
    """The problems here are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """On a GPU PyTorch's convolutions, and so ours, take tf32 unless they are told not to."""
    # By the older name for it, the one that PyTorch's exporter can read.
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, so that a number that is never written shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def poisoned(*args, create=create, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def instructions(request):
    """Every instruction set of this machine."""
    _needs("cpu")
    best = cpu.instruction_set()
    try:
        cpu.select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.select_instruction_set(best)


@pytest.fixture(params=["reference", *FAST])
def backend(request, monkeypatch) -> str:
    """Every backend that can run here, by the name that takes tensors on the CPU."""
    return _on_cpu(request.param, monkeypatch)


@pytest.fixture(params=FAST)
def fast(request, monkeypatch) -> str:
    """Every backend other than the reference that can run here, by such a name."""
    return _on_cpu(request.param, monkeypatch)


def _on_cpu(backend: str, monkeypatch) -> str:
    if backend == "triton":
        put_triton_behind_cpu(monkeypatch)
        return "cpu"
    _needs(backend)
    return backend
