"""Operators and layers in ONNX graphs and exported programs, against the operators themselves."""

import random

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from torch import Tensor, nn
from torch.export import Dim

from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.ops import decompositions, deform_conv2d, deform_roi_pool
from deformnet.ops.deform_conv import reference as deform_conv_reference
from deformnet.ops.deform_conv import standard as deform_conv_standard
from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.roi_pool import reference as roi_pool_reference
from deformnet.ops.roi_pool import standard as roi_pool_standard
from deformnet.ops.roi_pool.checks import Rule

MAPS = {0: "batch", 2: "height", 3: "width"}


class Layers(nn.Module):
    """A layer of each kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = DeformConv2d(6, 8, 3, 2, 1, groups=2, offset_groups=3)
        self.modulated = DeformConv2d(8, 18, (3, 2), 1, 2, 2, bias=False, modulated=True)
        self.low = DeformConv2d(18, 4, 3, padding=1).half()
        self.pool = DeformRoIPool2d(18, 3, 0.25, sampling="aligned", samples_per_bin=2)
        self.ps_pool = DeformPSRoIPool2d(18, 3, 0.25, offset_groups=2)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if "offset" in name:
                nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, images: Tensor, boxes: Tensor) -> list[Tensor]:
        maps = self.modulated(self.plain(images))
        pooled = self.pool(maps, boxes), self.ps_pool(maps, maps, boxes)
        return [maps, *pooled, self.low(maps.half()).float()]


class Functions(nn.Module):
    """The rules of the authors' kernels, and boxes as a list."""

    def forward(
        self, images: Tensor, offset: Tensor, weight: Tensor, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (
            deform_conv2d(images, offset, weight, padding=1, border="msra2017"),
            deform_roi_pool(
                images, [first, second], None, 2, 0.25, sampling="msra", samples_per_bin=2
            ),
        )


class Adapting(nn.Module):
    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        return deform_roi_pool(images, boxes, None, 2, sampling="aligned", samples_per_bin=0)


def boxes_for(seed: int, count: int, batch: int, size: int) -> Tensor:
    draw = random.Random(seed)
    return roi_pool_cases.random_boxes(draw, count, batch, size, size).float()


def to_onnx(module, arguments, shapes=None, opset: int | None = None):
    pytest.importorskip("onnxscript")
    exported = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=opset,
        verbose=False,
        optimize=False,
    )
    return exported.model_proto


def run(proto, *arguments: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    values = [argument.numpy() for argument in arguments]
    outputs = session.run(None, dict(zip(names, values, strict=True)))
    return [torch.from_numpy(output) for output in outputs]


@torch.no_grad()
def test_layers_in_onnx_with_dynamic_shapes():
    layers = Layers().eval()
    arguments = torch.randn(2, 6, 21, 27), boxes_for(0, 5, 2, 24)
    proto = to_onnx(layers, arguments, (MAPS, {0: "boxes"}))
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 3
    assert proto.opset_import[0].version >= 19
    for batch, size, count in ((3, 30, 9), (1, 17, 0)):
        arguments = torch.randn(batch, 6, size, size + 4), boxes_for(1, count, batch, size)
        *found, half = run(proto, *arguments)
        *expected, half_expected = layers(*arguments)
        for own, right in zip(found, expected, strict=True):
            torch.testing.assert_close(own, right, rtol=3e-6, atol=3e-6, equal_nan=True)
        torch.testing.assert_close(half, half_expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_functions_in_onnx_of_an_old_opset():
    arguments = (
        *(torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8) * 3, torch.randn(6, 4, 3, 3)),
        *(boxes_for(0, 3, 1, 30)[:, 1:], boxes_for(1, 4, 1, 30)[:, 1:]),
    )
    shapes = ({0: "batch", 2: "h", 3: "w"}, {0: "batch", 2: "h", 3: "w"}, None, {0: "a"}, {0: "b"})
    proto = to_onnx(Functions(), arguments, shapes, opset=18)
    assert not [node for node in proto.graph.node if node.op_type == "DeformConv"]
    arguments = (
        *(torch.randn(3, 4, 6, 7), torch.randn(3, 18, 6, 7) * 3, torch.randn(6, 4, 3, 3)),
        *(boxes_for(2, 1, 1, 20)[:, 1:], boxes_for(3, 6, 1, 20)[:, 1:]),
    )
    for own, right in zip(run(proto, *arguments), Functions()(*arguments), strict=True):
        torch.testing.assert_close(own, right, rtol=3e-6, atol=3e-6)


@torch.no_grad()
def test_an_opset_without_the_operator_is_refused():
    pytest.importorskip("onnxscript")
    layer = DeformConv2d(2, 2, 3).eval()
    with pytest.raises(Exception, match=r"expected opset_version to be at least 19.* but got 18"):
        to_onnx(layer, (torch.randn(1, 2, 5, 5),), opset=18)


@torch.no_grad()
def test_sampling_that_depends_on_the_boxes_is_refused():
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="expected samples_per_bin to be at least 1"):
        to_onnx(Adapting(), (torch.randn(1, 2, 5, 5), boxes_for(0, 3, 1, 5)))


