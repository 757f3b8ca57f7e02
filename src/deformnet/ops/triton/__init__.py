"""Code shared by the Triton kernels of all operators, and whether they can run.

Importing this package does not import Triton, so `import deformnet` costs nothing on a machine
without a GPU. Its modules and each operator's own `triton.py` do import it.
"""

import functools
import importlib.util

import torch

DEVICE_TYPES = ("cuda", "xpu")
"""PyTorch device types that the kernels run on: NVIDIA and AMD GPUs are cuda, Intel GPUs xpu."""

# Older NVIDIA GPUs have no bfloat16 in hardware, and Triton does not support them.
_MINIMUM_CAPABILITY = (8, 0)

# Maximum number of programs in the first and second dimension of a grid.
MOST_PROGRAMS = 2**30  # half of what a GPU can launch, since program IDs also index tiles
MOST_SECOND_PROGRAMS = 2**16 - 1


@functools.cache
def why_unavailable() -> str | None:
    """Returns the reason why the kernels cannot run on this machine, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.cuda.is_available() and torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < _MINIMUM_CAPABILITY:
                return (
                    "expected GPUs of compute capability {}.{} or higher, but got {} with "
                    "{}.{}".format(
                        *_MINIMUM_CAPABILITY, torch.cuda.get_device_name(index), *capability
                    )
                )
    return None
