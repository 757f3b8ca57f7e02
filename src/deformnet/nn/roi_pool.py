"""Deformable and deformable position-sensitive RoI pooling as layers that learn their offsets."""

from collections.abc import Callable, Sequence
from typing import Never

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from deformnet.nn.deform_conv import refuse_script
from deformnet.nn.graphs import call_module
from deformnet.nn.offsets import OffsetConv2d, OffsetLinear, non_negative
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool
from deformnet.ops._arguments import IntOrPair, integer, number, pair, positive
from deformnet.ops.backends import autocast_enabled
from deformnet.ops.roi_pool.checks import Sampling

Boxes = Tensor | Sequence[Tensor]


class _RoIPool(nn.Module):
    """Options of both layers; see `DeformRoIPool2d`."""

    def __init__(
        self,
        output_size: IntOrPair,
        spatial_scale: float,
        gamma: float,
        sampling: Sampling,
        samples_per_bin: int,
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size)
        if min(self.output_size) < 1:
            raise ValueError(f"expected output_size to be at least 1, but got {output_size}")
        self.bins = self.output_size[0] * self.output_size[1]
        self.spatial_scale = float(number("spatial_scale", spatial_scale))
        self.gamma = float(number("gamma", gamma))
        self.sampling: Sampling = sampling
        self.samples_per_bin = integer("samples_per_bin", samples_per_bin)

    def _pool(
        self, operator: Callable[..., Tensor], input: Tensor, boxes: Boxes, offset: Tensor | None
    ) -> Tensor:
        geometry = self.output_size, self.spatial_scale, self.gamma
        options = {"sampling": self.sampling, "samples_per_bin": self.samples_per_bin}
        return operator(input, boxes, offset, *geometry, **options)

    def __prepare_scriptable__(self) -> Never:
        refuse_script(self)


class DeformRoIPool2d(_RoIPool):
    """Deformable RoI pooling that computes its offsets from the pooled features.

    Dai et al. 2017, section 2.2 and Figure 3: the boxes are pooled without offsets, the child
    `fc_offset`, a fully connected layer, predicts an offset for each bin, and the boxes are pooled
    again with these offsets. `fc_offset` is initialized to zero, so a new layer computes RoI
    pooling without offsets by the same sampling rule.

    Args:
        channels: Number of input channels C.
        output_size: Number of bins in height and width, ph and pw.
        spatial_scale: Scale from box coordinates to input coordinates.
        gamma: Scale of the offsets, which are in units of the box width and height.
        beta: Learning rate factor of `fc_offset` in `parameter_groups` (section 2.3).
        sampling: Sampling rule, "bins", "msra" or "aligned"; see `deform_roi_pool`.
        samples_per_bin: See `deform_roi_pool`; unused by "bins".

    Shape:
        Input [N, C, H, W]; boxes [R, 5] (batch index, x1, y1, x2, y2), or a list of N tensors
        [r, 4]; output [R, C, ph, pw].

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If `channels`, `output_size` or `beta` is out of range, or where
            `deform_roi_pool` does.
    """

    def __init__(
        self,
        channels: int,
        output_size: IntOrPair,
        spatial_scale: float = 1.0,
        *,
        gamma: float = 0.1,
        beta: float = 0.01,
        sampling: Sampling = "bins",
        samples_per_bin: int = 4,
    ) -> None:
        super().__init__(output_size, spatial_scale, gamma, sampling, samples_per_bin)
        self.channels = positive("channels", channels)
        beta = non_negative("beta", beta)
        self.fc_offset = OffsetLinear(self.channels * self.bins, 2 * self.bins, lr_scale=beta)

    def init_weights(self) -> None:
        """Set `fc_offset` to zero. mmengine calls this after initializing other layers."""
        self.fc_offset.reset_parameters()

    def forward(self, input: Tensor, boxes: Boxes) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input, boxes)
        return self._pool(deform_roi_pool, input, boxes, self.offsets(input, boxes))

    def offsets(self, input: Tensor, boxes: Boxes) -> Tensor:
        """Offsets [R, 2, ph, pw] of the bins, (x, y), before scaling by gamma."""
        _check_channels("input", input, self.channels)
        pooled = self._pool(deform_roi_pool, input, boxes, None)
        return self.fc_offset(pooled.flatten(1)).unflatten(1, (2, *self.output_size))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.output_size}, {self.spatial_scale:g}, gamma={self.gamma}, "
            f"sampling={self.sampling!r}"
        )


