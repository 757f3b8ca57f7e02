"""The reference on Apple's GPUs, which have no float64: a mode refuses every float64 tensor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deform_conv_cases import random_case
from operator_testing import assert_same, differentiate
from roi_pool_cases import EVERY_SAMPLING, ROI_OR_PS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool
from deformnet.ops.roi_pool import reference
from deformnet.ops.roi_pool.checks import Sampling


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor")
        return result


def pooling(sampling: Sampling, position_sensitive: bool) -> tuple[Any, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    # No box side lies at a half, where rounding differs between float32 and float64.
    boxes = torch.tensor([[0, 3.2, 4.1, 37.7, 30.3], [0, 10.3, 2.6, 29.9, 33.8]])
    leaves = {
        "input": torch.randn(1, 12, 11, 13, generator=generator),
        "offset": torch.randn(2, 2, 2, 2, generator=generator),
    }
    function = deform_ps_roi_pool if position_sensitive else deform_roi_pool

    def pool(input: Tensor, offset: Tensor) -> Tensor:
        return function(
            input, boxes.to(input.device), offset, 2, 0.27, sampling=sampling, backend="reference"
        )

    grad = torch.randn(2, 3 if position_sensitive else 12, 2, 2, generator=generator)
    return pool, leaves, grad


@EVERY_SAMPLING
@ROI_OR_PS
def test_pooling_agrees_with_the_one_in_float64(monkeypatch, sampling, position_sensitive):
    pool, leaves, grad = pooling(sampling, position_sensitive)
    expected = differentiate(pool, leaves, grad)
    with NoFloat64(), pytest.raises(TypeError, match="makes a float64 tensor"):
        differentiate(pool, leaves, grad)
    monkeypatch.setattr(reference, "_position_dtype", lambda boxes: torch.float32)
    with NoFloat64():
        found = differentiate(pool, leaves, grad)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_convolution_makes_no_float64(seed):
    case = random_case(seed).to(torch.float32)
    with NoFloat64():
        differentiate(
            lambda **leaves: deform_conv2d(
                **{**case.tensors, **leaves},
                stride=case.stride,
                padding=case.padding,
                dilation=case.dilation,
                backend="reference",
            ),
            case.tensors,
            torch.ones(case.output_size()),
        )


def test_an_apple_gpu_is_known_by_its_name():
    for device, dtype in {"mps": torch.float32, "cpu": torch.float64}.items():
        boxes: Any = SimpleNamespace(device=torch.device(device))
        assert reference._position_dtype(boxes) == dtype
