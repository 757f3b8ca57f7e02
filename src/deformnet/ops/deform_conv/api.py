"""Deformable convolution: the public function."""

from typing import Literal

import torch
from torch import Tensor

from deformnet.ops import backends, library
from deformnet.ops.checks import deform_conv2d_shape, pair


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
    *,
    border: Literal["zeros", "msra2017"] = "zeros",
    backend: backends.Backend = "auto",
) -> Tensor:
    """Convolution whose taps are moved by offsets (Dai et al. 2017, Equation 2).

    Tap k of the kernel reads the input at `p0 + pk + offset` instead of at `p0 + pk`, bilinearly
    (Equations 3-4). With a mask this is the modulated variant (Zhu et al. 2019): tap k's value is
    multiplied by its mask. The first eight arguments are those of
    `torchvision.ops.deform_conv2d`, in its order; the convolution's groups and the number G of
    offset groups follow from the shapes.

    Args:
        input: [N, C, H, W], in float64, float32, bfloat16 or float16.
        offset: [N, 2*G*kh*kw, Ho, Wo], the shift (y, x) of each tap in pixels of `input`.
            Channel `2*(g*kh*kw + i*kw + j)` is y of tap (i, j) for the g-th of G equal runs of
            input channels, the next one is x.
        weight: [C_out, C/groups, kh, kw].
        bias: [C_out].
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, one int or (y, x).
        mask: [N, G*kh*kw, Ho, Wo], the factor of each tap.
        border: what is read outside the map. "zeros": zero, so that positions in
            (-1, H) x (-1, W) still mix in what lies inside (Equations 3-4). "msra2017": the rule
            of the authors' first kernel; nothing counts outside [0, H) x [0, W), and beyond the
            last row or column the value is the one at the border.
        backend: "auto" takes the fast kernel for the device of `input`, and where none can run
            the reference, with one warning that says why. "reference", "cpu" and "triton" force
            one. Only "reference" can be differentiated twice.

    Returns:
        [N, C_out, Ho, Wo] of `input`'s dtype, channels-last in memory if `input` is.
        `Ho = (H + 2*padding - dilation*(kh - 1) - 1) // stride + 1`, `Wo` likewise.

    `weight` and `bias` have the dtype of `input`; `offset` and `mask` too, or float32 beside a
    half-precision input. Under autocast `input`, `weight` and `bias` are cast to the autocast
    dtype, `offset` and `mask` to float32.

    Offsets may hold anything. A NaN gives NaN where it is read and nowhere else; infinite and
    huge offsets read outside. At whole positions, where the bilinear read has a kink, the
    derivative is the one from the right.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, size or name is wrong; the message says which.
        RuntimeError: if a backend is named that cannot run here.
    """
    steps = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: want a tensor, got {type(input).__name__}")
    device = input.device.type
    run = (
        library.reference_deform_conv2d
        if backends.resolve(backend, device) == "reference"
        else library.deform_conv2d
    )
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = library.autocast(device, input, offset, weight, bias, mask)
        deform_conv2d_shape(*tensors, *steps, border)
        # The casts are done; the reference must not have its own arithmetic cast as well.
        with torch.autocast(device, enabled=False):
            return run(*tensors, *steps, border)
    deform_conv2d_shape(input, offset, weight, bias, mask, *steps, border)
    return run(input, offset, weight, bias, mask, *steps, border)