@torch.no_grad()
def test_a_program_without_own_operators():
    layers = Layers().eval()
    arguments = torch.randn(2, 6, 21, 27), boxes_for(0, 5, 2, 24)
    dynamic = ({0: Dim("batch"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim("boxes")})
    program = torch.export.export(layers, arguments, dynamic_shapes=dynamic)
    own = [node for node in program.graph.nodes if "deformnet" in str(node.target)]
    assert len(own) > 3
    program = program.run_decompositions(decompositions())
    assert not [node for node in program.graph.nodes if "deformnet" in str(node.target)]
    arguments = torch.randn(3, 6, 30, 34), boxes_for(1, 9, 3, 30)
    for found, right in zip(program.module()(*arguments), layers(*arguments), strict=True):
        torch.testing.assert_close(found, right, rtol=2e-3, atol=3e-5, equal_nan=True)


def test_a_program_exports_to_onnx_by_a_table():
    pytest.importorskip("onnxscript")
    layer, images = DeformConv2d(2, 2, 3).eval(), torch.randn(1, 2, 5, 5)
    program = torch.export.export(layer, (images,))
    program = program.run_decompositions(decompositions(onnx=True))
    proto = to_onnx(program, ())
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 1


def test_the_standard_form_of_convolution_is_the_reference():
    for seed in range(60):
        case = deform_conv_cases.random_case(seed)
        for border in ("zeros", "msra2017"):
            geometry = Geometry(case.stride, case.padding, case.dilation, border)
            arguments = case.input, case.offset, case.weight, case.bias, case.mask, geometry
            found = deform_conv_standard.deform_conv2d(*arguments)
            expected = deform_conv_reference.deform_conv2d(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@roi_pool_cases.EVERY_SAMPLING
def test_the_standard_form_of_pooling_is_the_reference(sampling):
    for seed in range(60):
        case = roi_pool_cases.random_case(seed, sampling)
        if case.samples_per_bin == 0:
            continue
        tensors, rule = case.operator[:3], Rule(*case.operator[3:])
        found = roi_pool_standard.roi_pool(*tensors, rule)
        expected = roi_pool_reference.roi_pool(*tensors, rule)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@roi_pool_cases.EVERY_SAMPLING
def test_the_standard_form_of_pooling_with_values_that_are_not_finite(sampling):
    huge, infinite, nan = 1e30, torch.inf, torch.nan
    boxes = torch.tensor(
        [
            *([0, 1, 1, 5, 5], [0, 0, 0, infinite, 3], [0, nan, 0, 2, 3]),
            *([0, -huge, -huge, huge, huge], [7, 0, 0, 3, 3], [0, 2, 2, 4, 4]),
        ]
    )
    offset = torch.zeros(6, 2, 2, 2)
    offset[0, 0, 0, 0], offset[0, 1, 0, 1] = infinite, nan
    offset[5, 0, 0, 0], offset[5, 0, 1, 1] = huge, -huge
    rule, maps = Rule((2, 2), 0.5, 0.1, sampling, 3, False), torch.randn(1, 3, 6, 7)
    found = roi_pool_standard.roi_pool(maps, boxes, offset, rule)
    expected = roi_pool_reference.roi_pool(maps, boxes, offset, rule)
    torch.testing.assert_close(found, expected, equal_nan=True)
