"""Published networks that call torchvision's deformable convolution.

Each is reimplemented from its paper, with the channel counts, the order of operations and the
operator call of the code base that it names. None of them uses deformnet.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation, DeformConv2d, deform_conv2d


class PCDAlignment(nn.Module):
    """Pyramid, cascading and deformable alignment of EDVR (Wang et al. 2019), as in BasicSR.

    Aligns the features of a neighboring frame with those of the reference frame at three levels,
    from coarse to fine.
    """

    def __init__(self, channels: int, offset_groups: int) -> None:
        super().__init__()
        c = channels
        self.first = nn.ModuleList(_conv3x3(2 * c, c) for _ in range(3))
        self.second = nn.ModuleList(_conv3x3(c if level == 2 else 2 * c, c) for level in range(3))
        self.third = nn.ModuleList(_conv3x3(c, c) for _ in range(2))
        self.align = nn.ModuleList(_OffsetsFromFeatures(c, offset_groups) for _ in range(3))
        self.merge = nn.ModuleList(_conv3x3(2 * c, c) for _ in range(2))
        self.cascade = nn.Sequential(_conv3x3(2 * c, c), _leaky(), _conv3x3(c, c), _leaky())
        self.cascade_align = _OffsetsFromFeatures(c, offset_groups)

    def forward(self, *maps: Tensor) -> Tensor:
        """Three maps of the neighboring frame, then three of the reference frame."""
        neighbor, reference = maps[:3], maps[3:]
        hints, aligned = self._level(2, neighbor, reference, None)
        for level in (1, 0):
            coarser = 2 * _upsampled(hints), _upsampled(aligned)
            hints, aligned = self._level(level, neighbor, reference, coarser)
        hints = self.cascade(torch.cat((aligned, reference[0]), 1))
        return _leaky()(self.cascade_align(aligned, hints))

    def _level(
        self,
        level: int,
        neighbor: Sequence[Tensor],
        reference: Sequence[Tensor],
        coarser: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Features for the offsets, and aligned features."""
        act, both = _leaky(), torch.cat((neighbor[level], reference[level]), 1)
        hints = act(self.first[level](both))
        if coarser is None:
            hints = act(self.second[level](hints))
            return hints, act(self.align[level](neighbor[level], hints))
        hints = act(self.second[level](torch.cat((hints, coarser[0]), 1)))
        hints = act(self.third[level](hints))
        aligned = self.align[level](neighbor[level], hints)
        aligned = self.merge[level](torch.cat((aligned, coarser[1]), 1))
        return hints, aligned if level == 0 else act(aligned)


class _OffsetsFromFeatures(nn.Module):
    """BasicSR's DCNv2Pack: modulated, with offsets predicted from other features."""

    def __init__(self, channels: int, offset_groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = _conv3x3(channels, 27 * offset_groups)

    def forward(self, x: Tensor, hints: Tensor) -> Tensor:
        first, second, mask = self.conv_offset(hints).chunk(3, dim=1)
        offset, geometry = torch.cat((first, second), dim=1), ((1, 1), (1, 1), (1, 1))
        return deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask.sigmoid())


class SecondOrderAlignment(nn.Module):
    """Flow-guided deformable alignment of BasicVSR++ (Chan et al. 2022), as in mmagic.

    Aligns the features of the last two frames with the current one: offsets are the optical flow
    plus a bounded residual.
    """

    max_residue = 10

    def __init__(self, channels: int, offset_groups: int) -> None:
        super().__init__()
        c = channels
        self.weight = nn.Parameter(torch.empty(c, 2 * c, 3, 3))
        self.bias = nn.Parameter(torch.zeros(c))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        layers = [_conv3x3(3 * c + 4, c), _leaky(), _conv3x3(c, c), _leaky()]
        layers += [_conv3x3(c, c), _leaky(), _conv3x3(c, 27 * offset_groups)]
        self.conv_offset = nn.Sequential(*layers)

    def forward(
        self, last: Tensor, before: Tensor, current: Tensor, flow: Tensor, flow_before: Tensor
    ) -> Tensor:
        """Features [N, C, H, W] of three frames; flows [N, 2, H, W], (x, y), of the current one."""
        warped = _warp(last, flow), _warp(before, flow_before)
        hints = torch.cat((warped[0], current, warped[1], flow, flow_before), dim=1)
        *both, mask = self.conv_offset(hints).chunk(3, dim=1)
        residue = self.max_residue * torch.tanh(torch.cat(both, dim=1))
        offsets = [
            part + way.flip(1).repeat(1, part.shape[1] // 2, 1, 1)
            for part, way in zip(residue.chunk(2, dim=1), (flow, flow_before), strict=True)
        ]
        x, offset, geometry = torch.cat((last, before), 1), torch.cat(offsets, 1), (1, 1, 1)
        return deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask.sigmoid())


