"""Fixtures of the operators' tests."""

import pytest
import torch

from deformnet.ops import backends


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


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    """Every backend that can run on CPU tensors here."""
    _needs(request.param)
    return request.param


@pytest.fixture(params=["cpu"])
def fast(request) -> str:
    """Every backend other than the reference that can run on CPU tensors here."""
    _needs(request.param)
    return request.param
