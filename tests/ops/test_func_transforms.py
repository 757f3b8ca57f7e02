"""Both operators under vmap, torch.func and batched gradients, against loops over the samples."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from cuda_cases import Case, call, leaves, output_gradient
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from deformnet.ops import deform_conv2d, deform_roi_pool, using

CASES: dict[str, Case] = {
    "deform_conv2d": deform_conv_cases.random_case(4, modulated=True),
    "bins": roi_pool_cases.random_case(0, "bins", False, shifted=True),
    "ps aligned": roi_pool_cases.random_case(1, "aligned", True, shifted=True),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)
SAMPLES = 3


def function_of(case: Case, names: tuple[str, ...], backend: str = "auto") -> Callable[..., Tensor]:
    return lambda *values: call(replace(case, **dict(zip(names, values, strict=True))), backend)


def samples_of(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, 0.7 * tensor, tensor.flip(-1)])


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def stacked(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@EVERY_CASE
def test_vmap_over_any_tensors(fast, name):
    """Every choice of batched tensors, values and all gradients, in and out of their dimensions."""
    case = CASES[name]
    names = tuple(leaves(case))
    values = tuple(leaves(case).values())

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        def loss(*values: Tensor) -> tuple[Tensor, Tensor]:
            output = function_of(case, names, fast)(*values)
            return output.square().sum(), output

        gradients, output = grad(loss, tuple(range(len(values))), has_aux=True)(*values)
        return output, *gradients

    alone = [tuple(0 if i == k else None for i in range(len(values))) for k in range(len(values))]
    rows = tuple(0 if name in ("input", "offset", "mask") else None for name in names)
    for flags in {*alone, rows, (0,) * len(values)}:
        inputs = [
            v if flag is None else samples_of(v) for v, flag in zip(values, flags, strict=True)
        ]
        expected = stacked(
            [
                step(*[v if f is None else v[i] for v, f in zip(inputs, flags, strict=True)])
                for i in range(SAMPLES)
            ]
        )
        assert_close(vmap(step, flags)(*inputs), expected)
    last = [samples_of(value).movedim(0, -1) for value in values]
    assert_close(vmap(function_of(case, names, fast), -1, -1)(*last).movedim(-1, 0),
                 vmap(function_of(case, names, fast))(*map(samples_of, values)))  # fmt: skip


@EVERY_CASE
def test_vmap_over_no_samples(fast, name):
    case = CASES[name]
    names, values = tuple(leaves(case)), tuple(leaves(case).values())
    function = function_of(case, names, fast)
    none = [torch.stack([value] * 2, -1)[..., :0] for value in values]
    for flags in {tuple(-1 if i == k else None for i in range(len(values))) for k in range(2)}:
        inputs = [v if f is None else n for v, n, f in zip(values, none, flags, strict=True)]
        assert vmap(function, flags)(*inputs).shape == (0, *function(*values).shape)
        step = grad(lambda *them: function(*them).sum(), tuple(range(len(values))))
        for found, value in zip(vmap(step, flags)(*inputs), values, strict=True):
            assert found.shape == (0, *value.shape)


class Calls(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "count"), [("input", 1), ("mask", 1), ("weight", SAMPLES)])
def test_samples_are_one_call_unless_weights_differ(fast, name, count):
    case = CASES["deform_conv2d"]
    with Calls() as calls:
        vmap(function_of(case, (name,), fast))(samples_of(leaves(case)[name]))
    assert calls.counts["deformnet.deform_conv2d.default"] == count


@EVERY_CASE
def test_boxes_and_nested_vmap(fast, name):
    case = CASES[name]
    names = ("input",) if name == "deform_conv2d" else ("input", "boxes")
    values = [samples_of(case.input)]
    if "boxes" in names:
        values.append(torch.stack([case.boxes] * SAMPLES))
        values[1][1, :, 3:] += 2  # boxes of their own
    function = function_of(case, names, fast)
    once = torch.stack([function(*sample) for sample in zip(*values, strict=True)])
    assert_close(vmap(function)(*values), once)
    twice = [torch.stack([value, value.flip(0)]) for value in values]
    assert_close(vmap(vmap(function))(*twice), torch.stack([once, once.flip(0)]))
    with using("reference"):
        reference = function_of(case, names)
        assert_close(vmap(reference)(*values), once)
        assert_close(vmap(vmap(reference))(*twice), torch.stack([once, once.flip(0)]))


def test_a_box_of_another_samples_image_is_refused(fast):
    maps, boxes = torch.zeros(4, 2, 3, 5, 5), torch.zeros(4, 6, 5)
    boxes[2, 1, 0] = 2  # the first image of the next sample, were it not checked
    with pytest.raises(ValueError, match="integer from 0 to 1, but got 2 in row 13"):
        vmap(lambda maps, boxes: deform_roi_pool(maps, boxes, None, 2, backend=fast))(maps, boxes)


def test_boxes_in_half_precision_reach_all_samples(fast):
    maps = torch.arange(300.0).reshape(300, 1, 1, 1, 1).expand(-1, -1, -1, 4, 4).bfloat16()
    boxes = torch.tensor([[0, 0, 0, 3, 3]]).bfloat16()
    pooled = vmap(lambda maps: deform_roi_pool(maps, boxes, None, 1, backend=fast))(maps)
    assert torch.equal(pooled.flatten(), maps[:, 0, 0, 0, 0])


@EVERY_CASE
def test_jacobians_and_hessians(fast, name):
    case = CASES[name]
    for leaf in ("offset", "input"):
        value = leaves(case)[leaf]
        direction = torch.linspace(-1, 1, 4, dtype=value.dtype)

        def along(steps: Tensor, backend: str, leaf=leaf, value=value, case=case) -> Tensor:
            pattern = torch.arange(value.numel()).reshape(value.shape)
            moved = value + sum(steps[k] * (pattern % 4 == k) for k in range(4))
            return function_of(case, (leaf,), backend)(moved)

        def loss(steps: Tensor, backend: str, along=along) -> Tensor:
            return along(steps, backend).square().sum()

        expected = torch.autograd.functional.jacobian(lambda v: along(v, "reference"), direction)
        for jacobian in (jacrev, jacfwd):
            assert_close(jacobian(along)(direction, fast), expected)
        for vectorize in (False, True):
            found = torch.autograd.functional.jacobian(
                lambda v: along(v, fast), direction, vectorize=vectorize
            )
            assert_close(found, expected)

        expected = torch.autograd.functional.hessian(lambda v: loss(v, "reference"), direction)
        assert_close(hessian(loss)(direction, fast), expected)
        assert_close(jacrev(jacrev(loss))(direction, fast), expected)
        found = torch.autograd.functional.hessian(
            lambda v: loss(v, fast), direction, vectorize=True
        )
        assert_close(found, expected)


@EVERY_CASE
def test_batched_gradients(fast, name):
    case = CASES[name]
    values = [value.detach().requires_grad_() for value in leaves(case).values()]
    output = function_of(case, tuple(leaves(case)), fast)(*values)
    gradients = samples_of(output_gradient(case))
    found = torch.autograd.grad(output, values, gradients, is_grads_batched=True, retain_graph=True)
    expected = stacked(
        [torch.autograd.grad(output, values, g, retain_graph=True) for g in gradients]
    )
    assert_close(found, expected)


def test_the_vector_product_of_a_finished_transform(fast):
    case = CASES["deform_conv2d"]
    names = tuple(leaves(case))
    output, pull = torch.func.vjp(function_of(case, names, fast), *leaves(case).values())
    _, expected = torch.func.vjp(function_of(case, names, "reference"), *leaves(case).values())
    assert_close(pull(torch.ones_like(output)), expected(torch.ones_like(output)))


def test_registered_operators_have_all_transforms(fast):
    """As in an exported program, which does not contain the public function."""
    case = CASES["deform_conv2d"]

    def operator(input: Tensor) -> Tensor:
        arguments = replace(case, input=input).operator
        return torch.ops.deformnet.deform_conv2d(*arguments, "zeros")

    def public(input: Tensor) -> Tensor:
        return deform_conv2d(*replace(case, input=input).public, backend="reference")

    for transform in (vmap, lambda f: vmap(grad(lambda x: f(x).square().sum()))):
        found, expected = (transform(f)(samples_of(case.input)) for f in (operator, public))
        assert_close(found, expected)
