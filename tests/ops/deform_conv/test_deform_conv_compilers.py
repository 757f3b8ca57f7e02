"""deform_conv2d under the compiler, export and FakeTensor."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from deform_conv_cases import large_case, output_gradient, random_case, run
from operator_testing import assert_same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from deformnet.ops import deform_conv2d

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Network(nn.Module):
    """Convolutions around a modulated deformable one."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        # A compiler unrolls the reference's taps, so that more of them only take longer.
        kernel = 1 if backend == "reference" else 3
        self.padding, self.taps = kernel // 2, kernel**2
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 2 * 3 * self.taps, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, kernel, stride=2, padding=self.padding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.first(input))
        offset, mask = self.offset(features).split([4 * self.taps, 2 * self.taps], dim=1)
        output = deform_conv2d(
            features,
            offset * 3,
            self.second.weight,
            self.second.bias,
            2,
            self.padding,
            1,
            mask.sigmoid(),
            backend=self.backend,
        )
        return F.relu(output)


def build(backend: str) -> Network:
    torch.manual_seed(0)
    return Network(backend).double()


def images(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def assert_same_step(found: nn.Module, wanted: nn.Module, input: torch.Tensor) -> None:
    results = []
    for network in (found, wanted):
        network.zero_grad()
        leaf = input.detach().requires_grad_()
        output = network(leaf)
        output.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in network.named_parameters()}
        results.append({"output": output.detach(), "input": leaf.grad, **grads})
    found, wanted = results
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert_same(found, wanted, 1e-10)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_opcheck(fast, seed, requires_grad):
    case = large_case(0, channels_last=True) if seed is None else random_case(seed)
    arguments = [
        argument.requires_grad_(requires_grad) if isinstance(argument, torch.Tensor) else argument
        for argument in case.operator
    ]
    opcheck(torch.ops.deformnet.deform_conv2d.default, (*arguments, "zeros"))


def test_opcheck_half(fast):
    case = random_case(5, modulated=True).to(torch.bfloat16, torch.float32)
    opcheck(torch.ops.deformnet.deform_conv2d.default, (*case.operator, "msra2017"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, True, False, False)])
def test_opcheck_backward(fast, needs, channels_last):
    case = random_case(25, modulated=True)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    case = replace(case, input=case.input.contiguous(memory_format=memory_format))
    input, offset, weight, _, mask, *steps = case.operator
    arguments = (output_gradient(case), input, offset, weight, mask, *steps, "zeros", needs)
    opcheck(torch.ops.deformnet.deform_conv2d_backward.default, arguments)


def test_fullgraph_with_inductor(fast):
    network = build(fast)
    compiled = torch.compile(network, fullgraph=True)
    assert_same_step(compiled, network, images(2, 11, 8))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fullgraph(backend, memory_format):
    network = build(backend)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    input = images(2, 11, 8).contiguous(memory_format=memory_format)
    assert_same_step(compiled, network, input)


def test_fullgraph_with_dynamic_shapes_compiles_once(backend):
    network = build(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 11, 8), (3, 9, 14), (5, 32, 17)):
        assert_same_step(compiled, network, images(*shape))
    assert counter.frame_count == 1


def test_autocast_compiles(backend):
    network = build(backend).float()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    input = images(2, 11, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = compiled(input), network(input)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


def test_ints_of_the_call_may_be_arguments_of_the_compiled_function(backend):
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    for seed in (25, 36):
        case = random_case(seed)
        found = compiled(*case.public, backend=backend)
        torch.testing.assert_close(found, deform_conv2d(*case.public, backend=backend))


def test_a_full_graph_refuses_bad_input_with_the_same_words():
    # PyTorch raises its own error for any exception in a full graph; the words must be in it.
    case = random_case(0)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=dynamic, backend="eager")
        with pytest.raises(RuntimeError, match=r"ValueError\(.expected offset to have shape \["):
            compiled(case.input, case.offset[:, 1:], case.weight)


def test_export(backend):
    network = build(backend).eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (images(2, 11, 8),), dynamic_shapes=(sizes,))
    exported = program.module()
    for shape in ((2, 11, 8), (3, 9, 14), (5, 32, 17)):
        input = images(*shape)
        torch.testing.assert_close(exported(input), network(input), rtol=0, atol=1e-12)


def test_an_export_holds_the_operator_whole(fast):
    program = torch.export.export(build(fast).eval(), (images(2, 11, 8),))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.deformnet.deform_conv2d.default) == 1


@pytest.mark.parametrize("seed", range(12))
def test_fake_tensors_have_the_layout_of_real_ones(backend, seed):
    case = random_case(seed)
    real = run(case, backend)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(tensor) for name, tensor in case.tensors.items()}
        fake = deform_conv2d(
            tensors["input"],
            tensors["offset"],
            tensors["weight"],
            tensors.get("bias"),
            case.stride,
            case.padding,
            case.dilation,
            tensors.get("mask"),
            backend=backend,
        )
    assert fake.shape == real["output"].shape
    assert fake.stride() == real["output"].stride()
    assert fake.dtype == real["output"].dtype


def test_meta_tensors(backend):
    case = large_case(0, channels_last=True)
    case = type(case)(
        *(tensor.to("meta") for tensor in case.operator[:5]),
        case.stride,
        case.padding,
        case.dilation,
    )
    for choice in (backend, "auto"):
        output = deform_conv2d(*case.public, backend=choice)
        assert output.device.type == "meta"
        assert output.shape == case.output_size()
        assert output.is_contiguous(memory_format=torch.channels_last)
