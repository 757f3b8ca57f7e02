"""Deformable RoI pooling, plain and position-sensitive, as layers that learn their own offsets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deformnet.nn.offsets import OffsetConv2d, OffsetLinear, autocasts
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool
from deformnet.ops.roi_pool.api import Sampling


class DeformRoIPool2d(nn.Module):
    """RoI pooling whose bins are moved by offsets that it computes from what it pools.

    Dai et al. 2017, section 2.2 and Figure 3: the boxes are pooled without offsets, the child
    `fc_offset`, a fully connected layer, makes an offset for each bin of the result, and the boxes
    are pooled again with them. It starts at zero, so a new layer is plain RoI pooling by the same
    sampling rule.

    Args:
        channels: channels C of the input.
        output_size: bins in height and width, ph and pw.
        spatial_scale: units of the input for a pixel of the boxes.
        gamma: scale of the offsets, which count in widths and heights of the box.
        beta: factor on the learning rate of `fc_offset`, for `parameter_groups` (section 2.3).
        sampling: how a bin is read, "bins", "msra" or "aligned"; see `deform_roi_pool`.
        samples_per_bin: as in `deform_roi_pool`; "bins" takes no notice of it.

    Shape:
        input [N, C, H, W]; boxes [R, 5] (batch index, x1, y1, x2, y2), or a list of N tensors
        [r, 4]; output [R, C, ph, pw].

    Raises:
        ValueError: if `channels`, a size or `beta` is out of its range, and where
            `deform_roi_pool` does.
    """

    def __init__(
        self,
        channels: int,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        *,
        gamma: float = 0.1,
        beta: float = 0.01,
        sampling: Sampling = "bins",
        samples_per_bin: int = 4,
    ) -> None:
        super().__init__()
        self.output_size = _bins(output_size)
        self.channels = _at_least_1("channels", channels)
        self.spatial_scale = spatial_scale
        self.gamma = gamma
        self.sampling: Sampling = sampling
        self.samples_per_bin = samples_per_bin
        if not beta >= 0:
            raise ValueError(f"beta: wanted a number of at least 0, got {beta}")
        bins = self.output_size[0] * self.output_size[1]
        self.fc_offset = OffsetLinear(channels * bins, 2 * bins, lr_scale=beta)

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        return self._pool(input, boxes, self.offsets(input, boxes))

    def offsets(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """The offsets [R, 2, ph, pw] of the bins, (x, y), before their scaling by gamma."""
        if input.ndim != 4 or input.shape[1] != self.channels:
            raise ValueError(f"input: wanted [N, {self.channels}, H, W], got {list(input.shape)}")
        pooled = self._pool(input, boxes, None)
        return self.fc_offset(pooled.flatten(1)).unflatten(1, (2, *self.output_size))

    def _pool(
        self, input: Tensor, boxes: Tensor | Sequence[Tensor], offset: Tensor | None
    ) -> Tensor:
        return deform_roi_pool(
            input,
            boxes,
            offset,
            self.output_size,
            self.spatial_scale,
            self.gamma,
            sampling=self.sampling,
            samples_per_bin=self.samples_per_bin,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.output_size}, {self.spatial_scale:g}, gamma={self.gamma}, "
            f"sampling={self.sampling!r}"
        )


class DeformPSRoIPool2d(nn.Module):
    """Position-sensitive RoI pooling whose bins are moved by offsets that it computes.

    Dai et al. 2017, section 2.2 and Figure 4: the child `conv_offset`, a 1x1 convolution, makes
    fields of offsets from the features that the maps were made from; a field's position-sensitive
    mean in a bin, without offsets, is the bin's offset in the maps. It starts at zero, so a new
    layer is plain position-sensitive RoI pooling by the same sampling rule.

    Args:
        in_channels: channels of the features that the offsets come from.
        output_size: bins in height and width, ph and pw.
        spatial_scale: units of the maps for a pixel of the boxes.
        offset_groups: G; each of G equal runs of output channels has its own offsets. In R-FCN,
            1 is class-agnostic, and as many as there are output channels class-aware.
        gamma: scale of the offsets, which count in widths and heights of the box.
        sampling: how a bin is read, "bins", "msra" or "aligned"; see `deform_ps_roi_pool`.
        samples_per_bin: as in `deform_ps_roi_pool`; "bins" takes no notice of it.

    Shape:
        maps [N, C*ph*pw, H, W], of which channel (c*ph + i)*pw + j feeds bin (i, j) of output
        channel c; features [N, in_channels, H, W]; boxes [R, 5] (batch index, x1, y1, x2, y2), or
        a list of N tensors [r, 4]; output [R, C, ph, pw].

    Raises:
        ValueError: if a size or a number of channels is out of its range, and where
            `deform_ps_roi_pool` does.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        *,
        offset_groups: int = 1,
        gamma: float = 0.1,
        sampling: Sampling = "bins",
        samples_per_bin: int = 4,
    ) -> None:
        super().__init__()
        self.output_size = _bins(output_size)
        self.in_channels = _at_least_1("in_channels", in_channels)
        self.offset_groups = _at_least_1("offset_groups", offset_groups)
        self.spatial_scale = spatial_scale
        self.gamma = gamma
        self.sampling: Sampling = sampling
        self.samples_per_bin = samples_per_bin
        bins = self.output_size[0] * self.output_size[1]
        self.conv_offset = OffsetConv2d(in_channels, 2 * offset_groups * bins, 1)

    def forward(self, maps: Tensor, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        return self._pool(maps, boxes, self.offsets(features, boxes))

    def offsets(self, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """The offsets [R, 2*G, ph, pw] of the bins, (x, y), before their scaling by gamma."""
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(
                f"features: wanted [N, {self.in_channels}, H, W], got {list(features.shape)}"
            )
        fields, boxes = self.conv_offset(features), _precise(boxes)
        device = fields.device.type
        if autocasts(device):  # the pooling, too, would be done in half precision
            with torch.autocast(device, enabled=False):
                return self._pool(fields, boxes, None)
        return self._pool(fields, boxes, None)

    def _pool(
        self, maps: Tensor, boxes: Tensor | Sequence[Tensor], offset: Tensor | None
    ) -> Tensor:
        return deform_ps_roi_pool(
            maps,
            boxes,
            offset,
            self.output_size,
            self.spatial_scale,
            self.gamma,
            sampling=self.sampling,
            samples_per_bin=self.samples_per_bin,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.output_size}, {self.spatial_scale:g}, "
            f"offset_groups={self.offset_groups}, gamma={self.gamma}, sampling={self.sampling!r}"
        )


def _precise(boxes: Any) -> Any:
    """Boxes, or a list of them, as the operator takes them beside fields in float32 or better."""
    if isinstance(boxes, (list, tuple)):
        return [_precise(some) for some in boxes]
    half = isinstance(boxes, Tensor) and boxes.dtype in (torch.float16, torch.bfloat16)
    return boxes.float() if half else boxes


def _bins(output_size: int | tuple[int, int]) -> tuple[int, int]:
    bins = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(bins) != 2 or min(bins) < 1:
        raise ValueError(f"output_size: wanted one or two sizes of at least 1, got {output_size}")
    return bins


def _at_least_1(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name}: wanted at least 1, got {number}")
    return number
