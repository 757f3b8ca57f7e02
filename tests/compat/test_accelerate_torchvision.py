"""torchvision's operator on our kernels: every way to call it, values and gradients equal."""

import io

import pytest
import torch
import torchvision
from benchmarks.drop_ins import difference
from benchmarks.published_networks import NETWORKS
from torch import nn
from torch.library import opcheck
from torchvision.ops import deform_conv2d

import deformnet
from deformnet.compat import accelerate_torchvision
from deformnet.ops import backends
from deformnet.ops.deform_conv.operator import OPERATOR

CASES = {
    "groups": {"groups": 2, "offset_groups": 3, "stride": (2, 1), "padding": (1, 0)},
    "no mask": {"masked": False, "padding": (2, 2), "dilation": (2, 1)},
    "no bias": {"with_bias": False},
    "channels-last": {"layout": torch.channels_last, "padding": (1, 1)},
    "empty batch": {"batch": 0},
}


@pytest.fixture(autouse=True)
def _restored():
    yield
    assert ours() == 0, "torchvision's kernels were not restored"


def ours():
    """Number of calls of our operator during a call of torchvision's."""
    with counting() as calls:
        deform_conv2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 1, 1))
    return len(calls)


class counting:
    """Counts the calls of our forward and backward kernels on the CPU."""

    def __enter__(self):
        self._kernels, calls = OPERATOR.cpu, []

        def counted(kernel):
            return lambda *arguments: (calls.append(1), kernel(*arguments))[1]

        forward, backward, _ = self._kernels
        OPERATOR.cpu = self._kernels._replace(forward=counted(forward), backward=counted(backward))
        return calls

    def __exit__(self, *error):
        OPERATOR.cpu = self._kernels


def arguments(
    *,
    batch=2,
    groups=1,
    offset_groups=1,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    masked=True,
    with_bias=True,
    layout=torch.contiguous_format,
    dtype=torch.float64,
):
    generator = torch.Generator().manual_seed(0)
    sides = zip((9, 8), (3, 2), stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "input": random(batch, 6, 9, 8).to(memory_format=layout),
        "offset": 2 * random(batch, 2 * offset_groups * 6, *size),
        "weight": random(4, 6 // groups, 3, 2),
        "bias": random(4) if with_bias else None,
        "mask": random(batch, offset_groups * 6, *size) if masked else None,
    }
    tensors = {name: it.requires_grad_() for name, it in tensors.items() if it is not None}
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def values_and_gradients(call, tensors, geometry):
    output = call(**tensors, **geometry)
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * seed).sum(), [*tensors.values()])]


