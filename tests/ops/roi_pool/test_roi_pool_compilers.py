"""The RoI poolings under the compiler, export and FakeTensor."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from operator_testing import assert_same
from roi_pool_cases import SAMPLINGS, call, large_case, output_gradient, random_case
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from deformnet.ops import deform_ps_roi_pool, deform_roi_pool

ROI_OR_PS = pytest.mark.parametrize("position_sensitive", [False, True], ids=["roi", "ps"])
EVERY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Network(nn.Module):
    """Position-sensitive pooling with offsets that come from a pooling without them."""

    def __init__(self, sampling: str, backend: str) -> None:
        super().__init__()
        self.options = {"sampling": sampling, "samples_per_bin": 2, "backend": backend}
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.scores = nn.Conv2d(4, 3 * 2 * 2, 1)
        self.offsets = nn.Linear(16, 2 * 3 * 2 * 2)

    def forward(self, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        maps = self.features(images).relu()
        plain = deform_roi_pool(maps, boxes, None, 2, 0.5, **self.options)
        offset = self.offsets(plain.flatten(1)).reshape(-1, 6, 2, 2)
        return deform_ps_roi_pool(self.scores(maps), boxes, offset, 2, 0.5, **self.options)


def build(sampling: str, backend: str) -> Network:
    torch.manual_seed(0)
    return Network(sampling, backend).double()


def inputs(batch: int, height: int, width: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    x1, y1, w, h = torch.rand(4, count, generator=generator, dtype=torch.float64)
    image = torch.arange(count, dtype=torch.float64) % batch
    x1, y1 = x1 * width, y1 * height
    return images, torch.stack([image, x1, y1, x1 + w * width, y1 + h * height], dim=1)


def assert_same_step(found: nn.Module, wanted: nn.Module, images, boxes) -> None:
    results = []
    for network in (found, wanted):
        network.zero_grad()
        leaf = images.detach().requires_grad_()
        output = network(leaf, boxes)
        output.square().sum().backward()
        grads = {
            name.removeprefix("_orig_mod."): p.grad.clone()
            for name, p in network.named_parameters()
        }
        results.append({"output": output.detach(), "images": leaf.grad, **grads})
    assert_same(*results, 1e-10)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_opcheck(fast, seed, requires_grad):
    case = random_case(seed, SAMPLINGS[seed % 3])
    leaves = {k: v.clone().requires_grad_(requires_grad) for k, v in case.leaves.items()}
    opcheck(torch.ops.deformnet.roi_pool.default, replace(case, **leaves).operator)


def test_opcheck_half(fast):
    case = large_case("msra", True, groups=2).to(torch.bfloat16, torch.float32)
    opcheck(torch.ops.deformnet.roi_pool.default, case.operator)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(fast, needs, channels_last):
    case = large_case("bins", True, channels_last=channels_last)
    arguments = (output_gradient(case), *case.operator, needs)
    opcheck(torch.ops.deformnet.roi_pool_backward.default, arguments)


def test_fullgraph_with_inductor(fast):
    network = build("bins", fast)
    compiled = torch.compile(network, fullgraph=True)
    assert_same_step(compiled, network, *inputs(2, 7, 8, 6))


def test_fullgraph(backend):
    network = build("msra", backend)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images, boxes = inputs(2, 7, 8, 6)
    assert_same_step(compiled, network, images, boxes)
    last = images.contiguous(memory_format=torch.channels_last)
    assert_same_step(compiled, network, last, boxes)


@EVERY_SAMPLING
def test_dynamic_shapes_compile_once(fast, sampling):
    check_dynamic_shapes(build(sampling, fast), "aot_eager", assert_same_step)


@pytest.mark.parametrize("sampling", ["bins", "aligned"])
def test_dynamic_shapes_compile_the_reference_once(sampling):
    # Traced alone: what a compiler makes of the backward pass takes long, and is no other function.
    def assert_same_output(found, wanted, images, boxes):
        torch.testing.assert_close(found(images, boxes), wanted(images, boxes), rtol=0, atol=1e-12)

    check_dynamic_shapes(build(sampling, "reference"), "eager", assert_same_output)


def check_dynamic_shapes(network: Network, compiler: str, check: Callable[..., None]) -> None:
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    # Not five boxes at first: a size that equals another one is taken for the same.
    check(compiled, network, *inputs(2, 7, 8, 6))
    # PyTorch starts over once it finds that gamma, a float, is a constant.
    first = counter.frame_count
    for shape in ((3, 4, 6, 2), (5, 9, 5, 11)):
        check(compiled, network, *inputs(*shape))
    assert counter.frame_count == first


def test_a_list_of_boxes_compiles(backend):
    case = large_case("aligned", False)
    parts = [case.boxes[case.boxes[:, 0] == n, 1:] for n in (0, 1)]
    case = replace(case, boxes=parts)
    compiled = torch.compile(
        lambda boxes: call(replace(case, boxes=boxes), backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(parts), call(case, backend), rtol=0, atol=1e-12)


def test_adaptive_sampling_compiles(backend):
    case = large_case("aligned", True, samples_per_bin=0)
    compiled = torch.compile(
        lambda input: call(replace(case, input=input), backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(case.input), call(case, backend), rtol=0, atol=1e-12)


def test_autocast_compiles(backend):
    network = build("bins", backend).float()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images, boxes = inputs(2, 7, 8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = compiled(images.float(), boxes), network(images.float(), boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


def test_a_full_graph_refuses_bad_input_with_the_same_words():
    # PyTorch raises its own error for any exception in a full graph; the words must be in it.
    case = large_case("bins", False)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(deform_roi_pool, fullgraph=True, dynamic=dynamic, backend="eager")
        with pytest.raises(RuntimeError, match=r"ValueError\(.expected offset to have shape \["):
            compiled(case.input, case.boxes, case.offset, (3, 4))


def test_export(backend):
    network = build("bins", backend).eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})
    program = torch.export.export(network, inputs(2, 7, 8, 6), dynamic_shapes=shapes)
    exported = program.module()
    for shape in ((2, 7, 8, 6), (3, 4, 6, 2), (5, 9, 5, 11)):
        arguments = inputs(*shape)
        torch.testing.assert_close(exported(*arguments), network(*arguments), rtol=0, atol=1e-12)


def test_an_export_holds_the_operator_whole(fast):
    program = torch.export.export(build("bins", fast).eval(), inputs(2, 7, 8, 6))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.deformnet.roi_pool.default) == 2


@ROI_OR_PS
@EVERY_SAMPLING
@pytest.mark.parametrize("channels_last", [False, True])
def test_fake_tensors_have_the_layout_of_real_ones(
    backend, channels_last, sampling, position_sensitive
):
    case = large_case(sampling, position_sensitive, channels_last=channels_last)
    case = case.to(torch.float16, torch.float32)
    real = call(case, backend)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(getattr(case, name)) for name in ("input", "boxes")}
        fake = call(replace(case, **tensors, offset=mode.from_tensor(case.offset)), backend)
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()
    assert fake.dtype == real.dtype


@ROI_OR_PS
def test_meta_tensors(backend, position_sensitive):
    case = large_case("bins", position_sensitive)
    tensors = {name: getattr(case, name).to("meta") for name in ("input", "boxes", "offset")}
    for choice in (backend, "auto"):
        output = call(replace(case, **tensors), choice)
        assert output.device.type == "meta"
        assert output.shape == case.output_size_of()