def _warp(features: Tensor, flow: Tensor) -> Tensor:
    height, width = flow.shape[2:]
    y, x = (torch.arange(size, dtype=flow.dtype) for size in (height, width))
    x = 2 * (x + flow[:, 0]) / max(width - 1, 1) - 1
    y = 2 * (y[:, None] + flow[:, 1]) / max(height - 1, 1) - 1
    return F.grid_sample(features, torch.stack((x, y), dim=3), align_corners=True)


class DLAHead(nn.Module):
    """Upsampling of DLA-34 (Yu et al. 2018) with deformable convolutions, and heads of CenterNet.

    Aggregates maps of strides 4, 8, 16 and 32, iteratively and hierarchically, to stride 4, and
    predicts a heatmap, object sizes and center offsets (Zhou et al. 2019).
    """

    def __init__(self, channels: int, num_classes: int = 80, head_channels: int = 256) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(4)]
        inputs, steps = list(widths), []
        for level in (2, 1, 0):
            steps.append(_Aggregation(widths[level], inputs[level:], [1] + [2] * (3 - level)))
            inputs[level + 1 :] = [widths[level]] * (3 - level)
        self.steps = nn.ModuleList(steps)
        self.last = _Aggregation(channels, widths[:3], [1, 2, 4])
        self.heads = nn.ModuleList(
            nn.Sequential(
                _conv3x3(channels, head_channels), nn.ReLU(), nn.Conv2d(head_channels, c, 1)
            )
            for c in (num_classes, 2, 2)
        )

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        current, finest = list(maps), []
        for level, step in zip((2, 1, 0), self.steps, strict=True):
            current[level:] = step(current[level:])
            finest.insert(0, current[-1])
        y = self.last(finest)[-1]
        return tuple(head(y) for head in self.heads)