def assert_equal(ours, theirs, tolerance=1e-10):
    assert ours[0].stride() == theirs[0].stride()
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        scale = 1 if expected.numel() == 0 else float(expected.detach().abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def operator_arguments(input, offset, weight, bias=None, mask=None, *, stride, padding, dilation):
    pairs = (*stride, *padding, *dilation)
    groups = (input.shape[1] // weight.shape[1], offset.shape[1] // 12)
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    tensors = (no_mask if mask is None else mask, no_bias if bias is None else bias)
    return input, weight, offset, *tensors, *pairs, *groups, mask is not None


def raw(**arguments):
    return torch.ops.torchvision.deform_conv2d(*operator_arguments(**arguments))


@pytest.mark.parametrize("call", [deform_conv2d, raw], ids=["name", "raw"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, call):
    tensors, geometry = arguments(**CASES[case])
    theirs = values_and_gradients(call, tensors, geometry)
    with accelerate_torchvision(), counting() as calls:
        assert_equal(values_and_gradients(call, tensors, geometry), theirs)
    assert len(calls) == 2


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    tensors, geometry = arguments(masked=masked)
    with accelerate_torchvision(), counting() as calls:
        opcheck(
            torch.ops.torchvision.deform_conv2d.default, operator_arguments(**tensors, **geometry)
        )
    assert calls


def test_without_gradients_and_in_inference_mode():
    tensors, geometry = arguments()
    theirs = deform_conv2d(**tensors, **geometry).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with accelerate_torchvision(), mode(), counting() as calls:
            assert_equal([deform_conv2d(**tensors, **geometry)], [theirs])
        assert len(calls) == 1


class Model(nn.Module):
    """A layer of torchvision with its offset convolution, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(4, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(4, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x, self.offsets(x)).relu()


def results(run, model, x):
    x = x.clone().requires_grad_()
    output = run(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


def loaded(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


WAYS = {
    "module": lambda model, x: model,
    "scripted": lambda model, x: torch.jit.script(model),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager"),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.parametrize("made_before", [True, False], ids=["made before", "made after"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_calling(way, made_before):
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Model().double(), torch.randn(2, 4, 7, 9, dtype=torch.float64)
    theirs = results(model, model, x)
    before = WAYS[way](model, x)
    if made_before:
        results(before, before, x)
    with accelerate_torchvision():
        run = before if made_before else WAYS[way](model, x)
        with counting() as calls:
            found = results(run, run, x)
        assert len(calls) == 2
        assert_equal(found, theirs)
    torch.compiler.reset()


def test_code_compiled_after_the_removal():
    """PyTorch caches which kernels an operator has when it traces a call of it."""
    tensors, geometry = arguments()
    model, x = Model().double(), torch.randn(2, 4, 7, 9, dtype=torch.float64)
    theirs = results(model, model, x)
    operator = torch.ops.torchvision.deform_conv2d.default
    with accelerate_torchvision():
        opcheck(operator, operator_arguments(**tensors, **geometry))
    torch.compiler.reset()
    run = torch.compile(model, backend="aot_eager")
    assert_equal(results(run, run, x), theirs)
    torch.compiler.reset()


def test_a_scripted_file():
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 4, 7, 9, dtype=torch.float64)
    theirs = results(model, model, x)
    with accelerate_torchvision(), counting() as calls:
        run = loaded(torch.jit.script(model))
        assert_equal(results(run, run, x), theirs)
    assert calls


def test_a_graph_that_outlives_the_acceleration():
    tensors, geometry = arguments()
    theirs = values_and_gradients(deform_conv2d, tensors, geometry)[1:]
    handle = accelerate_torchvision()
    accelerated = deform_conv2d(**tensors, **geometry)
    handle.remove()
    plain = deform_conv2d(**tensors, **geometry)
    seed = torch.linspace(-1, 1, plain.numel(), dtype=plain.dtype).view(plain.shape)
    with accelerate_torchvision():
        late = torch.autograd.grad(plain, [*tensors.values()], seed)
    assert_equal(torch.autograd.grad(accelerated, [*tensors.values()], seed), theirs)
    assert_equal(late, theirs)


@pytest.mark.parametrize("name", NETWORKS, ids=lambda name: name.partition(":")[0])
def test_published_networks(name):
    with counting() as calls:
        assert difference(name) < 1e-10
    assert calls


def test_under_autocast_on_the_cpu():
    """torchvision refuses mixed dtypes there; ours compute in the dtype of autocast."""
    tensors, geometry = arguments(dtype=torch.float32)
    plain = deform_conv2d(**tensors, **geometry)
    with accelerate_torchvision(), torch.autocast("cpu", torch.bfloat16):
        mixed = deform_conv2d(**tensors, **geometry)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), plain, rtol=0.05, atol=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, monkeypatch):
    tensors, geometry = arguments(**CASES[case])
    tensors = {name: it.detach().cuda().requires_grad_() for name, it in tensors.items()}
    theirs = values_and_gradients(deform_conv2d, tensors, geometry)
    calls, kernels = [], OPERATOR.triton
    monkeypatch.setattr(OPERATOR, "triton", lambda: (calls.append(1), kernels())[1])
    with accelerate_torchvision():
        assert_equal(values_and_gradients(deform_conv2d, tensors, geometry), theirs)
        assert len(calls) == 2
        half = {name: it.half() for name, it in tensors.items()}
        with torch.autocast("cuda"):
            assert deform_conv2d(**half, **geometry).dtype == torch.float16


def test_fake_and_meta_tensors():
    tensors, geometry = arguments()
    with accelerate_torchvision():
        meta = {name: it.detach().to("meta").requires_grad_() for name, it in tensors.items()}
        output = deform_conv2d(**meta, **geometry)
        assert output.is_meta
        output.sum().backward()
        assert meta["offset"].grad.shape == meta["offset"].shape
        with torch._subclasses.FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(it) for name, it in tensors.items()}
            output = deform_conv2d(**fake, **geometry)
            assert output.shape == (2, 4, 7, 7)
            output.sum().backward()


def test_second_derivatives_with_the_reference():
    tensors, geometry = arguments(batch=1)
    small = [it.detach().requires_grad_() for it in tensors.values()]

    def call(input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)

    with accelerate_torchvision(), deformnet.using("reference"):
        assert torch.autograd.gradgradcheck(call, small, fast_mode=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 0, 1, 2, 2)])
def test_several_times_and_removed_in_any_order(order):
    handles = [accelerate_torchvision() for _ in range(3)]
    for index in order:
        assert ours() == 1
        handles[index].remove()
        if len(set(order[: order.index(index) + 1])) == 3:
            break
    assert ours() == 0
    for handle in handles:
        handle.remove()


def test_it_lasts_when_the_handle_is_dropped_and_ends_after_an_error():
    handle = accelerate_torchvision()
    other = accelerate_torchvision()
    del other
    handle.remove()
    assert ours() == 1
    for left in list(deformnet.compat.acceleration._active):
        left.remove()
    with pytest.raises(KeyError), accelerate_torchvision():
        raise KeyError


def test_wrong_arguments():
    tensors, geometry = arguments()
    with accelerate_torchvision():
        with pytest.raises(ValueError, match="expected mask to have shape"):
            deform_conv2d(**{**tensors, "mask": tensors["mask"][:, :2]}, **geometry)
        call = [*(tensors[n] for n in ("input", "weight", "offset", "mask", "bias"))]
        for groups, name in (((2, 1), "groups"), ((1, 2), "offset groups")):
            with pytest.raises(ValueError, match=f"expected {name} to be 1, .* but got 2"):
                torch.ops.torchvision.deform_conv2d(*call, 1, 1, 0, 0, 1, 1, *groups, True)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "why_unavailable", lambda *_: "not here")
    with pytest.raises(RuntimeError, match="got none: cpu: not here; triton: not here"):
        accelerate_torchvision()


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision.extension", None)
    with pytest.raises(ModuleNotFoundError, match="run pip install torchvision"):
        accelerate_torchvision()
