"""Drop-in replacement for the deformable convolution and deformable RoI pooling of `mmcv.ops`.

Signatures, initial weights and state-dict keys are mmcv's, and so are these conventions:

- The functions compute in the dtype of the offset, even under autocast.
- The mask is a plain sigmoid, initially 0.5.
- RoI pooling uses the sampling rule "aligned".

`im2col_step` has no effect: any batch size works. Inputs smaller than the kernel are not padded;
mmcv pads them, with the same output. At a position of exactly -1, the derivative is the one from
the right, as in torchvision; mmcv's is 0. The layers that predict their offsets do so in float32
even under autocast.
"""

import math
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor, nn

from deformnet import ops
from deformnet.compat._operators import grouped_deform_conv2d
from deformnet.nn.deform_conv import DeformConv2d as _DeformConv2d
from deformnet.nn.given_offsets import GivenOffsetsConv2d
from deformnet.nn.graphs import one_node
from deformnet.nn.offsets import OffsetLinear
from deformnet.ops._arguments import IntOrPair, Pair, integer, number, pair, positive
from deformnet.ops.backends import autocast_enabled

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "deform_conv2d",
    "deform_roi_pool",
    "modulated_deform_conv2d",
]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Deformable convolution without bias; shapes as in `deformnet.ops.deform_conv2d`."""
    _refuse_bias(bias)
    return _in_dtype_of_offset(
        input, offset, weight, None, stride, padding, dilation, None, groups, deform_groups
    )


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Modulated deformable convolution; shapes as in `deformnet.ops.deform_conv2d`."""
    return _in_dtype_of_offset(
        input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups
    )


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: IntOrPair,
    spatial_scale: SupportsFloat = 1.0,
    sampling_ratio: SupportsIndex = 0,
    gamma: SupportsFloat = 0.1,
) -> Tensor:
    """Deformable RoI pooling; shapes as in `deformnet.ops.deform_roi_pool`.

    `sampling_ratio` is the number of samples along each axis of a bin; 0 uses the length of the
    bin, rounded up. An empty `offset` is the same as None.
    """
    if offset is not None and offset.numel() == 0 and (offset.ndim != 4 or len(rois) > 0):
        offset = None  # without boxes, it has a gradient
    samples = integer("sampling_ratio", sampling_ratio)
    geometry = (output_size, spatial_scale, gamma)
    return ops.deform_roi_pool(
        input, rois, offset, *geometry, sampling="aligned", samples_per_bin=samples
    )


