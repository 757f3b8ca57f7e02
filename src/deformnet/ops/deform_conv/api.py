"""Deformable convolution: the public function."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformnet.ops._arguments import IntOrPair, pair
from deformnet.ops.backends import Backend
from deformnet.ops.deform_conv.checks import Border, Geometry
from deformnet.ops.deform_conv.operator import OPERATOR


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    mask: Tensor | None = None,
    *,
    border: Border = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    """Applies a deformable 2D convolution (Dai et al. 2017, Equation 2).

    Tap k of the kernel reads the input at `p0 + pk + offset` instead of at `p0 + pk`, with
    bilinear interpolation (Equations 3-4). With a mask, this is modulated deformable convolution
    (DCNv2, Zhu et al. 2019): the value of each tap is multiplied by its mask. The first eight
    arguments are those of `torchvision.ops.deform_conv2d`, in the same order. `groups` and the
    number of offset groups G are inferred from the shapes.

    Args:
        input: [N, C, H, W], of dtype float64, float32, bfloat16 or float16.
        offset: [N, 2*G*kh*kw, Ho, Wo], the offset (y, x) of each tap in pixels of `input`.
            Channel `2*(g*kh*kw + i*kw + j)` is the y offset of tap (i, j) in offset group g, and
            the next channel is its x offset. The input channels are divided into G equal groups.
        weight: [C_out, C/groups, kh, kw].
        bias: [C_out].
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, an int or a pair (y, x).
        mask: [N, G*kh*kw, Ho, Wo], the factor of each tap.
        border: values outside the map. "zeros": the map is padded with zeros, and positions in
            (-1, H) x (-1, W) interpolate between padding and map (Equations 3-4). "msra2017": the
            rule of the authors' first kernel. Positions outside [0, H) x [0, W) read zero;
            positions beyond the last row or column read the value of that row or column.
        backend: "auto" selects the fast kernel for the device of `input`, or the reference with
            one warning if no kernel can run; see `using`. "reference", "cpu" and "triton" select
            a backend by name.

    Returns:
        [N, C_out, Ho, Wo] of the dtype of `input`, channels-last if `input` is.
        `Ho = (H + 2*padding - dilation*(kh - 1) - 1) // stride + 1`, and Wo likewise.

    `weight` and `bias` have the dtype of `input`; so do `offset` and `mask`, which may also be
    float32 with a half-precision input. Under autocast, `input`, `weight` and `bias` are cast to
    the autocast dtype, and `offset` and `mask` to float32.

    A NaN offset gives NaN in the outputs that use it, and nowhere else; infinite and huge offsets
    read outside the map. At integer positions, where bilinear interpolation has a kink, the
    derivative is the one from the right.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, size or name is wrong; the message names the argument.
        RuntimeError: if the backend selected by name cannot run on this machine.
    """
    tensors = (input, offset, weight, bias, mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            deform_conv2d,
            tensors,
            *(input, offset, weight, bias, stride, padding, dilation, mask),
            border=border,
            backend=backend,
        )
    geometry = Geometry(
        pair("stride", stride), pair("padding", padding), pair("dilation", dilation), border
    )
    return OPERATOR(backend, tensors, geometry)
