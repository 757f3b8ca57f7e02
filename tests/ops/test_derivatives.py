"""Forward-mode derivatives: right through the reference, refused (never zero) by the kernels."""

import pytest
import torch
from deform_conv_cases import random_case
from torch.autograd import forward_ad

from deformnet.ops import deform_conv2d


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask"])
def test_the_fast_kernels_refuse_tangents(fast, name):
    case = random_case(3, modulated=True)

    def call(value):
        tensors = case.tensors | {name: value}
        steps = case.stride, case.padding, case.dilation
        return deform_conv2d(
            *(tensors["input"], tensors["offset"], tensors["weight"], tensors.get("bias")),
            *(*steps, tensors["mask"]),
            backend=fast,
        )

    value = case.tensors[name]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (value,), (torch.ones_like(value),))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        call(forward_ad.make_dual(value, torch.ones_like(value)))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(call(value)).tangent is None


def test_the_reference_has_forward_derivatives():
    case = random_case(3, whole=False)

    def call(offset):
        arguments = (case.input, offset, *case.public[2:])
        return deform_conv2d(*arguments, backend="reference")

    direction = torch.ones_like(case.offset)
    _, slope = torch.func.jvp(call, (case.offset,), (direction,))
    step = 1e-6
    change = call(case.offset + step * direction) - call(case.offset - step * direction)
    torch.testing.assert_close(slope, change / (2 * step), rtol=1e-6, atol=1e-6)
    assert slope.abs().max() > 0.1
