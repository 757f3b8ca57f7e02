"""Every backend against other implementations, and the fast ones against the reference."""

import inspect
import itertools
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from deform_conv_cases import Case, large_case, output_gradient, random_case, run
from operator_testing import assert_same

from deformnet import ops
from deformnet.ops import deform_conv2d


def test_public_names():
    assert ops.__all__ == ["deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool", "using"]


def test_the_first_arguments_are_torchvisions():
    theirs = list(inspect.signature(torchvision.ops.deform_conv2d).parameters.values())
    ours = list(inspect.signature(deform_conv2d).parameters.values())
    assert [p.name for p in ours[:8]] == [p.name for p in theirs]
    assert [p.default for p in ours[3:7]] == [None, 1, 0, 1]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[8:])


def run_torchvision(case: Case) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    output = torchvision.ops.deform_conv2d(*replace(case, **leaves).public)
    gradients = torch.autograd.grad(output, list(leaves.values()), output_gradient(case))
    return {
        "output": output.detach(),
        **{f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
    }


@pytest.mark.parametrize("seed", range(220))
def test_torchvision(backend, seed):
    case = random_case(seed)
    assert_same(run(case, backend), run_torchvision(case), 1e-10)


@pytest.mark.parametrize("border", ["zeros", "msra2017"])
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_fast_against_reference(fast, seed, border):
    case = random_case(seed)
    wanted = run(case, "reference", border)
    assert_same(run(case, fast, border), wanted, 1e-10)
    assert_same(run(case.to(torch.float32), fast, border), wanted_in_float32(case, border), 2e-5)


def wanted_in_float32(case: Case, border: str) -> dict[str, torch.Tensor]:
    # Rounded to float32 first, so that both see the same positions; then exact arithmetic.
    return run(case.to(torch.float32).to(torch.float64), "reference", border)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("border", ["zeros", "msra2017"])
def test_fast_against_reference_on_larger_maps(fast, seed, border, channels_last):
    case = large_case(seed, channels_last=channels_last)
    assert_same(run(case, fast, border), run(case, "reference", border), 1e-10)
    assert_same(run(case.to(torch.float32), fast, border), wanted_in_float32(case, border), 2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_zero_offsets_are_a_convolution(backend, seed):
    case = random_case(seed, modulated=seed % 2 == 1)
    mask = None if case.mask is None else torch.ones_like(case.mask)
    case = replace(case, offset=torch.zeros_like(case.offset), mask=mask)
    groups = case.input.shape[1] // case.weight.shape[1]
    leaves = [case.input, case.weight, *([] if case.bias is None else [case.bias])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    steps = case.stride, case.padding, case.dilation
    plain = F.conv2d(leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None, *steps, groups)
    gradients = torch.autograd.grad(plain, leaves, output_gradient(case))
    found = run(case, backend)
    torch.testing.assert_close(found["output"], plain.detach(), rtol=0, atol=1e-11)
    for name, gradient in zip(("input", "weight", "bias"), gradients, strict=False):
        torch.testing.assert_close(found[f"grad_{name}"], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (0, -1), (-2, 3), (4, 4)])
def test_whole_offsets_are_shifts(backend, dy, dx):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64)
    offset = torch.tensor([dy, dx], dtype=torch.float64).repeat(9)[None, :, None, None]
    found = deform_conv2d(input, offset.expand(2, 18, 9, 8), weight, padding=1, backend=backend)
    # Reading at p + d is convolving the map that is shifted by -d, zeros coming in.
    far = 6
    padded = F.pad(input, (far, far, far, far))
    rows, columns = slice(far + dy - 1, far + dy + 10), slice(far + dx - 1, far + dx + 9)
    wanted = F.conv2d(padded[..., rows, columns], weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_each_tap_and_group_has_its_own_offset(backend):
    # One input pixel, one tap and one group at a time: the layout of the offset's channels.
    kh, kw, groups = 2, 3, 2
    for g, i, j in itertools.product(range(groups), range(kh), range(kw)):
        input = torch.zeros(1, 4, 9, 9, dtype=torch.float64)
        input[:, 2 * g + 1, 4 + i + 2, 4 + j - 1] = 1
        offset = torch.zeros(1, 2 * groups * kh * kw, 8, 7, dtype=torch.float64)
        channel = 2 * (g * kh * kw + i * kw + j)
        offset[:, channel], offset[:, channel + 1] = 2, -1
        weight = torch.zeros(1, 4, kh, kw, dtype=torch.float64)
        weight[0, 2 * g + 1, i, j] = 5
        found = deform_conv2d(input, offset, weight, backend=backend)
        assert found[0, 0, 4, 4] == 5
        assert found.count_nonzero() == 1


def run_onnxruntime(case: Case) -> torch.Tensor:
    names = ["input", "weight", "offset", "bias", "mask"]
    feeds = {name: tensor.numpy(force=True) for name, tensor in case.tensors.items()}
    node = onnx.helper.make_node(
        "DeformConv",
        [name if name in feeds else "" for name in names],
        ["output"],
        kernel_shape=case.weight.shape[2:],
        strides=case.stride,
        pads=[*case.padding, *case.padding],
        dilations=case.dilation,
        group=case.input.shape[1] // case.weight.shape[1],
        offset_group=case.offset.shape[1] // (2 * case.weight[0, 0].numel()),
    )
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in [
            *((name, feed.shape) for name, feed in feeds.items()),
            ("output", case.output_size()),
        ]
    }
    output = values.pop("output")
    graph = onnx.helper.make_graph([node], "deform_conv", list(values.values()), [output])
    opset = onnx.helper.make_opsetid("", 19)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("seed", range(500, 530))
def test_onnxruntime(backend, seed):
    case = random_case(seed).to(torch.float32)
    case = replace(case, input=case.input.contiguous())
    found = deform_conv2d(*case.public, backend=backend)
    wanted = run_onnxruntime(case)
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)
