"""Drop-in replacement for the module `dcn_v2` of CharlesShang/DCNv2 and its copies.

Signatures, initial weights and state-dict keys are DCNv2's, and so are these conventions:

- The mask is a plain sigmoid, initially 0.5.
- RoI pooling uses the sampling rule "msra".

At a position of exactly -1, the derivative is the one from the right, as in torchvision; DCNv2's is
0. DCNv2's `DCN` ignores the dilation when it predicts the offsets, so it fails unless the dilation
is 1; here it works.
"""

from torch import Tensor, nn

from deformnet import ops
from deformnet.compat._operators import grouped_deform_conv2d
from deformnet.compat.mmcv import fully_connected, reset_uniformly
from deformnet.nn.deform_conv import DeformConv2d
from deformnet.nn.given_offsets import GivenOffsetsConv2d
from deformnet.nn.graphs import one_node
from deformnet.nn.offsets import OffsetConv2d
from deformnet.ops._arguments import IntOrPair, integer, number, positive

__all__ = ["DCN", "DCNPooling", "DCNv2", "DCNv2Pooling", "dcn_v2_conv", "dcn_v2_pooling"]


def dcn_v2_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    dilation: IntOrPair,
    deformable_groups: int,
) -> Tensor:
    """Modulated deformable convolution; shapes as in `deformnet.ops.deform_conv2d`."""
    geometry = (stride, padding, dilation)
    return grouped_deform_conv2d(input, offset, weight, bias, *geometry, mask, 1, deformable_groups)


def dcn_v2_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    spatial_scale: float,
    pooled_size: int,
    output_dim: int,
    no_trans: bool,
    group_size: int = 1,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.0,
) -> Tensor:
    """Deformable RoI pooling, position-sensitive if `group_size` is `pooled_size`.

    Args:
        input: [N, output_dim * group_size**2, H, W].
        rois: [R, 5].
        offset: [R, 2*G, part_size, part_size], (x, y); unused if `no_trans`.
        spatial_scale: See `deformnet.ops.deform_roi_pool`.
        pooled_size: Number of bins along each axis.
        output_dim: Number of output channels C.
        no_trans: Whether to pool without offsets.
        group_size: 1, or `pooled_size`.
        part_size: Number of offsets along each axis; None uses `pooled_size`.
        sample_per_part: Number of samples along each axis of a bin.
        trans_std: gamma, the scale of the offsets.

    Returns:
        [R, C, pooled_size, pooled_size].

    Raises:
        ValueError: If a size does not match the shapes, or `group_size` is neither 1 nor
            `pooled_size`; see also `deformnet.ops.deform_roi_pool`.
    """
    if group_size not in (1, pooled_size):
        raise ValueError(
            f"expected group_size to be 1 or pooled_size, {pooled_size}, but got {group_size}"
        )
    channels = output_dim * group_size**2
    if input.ndim == 4 and input.shape[1] != channels:
        raise ValueError(f"expected input to have {channels} channels, but got {input.shape[1]}")
    parts = pooled_size if part_size is None else part_size
    if not no_trans and offset.shape[2:] != (parts, parts):
        raise ValueError(
            f"expected offset to be [R, 2*G, {parts}, {parts}], but got {list(offset.shape)}"
        )
    pool = ops.deform_roi_pool if group_size == 1 else ops.deform_ps_roi_pool
    return pool(
        input,
        rois,
        None if no_trans else offset,
        pooled_size,
        spatial_scale,
        trans_std,
        sampling="msra",
        samples_per_bin=sample_per_part,
    )


class DCNv2(GivenOffsetsConv2d):
    """Modulated deformable convolution that takes offsets: `layer(input, offset, mask)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair,
        padding: IntOrPair,
        dilation: IntOrPair = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation)
        self.deformable_groups = positive("deformable_groups", deformable_groups)

    def reset_parameters(self) -> None:
        reset_uniformly(self)

    @one_node
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        return super().forward(input, offset, mask)


class DCN(DeformConv2d):
    """Modulated deformable convolution that predicts its offsets and masks: `layer(input)`."""

    conv_offset_mask: OffsetConv2d
    _keeps_options = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair,
        padding: IntOrPair,
        dilation: IntOrPair = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            offset_groups=deformable_groups,
            modulated=True,
            mask_scale=1.0,
        )
        self.deformable_groups = self.offset_groups
        self.conv_offset_mask = self._modules.pop("conv_offset")  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def conv_offset(self) -> OffsetConv2d:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`conv_offset_mask` under its name in `DeformConv2d`."""
        return self.conv_offset_mask

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_uniformly(self)

    def init_offset(self) -> None:
        """Set the weights that predict offsets and masks to zero."""
        self.conv_offset.reset_parameters()


class DCNv2Pooling(nn.Module):
    """Deformable RoI pooling that takes offsets: `layer(input, rois, offset)`."""

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.spatial_scale = float(number("spatial_scale", spatial_scale))
        self.pooled_size = positive("pooled_size", pooled_size)
        self.output_dim = positive("output_dim", output_dim)
        self.no_trans = bool(no_trans)
        self.group_size = positive("group_size", group_size)
        self.part_size = self.pooled_size if part_size is None else positive("part_size", part_size)
        self.sample_per_part = integer("sample_per_part", sample_per_part)
        self.trans_std = float(number("trans_std", trans_std))

    @one_node
    def forward(self, input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
        return self._pool(input, rois, offset, self.no_trans)

    def _pool(self, input: Tensor, rois: Tensor, offset: Tensor, no_trans: bool) -> Tensor:
        sizes = (self.group_size, self.part_size, self.sample_per_part, self.trans_std)
        bins = (self.spatial_scale, self.pooled_size, self.output_dim)
        return dcn_v2_pooling(input, rois, offset, *bins, no_trans, *sizes)


class DCNPooling(DCNv2Pooling):
    """Deformable RoI pooling that predicts its offsets and masks: `layer(input, rois)`."""

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
        deform_fc_dim: int = 1024,
    ) -> None:
        sizes = (group_size, part_size, sample_per_part, trans_std)
        super().__init__(spatial_scale, pooled_size, output_dim, no_trans, *sizes)
        self.deform_fc_dim = positive("deform_fc_dim", deform_fc_dim)
        if not self.no_trans:
            bins = self.pooled_size**2
            inputs = bins * self.output_dim
            self.offset_mask_fc = fully_connected(inputs, self.deform_fc_dim, 3 * bins, layers=3)

    @one_node
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, rois: Tensor
    ) -> Tensor:
        pooled = self._pool(input, rois, input, no_trans=True)
        if self.no_trans:
            return pooled
        predicted = self.offset_mask_fc(pooled.flatten(1))
        bins = (self.pooled_size, self.pooled_size)
        offset, mask = predicted.unflatten(1, (3, *bins)).split((2, 1), dim=1)
        mask = mask.sigmoid().to(pooled.dtype)  # predicted in float32
        return self._pool(input, rois, offset, no_trans=False) * mask