class DeformPSRoIPool2d(_RoIPool):
    """Deformable position-sensitive RoI pooling that computes its offsets from features.

    Dai et al. 2017, section 2.2 and Figure 4: the child `conv_offset`, a 1x1 convolution, predicts
    offset fields from the features that the maps were predicted from. Position-sensitive pooling of
    these fields, without offsets, yields the offset of each bin. `conv_offset` is initialized to
    zero, so a new layer computes position-sensitive RoI pooling without offsets by the same
    sampling rule.

    Args:
        in_channels: Number of channels of the features.
        output_size: Number of bins in height and width, ph and pw.
        spatial_scale, gamma, sampling, samples_per_bin: See `DeformRoIPool2d`.
        offset_groups: Number of offset groups G. The output channels are divided into G equal
            groups, each with its own offsets. R-FCN has class-agnostic offsets with 1, and
            class-aware ones with the number of output channels.

    Shape:
        Maps [N, C*ph*pw, H, W], whose channel (c*ph + i)*pw + j feeds bin (i, j) of output channel
        c; features [N, in_channels, H, W]; boxes [R, 5] (batch index, x1, y1, x2, y2), or a list of
        N tensors [r, 4]; output [R, C, ph, pw].

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If `output_size` or a number of channels is out of range, or where
            `deform_ps_roi_pool` does.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: IntOrPair,
        spatial_scale: float = 1.0,
        *,
        offset_groups: int = 1,
        gamma: float = 0.1,
        sampling: Sampling = "bins",
        samples_per_bin: int = 4,
    ) -> None:
        super().__init__(output_size, spatial_scale, gamma, sampling, samples_per_bin)
        self.in_channels = positive("in_channels", in_channels)
        self.offset_groups = positive("offset_groups", offset_groups)
        self.conv_offset = OffsetConv2d(self.in_channels, 2 * self.offset_groups * self.bins, 1)

    def init_weights(self) -> None:
        """Set `conv_offset` to zero. mmengine calls this after initializing other layers."""
        self.conv_offset.reset_parameters()

    def forward(self, maps: Tensor, features: Tensor, boxes: Boxes) -> Tensor:
        if isinstance(maps, Proxy):
            return call_module(self, maps, features, boxes)
        return self._pool(deform_ps_roi_pool, maps, boxes, self.offsets(features, boxes))

    def offsets(self, features: Tensor, boxes: Boxes) -> Tensor:
        """Offsets [R, 2*G, ph, pw] of the bins, (x, y), before scaling by gamma."""
        _check_channels("features", features, self.in_channels)
        fields = self.conv_offset(features)
        if isinstance(boxes, Tensor):
            boxes = _to_float(boxes)
        else:
            boxes = [_to_float(box) for box in boxes]
        device = fields.device.type
        if autocast_enabled(device):  # pooling would round the offsets to half precision
            with torch.autocast(device, enabled=False):
                return self._pool(deform_ps_roi_pool, fields, boxes, None)
        return self._pool(deform_ps_roi_pool, fields, boxes, None)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.output_size}, {self.spatial_scale:g}, "
            f"offset_groups={self.offset_groups}, gamma={self.gamma}, sampling={self.sampling!r}"
        )


def _check_channels(name: str, input: Tensor, channels: int) -> None:
    if input.ndim != 4 or input.shape[1] != channels:
        raise ValueError(
            f"expected {name} to be [N, {channels}, H, W], but got {list(input.shape)}"
        )


def _to_float(boxes: Tensor) -> Tensor:
    """Boxes in a dtype that pooling accepts with fields in float32 or better."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
