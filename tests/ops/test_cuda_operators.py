"""All operators with tensors on a GPU, through the public functions."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cuda_cases import (
    CASES,
    EVERY_CASE,
    call,
    differentiable,
    exact,
    leaves,
    needs_gpu,
    on,
    output_gradient,
    run,
    to_cpu,
)
from operator_testing import assert_same
from torch.nn.parallel import DistributedDataParallel

from deformnet.nn import DeformConv2d
from deformnet.ops import backends, deform_roi_pool

pytestmark = needs_gpu

NAN, INF = float("nan"), float("inf")
DTYPES = {
    "float64": (torch.float64, None, 1e-10),
    "float32": (torch.float32, None, 2e-5),
    "bfloat16": (torch.bfloat16, None, 2e-2),
    "bfloat16, positions in float32": (torch.bfloat16, torch.float32, 2e-2),
    "float16": (torch.float16, None, 3e-3),
    "float16, positions in float32": (torch.float16, torch.float32, 3e-3),
}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_auto_takes_triton():
    assert backends.resolve("auto", "cuda") == "triton"


@EVERY_CASE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_agrees_with_the_reference(name, dtype, memory_format):
    kind, positions, tolerance = DTYPES[dtype]
    case = on("cuda", CASES[name].to(kind, positions))
    case = replace(case, input=case.input.contiguous(memory_format=memory_format))
    found = run(case)
    for key, leaf in leaves(case).items():
        assert found[f"grad_{key}"].dtype == leaf.dtype
        assert found[f"grad_{key}"].device == leaf.device
    assert found["output"].dtype == kind
    assert found["grad_input"].is_contiguous(memory_format=memory_format)
    assert_same(to_cpu(found), exact(case), tolerance)


def test_tf32_where_pytorch_takes_it():
    case = on("cuda", CASES["convolution"].to(torch.float32))
    precise = to_cpu(run(case))
    torch.backends.cudnn.allow_tf32 = True  # a fixture puts it back
    found = to_cpu(run(case))
    assert not found["output"].equal(precise["output"])
    assert_same(found, exact(case), 3e-3)


def test_tiles_chosen_by_timing(monkeypatch, tmp_path):
    import triton

    from deformnet.ops.triton import tuning

    monkeypatch.setenv("DEFORMNET_AUTOTUNE", "1")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    tuning.forget()
    case = on("cuda", CASES["convolution"].to(torch.bfloat16, torch.float32))
    assert_same(to_cpu(run(case)), exact(case), 2e-2)
    (file,) = (tmp_path / "deformnet").iterdir()
    for kernel in ("forward", "positions", "weight"):
        assert f'"{kernel} half ' in file.read_text()
    tuning.forget()


@EVERY_CASE
def test_autocast(name):
    case = on("cuda", CASES[name].to(torch.float32))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = run(case, output_gradient(case).bfloat16())
    assert found["output"].dtype == torch.bfloat16
    for key, leaf in leaves(case).items():
        assert found[f"grad_{key}"].dtype == leaf.dtype
    assert found["output"].equal(call(case.to(torch.bfloat16, torch.float32)))
    assert_same(to_cpu(found), exact(case), 2e-2)


@EVERY_CASE
def test_compiles(name):
    torch._dynamo.reset()
    case = differentiable(on("cuda", CASES[name]))
    names, tensors = zip(*leaves(case).items(), strict=True)

    def function(*tensors):
        return 2 * call(replace(case, **dict(zip(names, tensors, strict=True)))).relu()

    compiled = torch.compile(function, fullgraph=True)
    gradient = output_gradient(case)
    results = []
    for one in (compiled, function):
        output = one(*tensors)
        gradients = torch.autograd.grad(output, tensors, gradient)
        results.append({"output": output.detach(), **dict(zip(names, gradients, strict=True))})
    assert_same(*results, 1e-10)


@EVERY_CASE
def test_a_graph_is_captured_and_replayed(name):
    case = differentiable(on("cuda", CASES[name].to(torch.float32)))
    gradient = output_gradient(case)

    def step():
        output = call(case)
        gradients = torch.autograd.grad(output, list(leaves(case).values()), gradient)
        return dict(zip(["output", *leaves(case)], [output.detach(), *gradients], strict=True))

    # Kernels must be there before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    with torch.no_grad():
        for leaf in leaves(case).values():
            leaf.mul_(0.75)
    graph.replay()
    assert_same(captured, step(), 1e-5)


@EVERY_CASE
def test_work_goes_to_the_current_stream(name):
    case = on("cuda", CASES[name].to(torch.float32))
    gradient = output_gradient(case)
    expected = run(case, gradient)
    late = replace(case, input=torch.zeros_like(case.input))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # The map gets its values long after all has been launched.
        torch.cuda._sleep(100_000_000)
        late.input.copy_(case.input)
        found = run(late, gradient)
    torch.cuda.synchronize()
    assert_same(found, expected, 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
@EVERY_CASE
def test_a_card_that_is_not_the_current_one(name):
    case = CASES[name].to(torch.float32)
    assert torch.cuda.current_device() == 0
    found = run(on("cuda:1", case))
    assert {tensor.device for tensor in found.values()} == {torch.device("cuda:1")}
    assert_same(to_cpu(found), to_cpu(run(on("cuda:0", case))), 1e-5)


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_give_the_same_bits(name, dtype, deterministic):
    case = on("cuda", CASES[name].to(dtype))
    one, other = run(case), run(case)
    for key, tensor in one.items():
        assert tensor.equal(other[key]), key
    assert_same(to_cpu(one), exact(case), DTYPES[str(dtype).removeprefix("torch.")][2])


@EVERY_CASE
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_waits_for_the_gpu(name, deterministic):
    case = on("cuda", CASES[name].to(torch.float32))
    gradient = output_gradient(case)
    torch.use_deterministic_algorithms(deterministic)
    try:
        run(case, gradient)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        run(case, gradient)
        # This would be noticed.
        with pytest.raises(RuntimeError, match="synchroniz"):
            gradient.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


def test_a_list_of_boxes_waits_for_nothing():
    case = on("cuda", CASES["roi"].to(torch.float32))
    boxes = [case.boxes[:9, 1:], case.boxes[9:, 1:]]
    arguments = boxes, case.offset, case.output_size, case.spatial_scale
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = deform_roi_pool(case.input, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    image = torch.tensor([0.0] * 9 + [1.0] * 14, device="cuda")[:, None]
    joined = torch.cat([image, case.boxes[:, 1:]], dim=1)
    assert found.equal(deform_roi_pool(case.input, joined, *arguments[1:]))


@pytest.mark.parametrize("name", ["roi", "ps"])
@pytest.mark.parametrize("image", [-1.0, 2.0, 2.0**24, NAN])
def test_boxes_of_no_image_give_nan_in_their_rows(name, image):
    # Their indices are seen only on the GPU.
    case = on("cuda", CASES[name].to(torch.float32))
    clean = run(case)
    case.boxes[5, 0] = image
    found = run(case)
    others = torch.arange(case.boxes.shape[0]) != 5
    assert found["output"][5].isnan().all()
    assert found["output"][others].equal(clean["output"][others])
    assert found["grad_input"].isfinite().all()


@EVERY_CASE
def test_positions_that_are_not_finite(name):
    case = CASES[name].to(torch.float32)
    offset = case.offset.clone()
    for k, value in enumerate((NAN, INF, -INF, 1e30, -(2.0**31), 2.0**63)):
        offset[k % offset.shape[0], k % offset.shape[1], k % 3, k % 5] = value
    case = replace(case, offset=offset)
    if name in ("roi", "ps"):
        boxes = case.boxes.clone()
        boxes[7, 2], boxes[8, 3] = NAN, INF
        case = replace(case, boxes=boxes)
    case = on("cuda", case)
    assert_same(to_cpu(run(case)), exact(case), 2e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_distributed_data_parallel(backend, tmp_path):
    if not dist.is_backend_available(backend):
        pytest.skip(f"PyTorch was built without {backend}")
    torch.manual_seed(0)
    plain = DeformConv2d(6, 8, 3, padding=1, modulated=True).cuda()
    input = torch.randn(2, 6, 9, 7, device="cuda")
    plain(input).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    store = f"file://{tmp_path}/store"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(plain, device_ids=[torch.cuda.current_device()])
        parallel(input).square().sum().backward()
        found = {key: p.grad.clone() for key, p in plain.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()
    assert set(found) == {"weight", "bias", "conv_offset.weight", "conv_offset.bias"}
    assert_same(found, expected, 1e-5)
