"""Every backend against other implementations, and the fast ones against the reference."""

import inspect
import itertools
from dataclasses import replace
from functools import partial

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from deform_conv_cases import EVERY_BORDER, Case, large_case, output_gradient, random_case, run
from operator_testing import Normal, assert_same, differentiate

from deformnet import ops
from deformnet.ops import deform_conv2d


def test_public_names():
    assert ops.__all__ == [
        "decompositions",
        "deform_conv2d",
        "deform_ps_roi_pool",
        "deform_roi_pool",
        "using",
    ]


def test_the_first_arguments_are_torchvisions():
    theirs = list(inspect.signature(torchvision.ops.deform_conv2d).parameters.values())
    ours = list(inspect.signature(deform_conv2d).parameters.values())
    assert [p.name for p in ours[:8]] == [p.name for p in theirs]
    assert [p.default for p in ours[3:7]] == [None, 1, 0, 1]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[8:])


@pytest.mark.parametrize("seed", range(220))
def test_torchvision(backend, seed):
    case = random_case(seed)

    def theirs(**leaves: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.deform_conv2d(*replace(case, **leaves).public)

    expected = differentiate(theirs, case.tensors, output_gradient(case))
    assert_same(run(case, backend), expected, 1e-10)


@EVERY_BORDER
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_fast_against_reference(fast, seed, border):
    check_against_reference(random_case(seed), fast, border)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@EVERY_BORDER
def test_fast_against_reference_on_larger_maps(fast, seed, border, channels_last):
    check_against_reference(large_case(seed, channels_last=channels_last), fast, border)


def check_against_reference(case: Case, fast: str, border: str) -> None:
    assert_same(run(case, fast, border), run(case, "reference", border), 1e-10)
    single = case.to(torch.float32)
    # Rounded to float32 first, so that both see the same positions; then exact arithmetic.
    exact = run(single.to(torch.float64), "reference", border)
    assert_same(run(single, fast, border), exact, 2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_zero_offsets_are_a_convolution(backend, seed):
    case = random_case(seed, modulated=seed % 2 == 1)
    mask = None if case.mask is None else torch.ones_like(case.mask)
    case = replace(case, offset=torch.zeros_like(case.offset), mask=mask)
    leaves = {k: v for k, v in case.tensors.items() if k not in ("offset", "mask")}
    convolve = partial(
        F.conv2d,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.input.shape[1] // case.weight.shape[1],
    )
    expected = differentiate(convolve, leaves, output_gradient(case))
    found = run(case, backend)
    assert_same({name: found[name] for name in expected}, expected, 1e-11)


@pytest.mark.parametrize(("dy", "dx"), [(1, 0), (0, -1), (-2, 3), (4, 4)])
def test_whole_offsets_are_shifts(backend, dy, dx):
    normal = Normal()
    input, weight = normal(2, 4, 9, 8), normal(3, 4, 3, 3)
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
    sizes = {**{name: feed.shape for name, feed in feeds.items()}, "output": case.output_size()}
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)
        for name, size in sizes.items()
    ]
    graph = onnx.helper.make_graph([node], "deform_conv", values[:-1], values[-1:])
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
    assert_same({"": found}, {"": wanted}, 1e-5)
