"""Both operators under the compiler, export and FakeTensor."""

from collections.abc import Callable
from dataclasses import replace

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
import torch.nn.functional as F
from both_operators import (
    EVERY_LARGE,
    FORMATS,
    LARGE,
    random_cases,
    registered,
    with_format,
    with_tensors,
)
from cuda_cases import call, differentiable, on, output_gradient
from operator_testing import Normal, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Images, rows, columns and boxes. Not five boxes at first: a size that equals another one is taken
# for the same.
SHAPES = ((2, 7, 8, 6), (3, 4, 6, 2), (5, 9, 5, 11))
ONE_OF_EACH = pytest.mark.parametrize("name", ["deform_conv2d", "bins"])


class Convolutions(nn.Module):
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

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.first(images))
        offset, mask = self.offset(features).split([4 * self.taps, 2 * self.taps], dim=1)
        steps, mask = (2, self.padding, 1), mask.sigmoid()
        weight, bias = self.second.weight, self.second.bias
        output = deform_conv2d(
            features, offset * 3, weight, bias, *steps, mask, backend=self.backend
        )
        return F.relu(output)


class Poolings(nn.Module):
    """Position-sensitive pooling with offsets that come from a pooling without them."""

    def __init__(self, sampling: str, backend: str) -> None:
        super().__init__()
        self.options = {"sampling": sampling, "samples_per_bin": 2, "backend": backend}
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.scores = nn.Conv2d(4, 3 * 2 * 2, 1)
        self.offsets = nn.Linear(16, 2 * 3 * 2 * 2)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        maps = self.features(images).relu()
        plain = deform_roi_pool(maps, boxes, None, 2, 0.5, **self.options)
        offset = self.offsets(plain.flatten(1)).reshape(-1, 6, 2, 2)
        return deform_ps_roi_pool(self.scores(maps), boxes, offset, 2, 0.5, **self.options)


def build(name: str, backend: str) -> nn.Module:
    """A network with the convolution, or with the poolings of a sampling."""
    torch.manual_seed(0)
    if name == "deform_conv2d":
        return Convolutions(backend).double()
    return Poolings(name, backend).double()


def inputs(network: nn.Module, batch: int, height: int, width: int, count: int) -> tuple:
    normal = Normal()
    images = normal(batch, 3, height, width)
    if isinstance(network, Convolutions):
        return (images,)
    x1, y1, w, h = torch.rand(4, count, generator=normal.generator, dtype=torch.float64)
    image = torch.arange(count, dtype=torch.float64) % batch
    x1, y1 = x1 * width, y1 * height
    return images, torch.stack([image, x1, y1, x1 + w * width, y1 + h * height], dim=1)


def assert_same_step(found: nn.Module, expected: nn.Module, images: Tensor, *boxes: Tensor) -> None:
    results = []
    for network in (found, expected):
        network.zero_grad()
        leaf = images.detach().requires_grad_()
        output = network(leaf, *boxes)
        output.square().sum().backward()
        grads = {
            name.removeprefix("_orig_mod."): p.grad.clone()
            for name, p in network.named_parameters()
        }
        results.append({"output": output.detach(), "images": leaf.grad, **grads})
    assert_same(*results, 1e-10)


def assert_same_output(found: Callable, expected: Callable, *arguments: Tensor) -> None:
    torch.testing.assert_close(found(*arguments), expected(*arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("requires_grad", [False, True])
@EVERY_LARGE
def test_opcheck(fast, name, requires_grad):
    for case in (with_format(LARGE[name], True), *random_cases(name, 2)):
        opcheck(*registered(differentiable(case) if requires_grad else case))


@EVERY_LARGE
def test_opcheck_half(fast, name):
    opcheck(*registered(LARGE[name].to(torch.bfloat16, torch.float32)))


@FORMATS
@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("deform_conv2d", (True,) * 5),
        ("deform_conv2d", (True, False, True, False, False)),
        *(("ps bins", needs) for needs in ((True, True), (True, False), (False, True))),
    ],
)
def test_opcheck_backward(fast, name, needs, channels_last):
    case = with_format(LARGE[name], channels_last)
    arguments = [output_gradient(case), *registered(case)[1], needs]
    if name == "deform_conv2d":
        del arguments[4]  # bias
    operator = "deform_conv2d" if name == "deform_conv2d" else "roi_pool"
    opcheck(getattr(torch.ops.deformnet, f"{operator}_backward").default, arguments)


@ONE_OF_EACH
def test_fullgraph_with_inductor(fast, name):
    network = build(name, fast)
    compiled = torch.compile(network, fullgraph=True)
    assert_same_step(compiled, network, *inputs(network, *SHAPES[0]))


