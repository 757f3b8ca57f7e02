"""The Triton kernels behind tensors on the CPU, so that every test of the CPU kernels takes them.

On a machine with a GPU tensors go there and back; without one the kernels run in Triton's
interpreter.
"""

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor


def _there_and_back(function):
    def call(*arguments):
        if not torch.cuda.is_available():
            return function(*arguments)
        found = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        if isinstance(found, Tensor):
            return found.cpu()
        return tuple(None if tensor is None else tensor.cpu() for tensor in found)

    return call


def _kernel(name):
    # Imported at the first call: only then has TRITON_INTERPRET been chosen for good.
    def call(*arguments):
        kernels = importlib.import_module("deformnet.ops.triton.kernels")
        return _there_and_back(getattr(kernels, name))(*arguments)

    return call


NAMES = ("deform_conv2d", "deform_conv2d_backward", "roi_pool", "roi_pool_backward")
on_triton = SimpleNamespace(**{name: _kernel(name) for name in NAMES})
