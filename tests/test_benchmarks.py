"""Benchmarks of the operators on toy layers: what is compared, and what is recorded."""

import json
import sys
from itertools import groupby

import pytest
import torch
from benchmarks import calls, deform_conv, depthwise, roi_pool
from benchmarks.calls import require_close
from benchmarks.shapes import Shape
from benchmarks.tables import Table

import deformnet.paper.timing
from deformnet.ops import cpu
from deformnet.paper.timing import Timing

PASSES = ("forward", "forward and backward")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(deformnet.paper.timing, "WARM_UP_SECONDS", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    benchmark.main()


def recorded(monkeypatch, benchmark):
    """The numbers of threads that measurements begin with."""
    counts = []

    def compare(calls, *, rounds):
        counts.append(torch.get_num_threads())
        return deformnet.paper.timing.compare(calls, rounds=rounds)

    monkeypatch.setattr(benchmark, "compare", compare)
    return counts


def names(table):
    (row, *_) = table["rows"].values()
    return set(row)


def test_deform_conv(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(deform_conv, "SHAPES", (Shape(2, 4, 6, 5),))
    monkeypatch.setattr(deform_conv.memory, "in_another_process", lambda _: {"1": {"conv2d": 1}})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN has already read it; only recorded
    options = ("--threads", 1, 2, "--rounds", 1, "--out", tmp_path, "--name", "toy")
    counts = recorded(monkeypatch, deform_conv)
    run(deform_conv, monkeypatch, *options)
    assert counts == [1] * 9 + [2] * 11  # two more: other kinds of offsets
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["instruction set"] == cpu.instruction_set()
    assert found["PyTorch CPU capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["oneDNN max CPU ISA"] == "AVX2"
    assert "oneDNN limited to AVX2" in printed
    for threads in ("1 thread", "2 threads"):
        training = {"conv2d", "deformnet", "torchvision"}
        others = {"onnxruntime", "openvino", "ncnn"}
        assert names(found[f"forward, {threads}"]) == training | others
        for title in PASSES:
            assert names(found[f"{title}, {threads}"]) >= training
            layer = found[f"{title}, layer, {threads}"]
            assert names(layer) == {"conv2d", "offset convolution", "whole layer"}
            for dtype in ("bfloat16", "float16"):
                table = found[f"{title}, {dtype}, {threads}"]
                assert table["base"] == "conv2d"
                both = {"conv2d", "deformnet"}
                assert names(table) == both | {f"{name}, float32" for name in both}
                assert f"\n{title}, {dtype}, {threads}: milliseconds of conv2d" in printed
                assert (tmp_path / f"toy-{title}-{dtype}-{threads}.png".replace(" ", "-")).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_calls_compute_in_half_precision(dtype, monkeypatch):
    """The calls without "float32" compute in half precision, forward and backward."""
    calls = []

    def compare(given, *, rounds):
        calls.append({name: call() for name, call in given.items()})
        return {}

    monkeypatch.setattr(deform_conv, "compare", compare)
    deform_conv.measure_half(Shape(1, 4, 6, 5), dtype, rounds=1)
    forward, both = calls
    for name in forward:
        wanted = torch.float32 if "float32" in name else dtype
        assert forward[name].dtype == wanted
        assert [gradient.dtype for gradient in both[name][:2]] == [wanted] * 2
    assert both["deformnet"][2].dtype == torch.float32  # of the offsets


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 11), (2.0, 3)])
def test_slow_convolutions_get_three_rounds(seconds, rounds, monkeypatch):
    found = []
    monkeypatch.setattr(deform_conv, "seconds", lambda _: seconds)
    monkeypatch.setattr(deform_conv, "compare", lambda _, rounds: found.append(rounds))
    deform_conv.measure_half(Shape(1, 4, 6, 5), torch.float16, rounds=11)
    assert found == [rounds, rounds]


def test_a_table_reports_the_fewest_rounds_of_its_rows():
    rows = {str(count): {"conv2d": Timing((1.0,) * count)} for count in (11, 3)}
    assert Table("", "conv2d", rows).to_dict()["rounds"] == 3


