"""The operators on a GPU, in Triton.

This module says whether they can run. `kernels` has them, and imports Triton, which costs `import
deformnet` nothing on a machine without a GPU.
"""

import functools
import importlib.util

import torch

# Below this there is no bfloat16 in hardware, and Triton does not promise to work.
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def why_unavailable() -> str | None:
    """The reason why the kernels cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    if torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < _LEAST_CAPABILITY:
                name = torch.cuda.get_device_name(index)
                return "the kernels want compute capability {}.{}, {} has {}.{}".format(
                    *_LEAST_CAPABILITY, name, *capability
                )
    return None
