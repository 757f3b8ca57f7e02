"""The operators on a GPU, in Triton.

Triton is looked for, and its kernels are compiled, at the first call: `import deformnet` costs
nothing more on a machine without a GPU.
"""

import functools
import importlib.util

import torch
from torch import Tensor

Pair = tuple[int, int]

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


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
) -> Tensor:
    """See `deformnet.ops.triton.deform_conv`."""
    from deformnet.ops.triton import deform_conv

    return deform_conv.deform_conv2d(
        input, offset, weight, bias, mask, stride, padding, dilation, border
    )


def deform_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    border: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `deformnet.ops.triton.deform_conv`."""
    from deformnet.ops.triton import deform_conv

    return deform_conv.deform_conv2d_backward(
        grad_output, input, offset, weight, mask, stride, padding, dilation, border, needs
    )


def roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
) -> Tensor:
    """See `deformnet.ops.triton.roi_pooling`."""
    from deformnet.ops.triton import roi_pooling

    return roi_pooling.roi_pool(
        *(input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive),
    )


def roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    position_sensitive: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """See `deformnet.ops.triton.roi_pooling`."""
    from deformnet.ops.triton import roi_pooling

    return roi_pooling.roi_pool_backward(
        *(grad_output, input, boxes, offset, output_size, spatial_scale, gamma),
        *(sampling, samples_per_bin, position_sensitive, needs),
    )
