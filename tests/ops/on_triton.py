"""The Triton kernels behind tensors on the CPU, so that every test of the CPU kernels runs them.

On a machine with a GPU tensors go there and back; without one the kernels run in Triton's
interpreter.
"""

import pytest
import torch
from operator_testing import OPERATORS
from torch import Tensor

from deformnet.ops import backends
from deformnet.ops.registration import Kernels, Operator


def put_triton_behind_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU kernels need not have been built.
    monkeypatch.setattr(backends, "CPU_UNAVAILABLE", None)
    for operator in OPERATORS:
        forward, backward = (_there_and_back(operator, name) for name in ("forward", "backward"))
        monkeypatch.setattr(operator, "cpu", Kernels(forward, backward))
        monkeypatch.setattr(operator, "_plans", {})  # plans of the CPU kernels


def _there_and_back(operator: Operator, name: str):
    def call(*arguments):
        # Imported at the first call: only then has TRITON_INTERPRET been chosen for good.
        function = getattr(operator.triton(), name)
        if not torch.cuda.is_available():
            return function(*arguments)
        found = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        if isinstance(found, Tensor):
            return found.cpu()
        return tuple(None if tensor is None else tensor.cpu() for tensor in found)

    return call
