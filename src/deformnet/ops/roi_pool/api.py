"""Deformable RoI pooling, plain and position-sensitive: the public functions."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deformnet.ops import backends, library
from deformnet.ops.checks import pair, roi_pool_shape

Sampling: TypeAlias = Literal["bins", "msra", "aligned"]


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    sampling: Sampling = "bins",
    samples_per_bin: int = 4,
    backend: backends.Backend = "auto",
) -> Tensor:
    """RoI pooling whose bins are moved by offsets (Dai et al. 2017, Equations 5-6).

    Each box is divided into ph x pw bins of equal size, and every bin, moved by its offset, gives
    the mean of the map over it. `offset=None` is plain (average) RoI pooling under the same rule.

    Args:
        input: [N, C, H, W], in float64, float32, bfloat16 or float16.
        boxes: [R, 5], the index of an image in the batch and x1, y1, x2, y2 in pixels of the
            image; or a list with the boxes [r, 4] of each image. No gradient goes to boxes.
        offset: [R, 2*G, ph, pw], the shift (x, y) of each bin, normalised: in pixels of `input`
            it is `gamma * offset * (width, height)` of the box there. Channel 2*g is x, the next
            one y, for the g-th of G equal runs of output channels. Under "msra" the offset may
            have another number of parts than there are bins; bin i of ph has then that of part
            `i * parts // ph`. None shifts nothing.
        output_size: (ph, pw), or one int for both.
        spatial_scale: size of the map relative to the image, such as 1/16.
        gamma: the factor of all offsets.
        sampling: what a box covers and where its bins are read. On each axis, with k bins,
            "bins": the paper's. x1 and x2 are scaled and rounded, and are the first and the last
            pixel: width = max(x2 - x1 + 1, 1). Bin i holds the pixels
            floor(i * width / k) <= p < ceil((i + 1) * width / k); each of them is read at
            x1 + p + shift, bilinearly, zero outside the map; the mean is over all of them.
            "msra": the authors' kernel. x1 and x2 are rounded, then x1 = x1 * scale - 0.5 and
            x2 = (x2 + 1) * scale - 0.5, width = max(x2 - x1, 0.1). A bin has samples at its start
            + s / samples_per_bin of its length, s = 0, 1, ...; those outside
            [-0.5, W - 0.5] are skipped, the rest is read within [0, W - 1]; the mean is over
            these, or zero if there are none.
            "aligned": RoIAlign's. Nothing is rounded; x1 = x1 * scale - 0.5, x2 likewise,
            width = x2 - x1. A bin has samples at (s + 0.5) / samples_per_bin of its length;
            outside [-1, W] they are zero, the rest is read within [0, W - 1]; the mean is over
            all of them. Without offsets this is `torchvision.ops.roi_align(aligned=True)`.
            Halves are rounded away from zero.
        samples_per_bin: samples on each axis of a bin, under "msra" and "aligned". 0, under
            "aligned" only: as many as the bin's length, rounded up.
        backend: "auto" takes the fast kernel for the device of `input`, and where none can run
            the reference, with one warning that says why. "reference", "cpu" and "triton" force
            one. Only "reference" can be differentiated twice.

    Returns:
        [R, C, ph, pw] of `input`'s dtype, contiguous.

    `boxes` are float32, float64 or of the dtype of `input` (half precision holds few whole
    numbers: better float32); `offset` has the dtype of `input`, or float32 beside a
    half-precision input. Under autocast `input` is cast to the autocast dtype, `boxes` and
    `offset` to float32.

    A NaN in an offset gives NaN in the bin that it moves, and nowhere else; infinite and huge
    offsets read outside. A box with a corner that is infinite or not a number gives NaN. At whole
    positions, where the bilinear read has a kink, the derivative is the one from the right.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if a shape, device, size or name is wrong, or a box belongs to no image of the
            batch (where the values can be seen without waiting for a device); the message says
            which.
        RuntimeError: if a backend is named that cannot run here.
    """
    return _pool(
        *(input, boxes, offset, output_size, spatial_scale, gamma, sampling, samples_per_bin),
        position_sensitive=False,
        backend=backend,
    )


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    sampling: Sampling = "bins",
    samples_per_bin: int = 4,
    backend: backends.Backend = "auto",
) -> Tensor:
    """Position-sensitive RoI pooling whose bins are moved by offsets (Dai et al. 2017, 2.2).

    As `deform_roi_pool`, where all is said, but that every bin has maps of its own: bin (i, j) of
    output channel c is read from input channel (c*ph + i)*pw + j.

    Args:
        input: [N, C*ph*pw, H, W].
        boxes, output_size, spatial_scale, gamma, sampling, samples_per_bin, backend: as there.
        offset: [R, 2*G, ph, pw], as there; G divides C. With G = C each class has bins of its own.

    Returns:
        [R, C, ph, pw] of `input`'s dtype, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as there.
    """
    return _pool(
        *(input, boxes, offset, output_size, spatial_scale, gamma, sampling, samples_per_bin),
        position_sensitive=True,
        backend=backend,
    )


def _pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    gamma: float,
    sampling: str,
    samples_per_bin: int,
    *,
    position_sensitive: bool,
    backend: backends.Backend,
) -> Tensor:
    size = pair("output_size", output_size)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: want a tensor, got {type(input).__name__}")
    if not isinstance(boxes, Tensor):
        boxes = join_boxes(boxes, input)
    device = input.device.type
    run = (
        library.reference_roi_pool
        if backends.resolve(backend, device) == "reference"
        else library.roi_pool
    )
    rule = size, spatial_scale, gamma, sampling, samples_per_bin, position_sensitive
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = library.autocast_roi_pool(device, input, boxes, offset)
        roi_pool_shape(*tensors, *rule)
        # The casts are done; the reference must not have its own arithmetic cast as well.
        with torch.autocast(device, enabled=False):
            return run(*tensors, *rule)
    roi_pool_shape(input, boxes, offset, *rule)
    return run(input, boxes, offset, *rule)


def join_boxes(boxes: Sequence[Tensor], input: Tensor) -> Tensor:
    """One tensor [R, 5] of the boxes [r, 4] of each image."""
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"boxes: want a tensor or a list of them, got {type(boxes).__name__}")
    if input.dim() == 4 and len(boxes) > input.shape[0]:
        raise ValueError(
            f"boxes: want at most one tensor for each of the {input.shape[0]} images, "
            f"got {len(boxes)}"
        )
    rows = []
    for image, some in enumerate(boxes):
        if not isinstance(some, Tensor):
            raise TypeError(f"boxes: want tensors, got {type(some).__name__} at {image}")
        if some.dim() != 2 or some.shape[1] != 4:
            raise ValueError(f"boxes: want [r, 4] for each image, got {list(some.shape)}")
        if some.dtype != boxes[0].dtype or some.device != boxes[0].device:
            raise ValueError(
                f"boxes: want all on one device and in one dtype, got {some.dtype} on "
                f"{some.device} at {image} and {boxes[0].dtype} on {boxes[0].device} before"
            )
        if some.dtype in (torch.bfloat16, torch.float16):
            some = some.float()  # which can count the images of any batch
        rows.append(torch.cat([some.new_full((some.shape[0], 1), image), some], dim=1))
    if not rows:
        return input.new_zeros(0, 5)
    return torch.cat(rows)
