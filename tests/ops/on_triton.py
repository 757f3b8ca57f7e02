"""The Triton kernels behind tensors on the CPU, so that every test of the CPU kernels takes them.

On a machine with a GPU tensors go there and back; without one the kernels run in Triton's
interpreter.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from deformnet.ops import triton


def _there_and_back(function):
    def call(*arguments):
        if not torch.cuda.is_available():
            return function(*arguments)
        found = function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        if isinstance(found, Tensor):
            return found.cpu()
        return tuple(None if tensor is None else tensor.cpu() for tensor in found)

    return call


on_triton = SimpleNamespace(
    deform_conv2d=_there_and_back(triton.deform_conv2d),
    deform_conv2d_backward=_there_and_back(triton.deform_conv2d_backward),
    roi_pool=_there_and_back(triton.roi_pool),
    roi_pool_backward=_there_and_back(triton.roi_pool_backward),
)
