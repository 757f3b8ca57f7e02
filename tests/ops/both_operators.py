"""Calls of both operators, for the tests that they share."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from cuda_cases import Case, leaves, output_gradient, run
from operator_testing import as_channels_last, assert_same
from torch import Tensor

POOLINGS = list(product(roi_pool_cases.SAMPLINGS, (False, True)))
# Calls that fill vectors and tiles.
LARGE: dict[str, Case] = {
    "deform_conv2d": deform_conv_cases.large_case(0),
    "deform_conv2d in groups": deform_conv_cases.large_case(1),
    **{
        f"{'ps' if ps else 'roi'} {sampling}": roi_pool_cases.large_case(sampling, ps, groups=2)
        for sampling, ps in POOLINGS
    },
}
EVERY_LARGE = pytest.mark.parametrize("name", LARGE)
FORMATS = pytest.mark.parametrize("channels_last", [False, True])


def random_cases(name: str, count: int) -> list[Case]:
    """Small calls of the kind of a large one."""
    if name.startswith("deform_conv2d"):
        return [deform_conv_cases.random_case(seed) for seed in range(count)]
    kind = LARGE[name].sampling, LARGE[name].position_sensitive
    return [roi_pool_cases.random_case(seed, *kind) for seed in range(count)]


def with_tensors(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The call with all its tensors changed."""
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return replace(case, **{name: change(tensor) for name, tensor in tensors.items()})


def with_format(case: Case, channels_last: bool) -> Case:
    return replace(case, input=as_channels_last(case.input, channels_last))


def empty(case: Case) -> Case:
    """No images or no boxes."""
    names = ("input", "offset", "mask") if "mask" in leaves(case) else ("boxes", "offset")
    return replace(case, **{name: getattr(case, name)[:0] for name in names})


def registered(case: Case) -> tuple[Callable[..., Tensor], tuple]:
    """The registered operator and its arguments."""
    if isinstance(case, deform_conv_cases.Case):
        return torch.ops.deformnet.deform_conv2d.default, (*case.operator, "zeros")
    return torch.ops.deformnet.roi_pool.default, case.operator


def check_bad_gradients(case: Case, backend: str, at: tuple, bad: float) -> None:
    """What is not finite in the gradient by one image's or box's output stays where it belongs."""
    gradient = output_gradient(case)
    clean = run(case, gradient, backend)
    gradient[at] = bad
    found = run(case, gradient, backend)
    # The other image, and all other positions.
    assert_same({"": found["grad_input"][0]}, {"": clean["grad_input"][0]}, 1e-12)
    for name in found.keys() & {"grad_offset", "grad_mask"}:
        elsewhere = torch.ones(found[name].shape, dtype=bool)
        elsewhere[at] = False
        assert_same({"": found[name][elsewhere]}, {"": clean[name][elsewhere]}, 1e-12)
        assert not found[name][~elsewhere].isfinite().any()
