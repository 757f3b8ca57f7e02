"""Registration of deformable convolution with PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from deformnet.ops.deform_conv import cpu, reference
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
    products, reads = _multiply_adds(input, offset, weight)
    return 2 * (products + reads)


def _backward_flops(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> int:
    products, reads = _multiply_adds(input, offset, weight)
    by_input, by_position, by_weight = needs[0], needs[1] or needs[4], needs[2]
    by_columns = products if by_input or by_position else 0
    return 2 * (
        by_columns + by_weight * (products + reads) + by_input * reads + by_position * reads
    )


def _multiply_adds(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[int, int]:
    """Those of the convolution's products, N*Ho*Wo*C_out*C/groups*K, and of the reads."""
    batch, _, height, width = offset.shape
    out_channels, group_channels, kh, kw = weight.shape
    taps = batch * height * width * kh * kw
    return taps * out_channels * group_channels, taps * input.shape[1] * _READ


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
    keeps_memory_format=True,
    reference=reference.deform_conv2d,
    cpu=Kernels(cpu.deform_conv2d, cpu.deform_conv2d_backward),
    triton=_triton,
    flops=_flops,
    backward_flops=_backward_flops,
)
