"""Deformable RoI pooling, plain and position-sensitive: the public functions."""

from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformnet.ops._arguments import IntOrPair, integer, number, pair
from deformnet.ops.backends import Backend
from deformnet.ops.roi_pool.checks import Rule, Sampling, join_boxes
from deformnet.ops.roi_pool.operator import OPERATOR


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: IntOrPair,
    spatial_scale: SupportsFloat = 1.0,
    gamma: SupportsFloat = 0.1,
    *,
    sampling: Sampling = "bins",
    samples_per_bin: SupportsIndex = 4,
    backend: Backend = "auto",
) -> Tensor:
    """Applies deformable RoI pooling (Dai et al. 2017, Equations 5-6).

    Each box is divided into ph x pw bins of equal size. Each bin is shifted by its offset, and its
    output is the mean of the map over the bin. `offset=None` is plain average pooling with the same
    sampling rule.

    Args:
        input: [N, C, H, W], of dtype float64, float32, bfloat16 or float16.
        boxes: [R, 5], the index of an image in the batch and x1, y1, x2, y2 in pixels of the
            image; or a list with the boxes [r, 4] of each image. Boxes have no gradient.
        offset: [R, 2*G, ph, pw], the normalized offset (x, y) of each bin: in pixels of `input`
            it is `gamma * offset * (width, height)` of the box there. Channel 2*g is x and the next
            channel y of offset group g; the output channels are divided into G equal groups. With
            "msra", the number of parts of the offset may differ from the number of bins; bin i of
            ph then uses the offset of part `i * parts // ph`. None: the bins are not shifted.
        output_size: number of bins (ph, pw), or an int for both.
        spatial_scale: size of the map relative to the image, such as 1/16.
        gamma: scale factor of all offsets.
        sampling: rule for the area of a box and the samples of its bins. On each axis, with k bins,
            "bins": the paper's rule. x1 and x2 are scaled and rounded, and are the first and the
            last pixel: width = max(x2 - x1 + 1, 1). Bin i consists of the pixels
            floor(i * width / k) <= p < ceil((i + 1) * width / k). Each of them is a sample at
            x1 + p + shift, with zeros outside the map; the mean is over all of them.
            "msra": the rule of the authors' kernel. x1 and x2 are rounded, then
            x1 = x1 * scale - 0.5 and x2 = (x2 + 1) * scale - 0.5, width = max(x2 - x1, 0.1). A bin
            has samples at its start + s / samples_per_bin of its length, s = 0, 1, ...; samples
            outside [-0.5, W - 0.5] are skipped, the others are clamped to [0, W - 1]; the mean is
            over the latter, or zero if there are none.
            "aligned": the rule of RoIAlign. Nothing is rounded; x1 = x1 * scale - 0.5, x2
            likewise, width = x2 - x1. A bin has samples at (s + 0.5) / samples_per_bin of its
            length; outside [-1, W] they are zero, the others are clamped to [0, W - 1]; the mean
            is over all of them. Without offsets this is
            `torchvision.ops.roi_align(aligned=True)`.
            Halves are rounded away from zero.
        samples_per_bin: number of samples on each axis of a bin, for "msra" and "aligned". 0
            ("aligned" only) uses the length of the bin, rounded up.
        backend: "auto" selects the fast kernel for the device of `input`, or the reference with
            one warning if no kernel can run; see `using`. "reference", "cpu" and "triton" select
            a backend by name.

    Returns:
        [R, C, ph, pw] of the dtype of `input`, contiguous.

    `boxes` are float32, float64 or of the dtype of `input` (float32 is better than half precision,
    which has few integers). `offset` has the dtype of `input`, or float32 with a half-precision
    input. Under autocast, `input` is cast to the autocast dtype, and `boxes` and `offset` to
    float32.

    A NaN offset gives NaN in the bin that it shifts, and nowhere else; infinite and huge offsets
    read outside the map. A box with an infinite or NaN corner gives NaN. At integer positions,
    where bilinear interpolation has a kink, the derivative is the one from the right.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, size or name is wrong, or a box has no image in the batch
            (checked only if this needs no synchronization); the message names the argument.
        RuntimeError: if the backend selected by name cannot run on this machine.
    """
    tensors = (input, boxes, offset)
    if has_torch_function(tensors):
        return handle_torch_function(
            deform_roi_pool,
            tensors,
            *(*tensors, output_size, spatial_scale, gamma),
            sampling=sampling,
            samples_per_bin=samples_per_bin,
            backend=backend,
        )
    rule = _rule(output_size, spatial_scale, gamma, sampling, samples_per_bin, False)
    return OPERATOR(backend, (input, join_boxes(boxes, input), offset), rule)


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: IntOrPair,
    spatial_scale: SupportsFloat = 1.0,
    gamma: SupportsFloat = 0.1,
    *,
    sampling: Sampling = "bins",
    samples_per_bin: SupportsIndex = 4,
    backend: Backend = "auto",
) -> Tensor:
    """Applies deformable position-sensitive RoI pooling (Dai et al. 2017, section 2.2).

    Like `deform_roi_pool`, but every bin has its own input channels: bin (i, j) of output channel c
    reads input channel (c*ph + i)*pw + j.

    Args:
        input: [N, C*ph*pw, H, W].
        boxes, output_size, spatial_scale, gamma, sampling, samples_per_bin, backend: as in
            `deform_roi_pool`.
        offset: [R, 2*G, ph, pw], as in `deform_roi_pool`; G divides C. With G = C, each class has
            its own offsets.

    Returns:
        [R, C, ph, pw] of the dtype of `input`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as in `deform_roi_pool`.
    """
    tensors = (input, boxes, offset)
    if has_torch_function(tensors):
        return handle_torch_function(
            deform_ps_roi_pool,
            tensors,
            *(*tensors, output_size, spatial_scale, gamma),
            sampling=sampling,
            samples_per_bin=samples_per_bin,
            backend=backend,
        )
    rule = _rule(output_size, spatial_scale, gamma, sampling, samples_per_bin, True)
    return OPERATOR(backend, (input, join_boxes(boxes, input), offset), rule)


def _rule(
    output_size: IntOrPair,
    spatial_scale: SupportsFloat,
    gamma: SupportsFloat,
    sampling: str,
    samples_per_bin: SupportsIndex,
    position_sensitive: bool,
) -> Rule:
    return Rule(
        pair("output_size", output_size),
        number("spatial_scale", spatial_scale),
        number("gamma", gamma),
        sampling,
        integer("samples_per_bin", samples_per_bin),
        position_sensitive,
    )