class _Aggregation(nn.Module):
    """Iterative deep aggregation: each map is projected, upsampled, merged with the one before."""

    def __init__(self, channels: int, inputs: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.ModuleList(_DeformableBlock(c, channels) for c in inputs[1:])
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(c, c, 2 * f, f, f // 2, groups=c, bias=False)
            for c, f in ((channels, factor) for factor in factors[1:])
        )
        self.merge = nn.ModuleList(_DeformableBlock(channels, channels) for _ in inputs[1:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        result = [maps[0]]
        layers = zip(self.project, self.enlarge, self.merge, maps[1:], strict=True)
        for project, enlarge, merge, x in layers:
            result.append(merge(enlarge(project(x)) + result[-1]))
        return result


class _DeformableBlock(nn.Module):
    """CenterNet's DeformConv: DCNv2's layer, batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv_offset_mask = _conv3x3(in_channels, 27)
        self.conv = DeformConv2d(in_channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = self.conv_offset_mask(x).chunk(3, dim=1)
        return self.norm(self.conv(x, torch.cat((first, second), 1), mask.sigmoid())).relu()


class DecoderBlock(nn.Module):
    """A block of BiRefNet's decoder (Zheng et al. 2024): ASPPDeformable, without dropout."""

    def __init__(self, in_channels: int, out_channels: int, channels: int, branch: int) -> None:
        super().__init__()
        c = channels
        self.reduce = Conv2dNormActivation(in_channels, c, 3, bias=True)
        self.branches = nn.ModuleList(_DeformableBranch(c, branch, k) for k in (1, 1, 3, 7))
        self.context = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), Conv2dNormActivation(c, branch, 1, padding=0)
        )
        self.fuse = Conv2dNormActivation(5 * branch, c, 1, padding=0)
        self.expand = nn.Sequential(_conv3x3(c, out_channels), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        context = F.interpolate(
            self.context(x), size=x.shape[2:], mode="bilinear", align_corners=True
        )
        maps = [branch(x) for branch in self.branches]
        return self.expand(self.fuse(torch.cat((*maps, context), dim=1)))


class _DeformableBranch(nn.Module):
    """BiRefNet's _ASPPModuleDeformable: convolutions for offsets, masks and the weight."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        k, self.padding = kernel_size, kernel_size // 2
        self.offset_conv = nn.Conv2d(in_channels, 2 * k * k, k, padding=self.padding)
        self.modulator_conv = nn.Conv2d(in_channels, k * k, k, padding=self.padding)
        self.regular_conv = nn.Conv2d(in_channels, channels, k, padding=self.padding, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = deform_conv2d(
            input=x,
            offset=self.offset_conv(x),
            weight=self.regular_conv.weight,
            bias=self.regular_conv.bias,
            padding=self.padding,
            mask=2 * torch.sigmoid(self.modulator_conv(x)),
            stride=(1, 1),
        )
        return self.norm(x).relu()


def bottlenecks(channels: int, blocks: int) -> nn.Sequential:
    """Blocks of a ResNet-50 stage as in mmdetection's R50-DCN: offsets without a mask.

    In evaluation mode, as mmdetection trains them: batch norms use their running statistics.
    """
    layers = [Bottleneck(4 * channels, channels) for _ in range(blocks)]
    for layer in layers:
        layer.register_module("conv2", _PredictsOffsets(channels))
    return nn.Sequential(*layers).eval()


class _PredictsOffsets(nn.Module):
    """mmcv's DeformConv2dPack, on torchvision's layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_offset = _conv3x3(channels, 18)
        self.conv = DeformConv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.conv_offset(x))


class Published(NamedTuple):
    """A network with random weights and offsets of a few pixels, and its inputs: two images."""

    network: nn.Module
    inputs: list[Tensor]

    def outputs(self) -> list[Tensor]:
        found = self.network(*self.inputs)
        return [found] if isinstance(found, Tensor) else list(found)


_Sizes = list[tuple[int, int]]
"""Channels and side length of each input."""


def _edvr(small: bool) -> tuple[nn.Module, _Sizes]:
    channels, groups, size = (8, 2, 12) if small else (64, 8, 64)
    return PCDAlignment(channels, groups), 2 * [(channels, size >> level) for level in range(3)]


def _basicvsr(small: bool) -> tuple[nn.Module, _Sizes]:
    channels, groups, size = (4, 2, 9) if small else (64, 16, 64)
    sizes = [(channels, size)] * 3 + [(2, size)] * 2
    return SecondOrderAlignment(channels, groups), sizes


def _centernet(small: bool) -> tuple[nn.Module, _Sizes]:
    channels, classes, size = (4, 3, 16) if small else (64, 80, 64)
    sizes = [(channels << level, size >> level) for level in range(4)]
    return DLAHead(channels, classes, 4 * channels), sizes


def _birefnet(small: bool) -> tuple[nn.Module, _Sizes]:
    channels, size = ((6, 5, 4, 8), 9) if small else ((384, 192, 64, 256), 32)
    return DecoderBlock(*channels), [(channels[0], size)]


def _mmdetection(small: bool) -> tuple[nn.Module, _Sizes]:
    channels, size = (4, 9) if small else (256, 32)
    return bottlenecks(channels, 3), [(4 * channels, size)]


NETWORKS: dict[str, Callable[[bool], tuple[nn.Module, _Sizes]]] = {
    "EDVR: PCD alignment": _edvr,
    "BasicVSR++: second-order alignment": _basicvsr,
    "CenterNet: upsampling and heads of DLA-34": _centernet,
    "BiRefNet: decoder block with ASPPDeformable": _birefnet,
    "mmdetection: three bottlenecks of R50-DCN": _mmdetection,
}


def published(name: str, *, small: bool) -> Published:
    """A network of `NETWORKS`, with the same random values in every call.

    Args:
        name: Key of `NETWORKS`.
        small: If True, a tiny network in float64; if False, the code base's channels in float32.
    """
    torch.manual_seed(0)
    network, sizes = NETWORKS[name](small)
    dtype = torch.float64 if small else torch.float32
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "offset" in key:
                parameter.mul_(3)
    inputs = [torch.randn(2, c, n, n, dtype=dtype, requires_grad=True) for c, n in sizes]
    return Published(network.to(dtype), inputs)


def _conv3x3(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding=1)


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.1)


def _upsampled(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="bilinear")
