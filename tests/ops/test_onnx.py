"""Operators and layers in ONNX graphs and exported programs, against the operators themselves."""

import importlib
import random

import deform_conv_cases
import pytest
import roi_pool_cases
import torch
from torch import Tensor, nn

from deformnet.nn import DeformConv2d, DeformPSRoIPool2d, DeformRoIPool2d
from deformnet.ops import decompositions, deform_conv2d, deform_roi_pool
from deformnet.ops.deform_conv import reference as deform_conv_reference
from deformnet.ops.deform_conv import standard as deform_conv_standard
from deformnet.ops.deform_conv.checks import Geometry
from deformnet.ops.roi_pool import reference as roi_pool_reference
from deformnet.ops.roi_pool import standard as roi_pool_standard
from deformnet.ops.roi_pool.checks import Rule

MAPS = {0: "batch", 2: "height", 3: "width"}


def shifted(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, with offsets that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval()


class Convolutions(nn.Module):
    """Layers of each kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = DeformConv2d(6, 8, 3, 2, 1, groups=2, offset_groups=3)
        self.modulated = DeformConv2d(8, 18, (3, 2), 1, 2, 2, bias=False, modulated=True)
        self.low = DeformConv2d(18, 4, 3, padding=1).half()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.modulated(self.plain(images))
        return maps, self.low(maps.half()).float()


class Pools(nn.Module):
    """Both RoI poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = DeformRoIPool2d(18, 3, 0.25, sampling="aligned", samples_per_bin=2)
        self.ps_pool = DeformPSRoIPool2d(18, 3, 0.25, offset_groups=2)

    def forward(self, maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool(maps, boxes), self.ps_pool(maps, maps, boxes)


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
def test_convolutions_in_onnx_with_dynamic_shapes():
    layers = shifted(Convolutions())
    proto = to_onnx(layers, (torch.randn(2, 6, 21, 27),), (MAPS,))
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 3
    assert proto.opset_import[0].version >= 19
    for batch, height in ((3, 30), (1, 17)):
        images = torch.randn(batch, 6, height, height + 4)
        (found, low), (expected, low_expected) = run(proto, images), layers(images)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(low, low_expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_pools_in_onnx_with_any_number_of_boxes():
    pools, maps = shifted(Pools()), torch.randn(2, 18, 9, 11)
    proto = to_onnx(pools, (maps, boxes_for(0, 5, 2, 36)), (None, {0: "boxes"}))
    for count in (9, 0):
        boxes = boxes_for(1, count, 2, 36)
        for found, expected in zip(run(proto, maps, boxes), pools(maps, boxes), strict=True):
            torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6, equal_nan=True)


@torch.no_grad()
def test_functions_in_onnx_of_an_old_opset():
    maps = torch.randn(2, 4, 9, 8), torch.randn(2, 18, 9, 8) * 3, torch.randn(6, 4, 3, 3)
    arguments = *maps, boxes_for(0, 3, 1, 30)[:, 1:], boxes_for(1, 4, 1, 30)[:, 1:]
    proto = to_onnx(Functions().eval(), arguments, (None, None, None, {0: "a"}, {0: "b"}), opset=18)
    assert not [node for node in proto.graph.node if node.op_type == "DeformConv"]
    arguments = *maps, boxes_for(2, 1, 1, 20)[:, 1:], boxes_for(3, 6, 1, 20)[:, 1:]
    for own, right in zip(run(proto, *arguments), Functions()(*arguments), strict=True):
        torch.testing.assert_close(own, right, rtol=3e-6, atol=3e-6)


@torch.no_grad()
def test_an_opset_without_the_operator_is_refused():
    pytest.importorskip("onnxscript")
    layer = DeformConv2d(2, 2, 3).eval()
    with pytest.raises(Exception, match=r"expected opset_version to be at least 19.* but got 18"):
        to_onnx(layer, (torch.randn(1, 2, 5, 5),), opset=18)


@pytest.mark.filterwarnings("ignore")  # the exporter is deprecated
def test_the_legacy_exporter_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    layer, images = DeformConv2d(2, 2, 3).eval(), torch.randn(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"expected torch\.onnx\.export with dynamo=True"):
        torch.onnx.export(layer, (images,), tmp_path / "net.onnx", dynamo=False)
    assert torch.jit.trace(layer, images)(images).shape == (1, 2, 3, 3)


@torch.no_grad()
def test_sampling_that_depends_on_the_boxes_is_refused():
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="expected samples_per_bin to be at least 1"):
        to_onnx(Adapting().eval(), (torch.randn(1, 2, 5, 5), boxes_for(0, 3, 1, 5)))


@torch.no_grad()
def test_programs_without_own_operators():
    boxes = boxes_for(0, 5, 2, 24)
    for module, arguments in (
        (Convolutions(), (torch.randn(2, 6, 21, 27),)),
        (Pools(), (torch.randn(2, 18, 9, 11), boxes)),
    ):
        program = torch.export.export(shifted(module), arguments)
        assert any("deformnet" in str(node.target) for node in program.graph.nodes)
        program = program.run_decompositions(decompositions())
        assert not any("deformnet" in str(node.target) for node in program.graph.nodes)
        for found, right in zip(program.module()(*arguments), module(*arguments), strict=True):
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


def node_cases(operator: str):
    """ONNX's own test cases for an operator: attributes, inputs (None if missing) and output."""
    helper = pytest.importorskip("onnx.helper")
    importlib.import_module(f"onnx.backend.test.case.node.{operator.lower()}")
    # The public function imports the cases of all operators, which takes half a minute.
    from onnx.backend.test.case.node import _NodeTestCases

    for case in _NodeTestCases:
        node = case.model.graph.node[0]
        if node.op_type != operator:
            continue
        attributes = {it.name: helper.get_attribute_value(it) for it in node.attribute}
        inputs, (output,) = case.data_sets[0]
        given = {
            it.name: torch.from_numpy(v)
            for it, v in zip(case.model.graph.input, inputs, strict=True)
        }
        yield attributes, [given.get(name) for name in node.input], torch.from_numpy(output)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_onnx_node_cases_of_deformable_convolution(backend):
    count = 0
    for attributes, inputs, expected in node_cases("DeformConv"):
        x, weight, offset, bias, mask = (*inputs, None, None)[:5]
        geometry = attributes.get("strides", [1, 1]), attributes["pads"][:2]
        found = deform_conv2d(x, offset, weight, bias, *geometry, mask=mask, backend=backend)
        torch.testing.assert_close(found, expected)
        count += 1
    assert count == 4


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_onnx_node_cases_of_roi_align(backend):
    """The two cases with mode "avg", which are rounded to four digits; the third uses "max"."""
    count = 0
    for attributes, (x, corners, image), expected in node_cases("RoiAlign"):
        if attributes.get("mode") == b"max":
            continue
        boxes = torch.cat((image[:, None].to(corners.dtype), corners), dim=1)
        scale = attributes["spatial_scale"]
        if attributes["coordinate_transformation_mode"] == b"output_half_pixel":
            # Not shifted by half a pixel, and at least one pixel in size.
            boxes[:, 1:] += 0.5 / scale
            boxes[:, 3:] = torch.maximum(boxes[:, 3:], boxes[:, 1:3] + 1 / scale)
        size = attributes["output_height"], attributes["output_width"]
        samples = {"samples_per_bin": attributes["sampling_ratio"], "sampling": "aligned"}
        found = deform_roi_pool(x, boxes, None, size, scale, **samples, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        count += 1
    assert count == 2