def test_roi_pool(monkeypatch, tmp_path):
    pooling = roi_pool.Pooling("PS", 2, 1, sensitive=True)
    monkeypatch.setattr(roi_pool, "POOLINGS", (roi_pool.Pooling("RoI", 3, 1, False), pooling))
    monkeypatch.setattr(roi_pool, "BOXES", 3)
    counts = recorded(monkeypatch, roi_pool)
    run(roi_pool, monkeypatch, "--threads", 1, 2, "--rounds", 1, "--out", tmp_path)
    assert counts == [1] * 4 + [2] * 4
    found = json.loads((tmp_path / "roi_pool.json").read_text())
    for passes in ("forward", "backward"):
        for threads in ("1 thread", "2 threads"):
            for dtype in ("float32", "float16"):
                table = found[f"{passes}, {dtype}, {threads}"]
                assert table["base"] == "torchvision"
                assert names(table) == {"torchvision", "bins", "msra", "aligned"}
            half = found[f"{passes}, half precision, {threads}"]
            assert half["base"] == "float32"
            assert names(half) == {"float32", "bfloat16", "float16"}
            assert {row.rpartition(", ")[2] for row in half["rows"]} == set(roi_pool.RULES)
    assert (tmp_path / "roi_pool-forward-float32-1-thread.png").exists()


def test_roi_pool_computes_in_the_dtype(monkeypatch):
    monkeypatch.setattr(roi_pool, "BOXES", 3)
    pooling = roi_pool.POOLINGS[-1]
    for name, dtype in roi_pool.DTYPES.items():
        tensors = roi_pool.make_tensors(pooling, dtype)
        for call in roi_pool.calls(pooling, tensors).items():
            if call[0] != "torchvision" or name in roi_pool.THEIRS:
                assert call[1]().dtype == dtype
                gradients = roi_pool.backward(*call, tensors)()
                assert gradients[0].dtype == dtype


def test_depthwise(monkeypatch, capsys):
    monkeypatch.setattr(depthwise, "LAYERS", [(1, 8, 6, 3), (2, 8, 6, 5)])
    seen = []
    convolution = depthwise.deform_conv2d

    def convolve(input, offset, weight, *others, **options):
        seen.append((input, offset))
        return convolution(input, offset, weight, *others, **options)

    monkeypatch.setattr(depthwise, "deform_conv2d", convolve)
    run(depthwise, monkeypatch, "--seconds", 0)
    rows = [line for line in capsys.readouterr().out.splitlines() if "6x6" in line]
    for layout in ("NCHW", "channels-last"):
        assert sum(layout in row for row in rows) == 4  # two layers in two dtypes
    last = [
        [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in pair]
        for pair in seen
    ]
    assert [key for key, _ in groupby(last)] == 2 * [[False, False], [True, True]]


def test_wrong_results_are_not_timed():
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        require_close("", exact.to(dtype), exact)
        with pytest.raises(SystemExit, match=r"a layer: expected an error below .*, but got 0\.2"):
            require_close("a layer", (exact * 1.25).to(dtype), exact)


def test_measurements_check_their_results(monkeypatch):
    """Of an operator that is off by a fifth."""

    def wrong(operator):
        return lambda *arguments, backend="auto", **options: (
            operator(*arguments, backend=backend, **options)
            * (1 if backend == "reference" else 1.2)
        )

    monkeypatch.setattr(roi_pool, "BOXES", 3)
    monkeypatch.setattr(roi_pool, "deform_roi_pool", wrong(roi_pool.deform_roi_pool))
    with pytest.raises(SystemExit, match="expected an error below"):
        roi_pool.measure(roi_pool.POOLINGS[0], rounds=1)
    monkeypatch.setattr(calls, "deform_conv2d", wrong(calls.deform_conv2d))
    with pytest.raises(SystemExit, match="expected an error below"):
        deform_conv.measure_half(Shape(1, 4, 6, 5), torch.bfloat16, rounds=1)
    monkeypatch.setattr(depthwise, "deform_conv2d", wrong(depthwise.deform_conv2d))
    with pytest.raises(SystemExit, match="expected an error below"):
        run(depthwise, monkeypatch, "--seconds", 0)
