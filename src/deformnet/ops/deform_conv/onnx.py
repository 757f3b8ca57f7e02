"""Deformable convolution in ONNX graphs: the operator DeformConv of opset 19."""

import torch
from torch import Tensor

from deformnet.ops.deform_conv import standard
from deformnet.ops.deform_conv.checks import Geometry, check
from deformnet.ops.onnx import require_opset


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """DeformConv, or standard operators for `border="msra2017"`, which DeformConv does not have.

    DeformConv takes a single dtype, and bfloat16 only since opset 22. Half-precision inputs with
    float32 offsets, and bfloat16, are therefore computed in float32.
    """
    stride, padding, dilation, border = geometry
    if border != "zeros":
        return standard.deform_conv2d(input, offset, weight, bias, mask, geometry)
    require_opset(19, "DeformConv")
    dtype = torch.promote_types(input.dtype, offset.dtype)
    if mask is not None:
        dtype = torch.promote_types(dtype, mask.dtype)
    if dtype == torch.bfloat16:
        dtype = torch.float32
    tensors = [input, weight, offset, bias, mask]
    output = torch.onnx.ops.symbolic(
        "DeformConv",
        [None if tensor is None else tensor.to(dtype) for tensor in tensors],
        {
            "kernel_shape": list(weight.shape[2:]),
            "strides": list(stride),
            "pads": list(padding) * 2,
            "dilations": list(dilation),
            "group": input.shape[1] // weight.shape[1],
            "offset_group": offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
        },
        dtype=dtype,
        shape=check(input, offset, weight, bias, mask, geometry),
    )
    return output.to(input.dtype)