class DeformConv2d(GivenOffsetsConv2d):
    """Deformable convolution that takes offsets: `layer(x, offset)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _refuse_bias(bias)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
        )
        self.deform_groups = positive("deform_groups", deform_groups)
        self.im2col_step = im2col_step

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    @one_node
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, offset: Tensor
    ) -> Tensor:
        geometry = _geometry(self)
        return deform_conv2d(x, offset, self.weight, *geometry, self.groups, self.deform_groups)


class DeformConv2dPack(_DeformConv2d):
    """Deformable convolution that predicts its offsets: `layer(x)`."""

    _keeps_options = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _refuse_bias(bias)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            offset_groups=deform_groups,
        )
        self.deform_groups = self.offset_groups
        self.im2col_step = im2col_step

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def init_offset(self) -> None:
        """Set the weights that predict offsets to zero."""
        self.conv_offset.reset_parameters()


class ModulatedDeformConv2d(GivenOffsetsConv2d):
    """Modulated deformable convolution that takes offsets: `layer(x, offset, mask)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        geometry = (stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, bool(bias))
        self.deform_groups = positive("deform_groups", deform_groups)

    def reset_parameters(self) -> None:
        reset_uniformly(self)

    def init_weights(self) -> None:
        """Reinitialize the weights. mmengine calls this after it has initialized others."""
        self.reset_parameters()

    @one_node
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        groups = (self.groups, self.deform_groups)
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, *_geometry(self), *groups
        )


class ModulatedDeformConv2dPack(_DeformConv2d):
    """Modulated deformable convolution that predicts its offsets and masks: `layer(x)`."""

    _keeps_options = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bool(bias),
            offset_groups=deform_groups,
            modulated=True,
            mask_scale=1.0,
        )
        self.deform_groups = self.offset_groups

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_uniformly(self)

    def init_weights(self) -> None:
        """Reinitialize all weights. mmengine calls this after it has initialized others."""
        self.reset_parameters()


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling that takes offsets: `layer(input, rois, offset=None)`."""

    def __init__(
        self,
        output_size: IntOrPair,
        spatial_scale: SupportsFloat = 1.0,
        sampling_ratio: SupportsIndex = 0,
        gamma: SupportsFloat = 0.1,
    ) -> None:
        super().__init__()
        self.output_size = pair("output_size", output_size)
        self.spatial_scale = float(number("spatial_scale", spatial_scale))
        self.sampling_ratio = integer("sampling_ratio", sampling_ratio)
        self.gamma = float(number("gamma", gamma))

    @one_node
    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        numbers = (self.spatial_scale, self.sampling_ratio, self.gamma)
        return deform_roi_pool(input, rois, offset, self.output_size, *numbers)


class DeformRoIPoolPack(DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets: `layer(input, rois)`."""

    def __init__(
        self,
        output_size: IntOrPair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: SupportsFloat = 1.0,
        sampling_ratio: SupportsIndex = 0,
        gamma: SupportsFloat = 0.1,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = positive("output_channels", output_channels)
        self.deform_fc_channels = positive("deform_fc_channels", deform_fc_channels)
        bins = self.output_size[0] * self.output_size[1]
        inputs = bins * self.output_channels
        self.offset_fc = fully_connected(inputs, self.deform_fc_channels, 2 * bins, layers=3)

    @one_node
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, rois: Tensor
    ) -> Tensor:
        return super().forward(input, rois, self._offset(super().forward(input, rois)))

    def _offset(self, pooled: Tensor) -> Tensor:
        return self.offset_fc(pooled.flatten(1)).unflatten(1, (2, *self.output_size))


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Deformable RoI pooling that predicts its offsets and masks: `layer(input, rois)`."""

    def __init__(
        self,
        output_size: IntOrPair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: SupportsFloat = 1.0,
        sampling_ratio: SupportsIndex = 0,
        gamma: SupportsFloat = 0.1,
    ) -> None:
        numbers = (spatial_scale, sampling_ratio, gamma)
        super().__init__(output_size, output_channels, deform_fc_channels, *numbers)
        bins = self.output_size[0] * self.output_size[1]
        inputs = bins * self.output_channels
        self.mask_fc = fully_connected(inputs, self.deform_fc_channels, bins, layers=2)
        self.mask_fc.append(nn.Sigmoid())

    @one_node
    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        pooled = DeformRoIPool.forward(self, input, rois)
        mask = self.mask_fc(pooled.flatten(1)).unflatten(1, (1, *self.output_size))
        pooled = DeformRoIPool.forward(self, input, rois, self._offset(pooled))
        return pooled * mask.to(pooled.dtype)  # predicted in float32


def fully_connected(inputs: int, hidden: int, outputs: int, *, layers: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them; the last one is initialized to zero."""
    hidden_layers = [nn.Linear(inputs, hidden), nn.ReLU(inplace=True)]
    for _ in range(layers - 2):
        hidden_layers += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden_layers, OffsetLinear(hidden, outputs))


def reset_uniformly(layer: nn.Conv2d) -> None:
    """Initialize a layer as mmcv (if modulated) and DCNv2 do: uniform weights, zero bias."""
    bound = 1 / math.sqrt(layer.in_channels * layer.weight.shape[2:].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _in_dtype_of_offset(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    dilation: IntOrPair,
    mask: Tensor | None,
    groups: int,
    deform_groups: int,
) -> Tensor:
    tensors = [None if it is None else it.to(offset.dtype) for it in (input, weight, bias, mask)]
    input, weight, bias, mask = tensors  # pyright: ignore[reportAssignmentType]
    call = (input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups)
    device = offset.device.type
    if not autocast_enabled(device):
        return grouped_deform_conv2d(*call)
    with torch.autocast(device, enabled=False):
        return grouped_deform_conv2d(*call)


def _geometry(layer: nn.Conv2d) -> tuple[Pair, Pair, Pair]:
    stride, dilation = pair("stride", layer.stride), pair("dilation", layer.dilation)
    return stride, pair("padding", layer.padding), dilation


def _refuse_bias(bias: bool) -> None:
    if bias:
        raise ValueError("expected bias to be False, as in mmcv's DeformConv2d, but got True")
