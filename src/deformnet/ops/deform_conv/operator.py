"""Registration of deformable convolution with PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from deformnet.ops.deform_conv import cpu, onnx, reference, standard
from deformnet.ops.deform_conv.checks import Geometry, check
from deformnet.ops.registration import Kernels, Operator

_READ = 4  # multiply-adds of a bilinear read, one for each pixel


def _flops(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
) -> int:
    products, reads = multiply_adds(input.shape, offset.shape, weight.shape)
    return 2 * (products + reads)


def _backward_flops(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> int:
    products, reads = multiply_adds(input.shape, offset.shape, weight.shape)
    by_input, by_position, by_weight = needs[0], needs[1] or needs[4], needs[2]
    by_columns = products if by_input or by_position else 0
    return 2 * (
        by_columns + by_weight * (products + reads) + by_input * reads + by_position * reads
    )


def multiply_adds(
    input: Sequence[int], output: Sequence[int], weight: Sequence[int]
) -> tuple[int, int]:
    """Multiply-adds of the products, N*Ho*Wo*C_out*C/groups*K, and of the reads, by shapes.

    The offset may stand for the output, whose N, Ho and Wo alone count.
    """
    out_channels, group_channels, kh, kw = weight
    taps = output[0] * output[2] * output[3] * kh * kw
    return taps * out_channels * group_channels, taps * input[1] * _READ


def _fold(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    mask = None if mask is None else mask.flatten(0, 1)
    return input.flatten(0, 1), offset.flatten(0, 1), weight, bias, mask


def _triton() -> Kernels:
    from deformnet.ops.deform_conv import triton

    return Kernels(triton.deform_conv2d, triton.deform_conv2d_backward)


OPERATOR = Operator(
    "deform_conv2d",
    "Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
    "int[2] stride, int[2] padding, int[2] dilation, str border",
    Geometry,
    check=check,
    differentiable=("input", "offset", "weight", "bias", "mask"),
    positions=("offset", "mask"),
    biases=("bias",),
    rows=("input", "offset", "mask"),
    fold=_fold,
    keeps_memory_format=True,
    reference=reference.deform_conv2d,
    standard=standard.deform_conv2d,
    onnx=onnx.deform_conv2d,
    cpu=Kernels(cpu.deform_conv2d, cpu.deform_conv2d_backward, cpu.plan),
    triton=_triton,
    flops=_flops,
    backward_flops=_backward_flops,
)
