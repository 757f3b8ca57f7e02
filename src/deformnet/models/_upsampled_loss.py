"""Cross-entropy of bilinearly upsampled scores, without materializing them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_STRIP = 2**18
"""Number of upsampled scores in memory at a time on CPUs: about what fits into their caches."""


def upsampled_cross_entropy(scores: Tensor, target: Tensor, factor: int, ignored: int) -> Tensor:
    """Sum of the cross-entropy losses of bilinearly upsampled scores.

    The same as `F.interpolate` followed by `F.cross_entropy`, but about three times as fast on
    CPUs: the upsampled scores, which are `factor`² times as many, and their gradient are computed
    strip by strip in the forward pass.

    Args:
        scores: float32 or float64 [N, C, h, w].
        target: Integers [N, H, W], 0 to C - 1 or `ignored`, with H <= h * factor and
            W <= w * factor; scores beyond it are cropped.
        factor: Scale factor of the upsampling.
        ignored: Label of pixels that are ignored.
    """
    with torch.autocast(scores.device.type, enabled=False):
        return _UpsampledCrossEntropy.apply(scores, target, factor, ignored)  # pyright: ignore


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, factor: int, ignored: int) -> Tensor:
        images, classes, rows, columns = scores.shape
        height, width = target.shape[1:]
        down = _interpolation(rows, factor, scores)[:height]
        across = _interpolation(columns, factor, scores)[:width]
        strip = rows
        if scores.device.type == "cpu":
            strip = max(1, _STRIP // max(1, classes * width * factor))  # rows of `scores`
        losses = [scores.new_zeros(())]  # of a batch without images
        gradients = scores.new_empty(images, rows, classes, columns)
        for one, labels, gradient in zip(scores, target, gradients, strict=True):
            wide = (one.transpose(0, 1) @ across.T).flatten(1)  # [h, C * W]
            of_wide = torch.zeros_like(wide)
            for first in range(0, -(-height // factor), strip):
                own = slice(first * factor, (first + strip) * factor)
                near = slice(max(first - 1, 0), first + strip + 1)  # rows that `own` is made from
                matrix = down[own, near]
                x = (matrix @ wide[near]).view(-1, classes, width)
                valid = labels[own] != ignored
                classes_of = (labels[own] * valid).long()[:, None]
                x -= x.amax(dim=1, keepdim=True)
                x_of_label = x.gather(1, classes_of)[:, 0]
                total = x.exp_().sum(dim=1)
                losses.append(((total.log() - x_of_label) * valid).sum())
                # The gradient of x: softmax, minus 1 at the label.
                x *= (valid / total)[:, None]
                x.scatter_add_(1, classes_of, -valid[:, None].to(x.dtype))
                of_wide[near].addmm_(matrix.T, x.flatten(1))
            torch.matmul(of_wide.view(rows, classes, width), across, out=gradient)
        ctx.save_for_backward(gradients.transpose(1, 2))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (gradients,) = ctx.saved_tensors
        return gradient * gradients, None, None, None


def _interpolation(size: int, factor: int, like: Tensor) -> Tensor:
    """The matrix [size * factor, size] of linear interpolation."""
    units = torch.eye(size, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(units, scale_factor=factor, mode="linear")[0].T.contiguous()
