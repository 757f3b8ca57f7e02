"""Batch norm over the images of all processes; PyTorch has it for GPUs only."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd import Function


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics over all processes in training, on CPUs.

    Every process has to have maps of the same size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _over_processes(x.mean(dim=(0, 2, 3)))
        centered = x - mean[:, None, None]
        variance = _over_processes(centered.square().mean(dim=(0, 2, 3)))
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            # The running variance is the unbiased one.
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class SharedBatchNormAct2d(SharedBatchNorm2d):
    """The same for timm's batch norm with an activation."""

    act: nn.Module
    drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def share_statistics(model: nn.Module, device: torch.device) -> None:
    """Makes all batch norm layers of a model take their statistics over all processes."""
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    if device.type == "cuda":
        convert_sync_batchnorm(model)  # PyTorch's version drops the activations of timm's layers
        return
    shared = {nn.BatchNorm2d: SharedBatchNorm2d, BatchNormAct2d: SharedBatchNormAct2d}
    for module in model.modules():
        # Parameters and buffers are the same; only the computation differs.
        module.__class__ = shared.get(type(module), type(module))


def _over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes of means over equally many values."""
    total = _Sum.apply(mean)
    assert isinstance(total, Tensor)
    return total / torch.distributed.get_world_size()


class _Sum(Function):
    """The sum over all processes, and of the gradients of all of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total