@pytest.mark.parametrize("name", ["deform_conv2d", "msra"])
def test_fullgraph(backend, name):
    network = build(name, backend)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images, *boxes = inputs(network, *SHAPES[0])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = images.contiguous(memory_format=memory_format)
        assert_same_step(compiled, network, images, *boxes)


@pytest.mark.parametrize("name", ["deform_conv2d", "bins", "msra", "aligned"])
def test_dynamic_shapes_compile_once(fast, name):
    check_dynamic_shapes(build(name, fast), "aot_eager", assert_same_step)


# The poolings traced alone: what a compiler makes of the backward pass takes long, and is no other
# function.
@pytest.mark.parametrize(
    ("name", "compiler", "check"),
    [
        ("deform_conv2d", "aot_eager", assert_same_step),
        ("bins", "eager", assert_same_output),
        ("aligned", "eager", assert_same_output),
    ],
)
def test_dynamic_shapes_compile_the_reference_once(name, compiler, check):
    check_dynamic_shapes(build(name, "reference"), compiler, check)


def check_dynamic_shapes(network: nn.Module, compiler: str, check: Callable[..., None]) -> None:
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    check(compiled, network, *inputs(network, *SHAPES[0]))
    first = counter.frame_count
    # PyTorch starts over once it finds that gamma of a pooling, a float, is a constant.
    assert first == 1 or isinstance(network, Poolings)
    for shape in SHAPES[1:]:
        check(compiled, network, *inputs(network, *shape))
    assert counter.frame_count == first


@ONE_OF_EACH
def test_autocast_compiles(backend, name):
    network = build(name, backend).float()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images, *boxes = inputs(network, *SHAPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(images.float(), *boxes), network(images.float(), *boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@EVERY_LARGE
def test_a_full_graph_refuses_bad_input_with_the_same_words(name, dynamic):
    # PyTorch raises its own error for any exception in a full graph; the words must be in it.
    case = LARGE[name]
    compiled = torch.compile(
        lambda offset: call(replace(case, offset=offset)),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    words = r"ValueError\(.expected offset to have shape \["
    if dynamic and torch.__version__ < "2.14" and isinstance(case, roi_pool_cases.Case):
        words = ""  # it cannot format the symbolic sizes
    with pytest.raises(RuntimeError, match=words):
        compiled(case.offset[:, 1:])


@ONE_OF_EACH
def test_export(backend, name):
    network = build(name, backend).eval()
    dynamic = torch.export.Dim.DYNAMIC
    arguments = inputs(network, *SHAPES[0])
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})[: len(arguments)]
    program = torch.export.export(network, arguments, dynamic_shapes=shapes)
    for shape in SHAPES:
        assert_same_output(program.module(), network, *inputs(network, *shape))


@pytest.mark.parametrize(
    ("name", "operator", "count"), [("deform_conv2d", "deform_conv2d", 1), ("bins", "roi_pool", 2)]
)
def test_an_export_holds_the_operator_whole(fast, name, operator, count):
    network = build(name, fast).eval()
    program = torch.export.export(network, inputs(network, *SHAPES[0]))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(getattr(torch.ops.deformnet, operator).default) == count


@FORMATS
@EVERY_LARGE
def test_fake_tensors_have_the_layout_of_real_ones(backend, name, channels_last):
    # The reference consists of PyTorch operators, each of which is slow on fake tensors.
    count = 2 if backend == "reference" else 12
    for case in (LARGE[name].to(torch.float16, torch.float32), *random_cases(name, count)):
        case = with_format(case, channels_last)
        real = call(case, backend)
        with FakeTensorMode() as mode:
            fake = call(with_tensors(case, mode.from_tensor), backend)
        assert fake.shape == real.shape
        assert fake.stride() == real.stride()
        assert fake.dtype == real.dtype


@EVERY_LARGE
def test_meta_tensors(backend, name):
    case = with_format(LARGE[name], True)
    for choice in (backend, "auto"):
        output = call(on("meta", case), choice)
        assert output.device.type == "meta"
        assert output.shape == output_gradient(case).shape
        if name.startswith("deform_conv2d"):
            assert output.is_contiguous(memory_format=torch.channels_last)


def test_ints_of_the_call_may_be_arguments_of_the_compiled_function(backend):
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    for seed in (25, 36):
        case = deform_conv_cases.random_case(seed)
        found = compiled(*case.public, backend=backend)
        torch.testing.assert_close(found, deform_conv2d(*case.public, backend=backend))


def test_a_list_of_boxes_and_adaptive_sampling_compile(backend):
    case = roi_pool_cases.large_case("aligned", False, samples_per_bin=0)
    parts = [case.boxes[case.boxes[:, 0] == n, 1:] for n in (0, 1)]

    def pool(boxes):
        return call(replace(case, boxes=boxes), backend)

    assert_same_output(torch.compile(pool, fullgraph=True, backend="aot_eager"), pool, parts)
