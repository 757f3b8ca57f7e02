"""Selection of a backend, and the reasons of those that cannot run: both operators."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from cuda_cases import CASES, call
from deform_conv_cases import random_case
from operator_testing import OPERATORS

from deformnet.ops import backends, cpu, deform_conv2d, triton, using
from deformnet.ops.cpu import loading


def test_names():
    assert backends.names() == ("reference", "cpu", "triton")


def test_the_cpu_kernels_are_built():
    # Many tests skip without them: their absence must not pass for success.
    assert backends.why_unavailable("cpu") is None


def test_reasons():
    assert backends.why_unavailable("reference") is None
    assert backends.why_unavailable("reference", "cuda") is None
    assert "on cuda" in backends.why_unavailable("cpu", "cuda")
    assert "not on cpu" in backends.why_unavailable("triton", "cpu")
    with pytest.raises(ValueError, match=r"expected backend to be one of .*, but got 'best'"):
        backends.why_unavailable("best")


def test_auto_takes_the_fast_kernels_silently(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", "cpu") == fast


def test_a_backend_by_name_runs_or_says_why_not():
    case = random_case(0)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: .*not on cpu"):
        deform_conv2d(*case.public, backend="triton")


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(backends, "CPU_UNAVAILABLE", "the file is gone")
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["convolution", "ps"])
def test_auto_falls_back_with_one_warning(without_kernels, fresh_compiler, name, mode):
    case = CASES[name]
    function = call
    if mode == "compiled":
        function = torch.compile(call, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [function(case) for _ in range(3)]
    ours = [w for w in caught if "deformnet" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].category is RuntimeWarning
    assert "reference" in str(ours[0].message)
    assert "the file is gone" in str(ours[0].message)
    expected = call(case, "reference")
    for result in results:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["convolution", "ps"])
def test_a_backend_by_name_never_falls_back(without_kernels, name):
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: the file is gone"):
        call(CASES[name], "cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: the file is gone"):
        using("cpu").__enter__()
    operator = OPERATORS[name == "ps"]
    with pytest.raises(RuntimeError, match="the file is gone"):
        operator.forward(*CASES[name].operator, *(("zeros",) if name != "ps" else ()))


def test_using_an_unknown_backend():
    with pytest.raises(ValueError, match=r"expected backend to be one of auto, .* got 'best'"):
        using("best").__enter__()


def test_a_backend_in_use_that_cannot_take_the_device_says_so():
    with using("cpu"), pytest.raises(RuntimeError, match="on the CPU, not on cuda"):
        backends.resolve("auto", "cuda")
    with using("reference"):
        assert backends.resolve("auto", "cuda") == "reference"
        assert backends.resolve("cpu", "cpu") == "cpu"


@pytest.mark.parametrize("reason", ["no C++ compiler was found", "the disk was full"])
def test_kernels_that_were_not_built_say_why_and_what_to_do(monkeypatch, tmp_path, reason):
    if "disk" in reason:
        (tmp_path / "not_built.txt").write_text(f"{reason}\n")
    monkeypatch.setattr(cpu, "__path__", [str(tmp_path)])
    loading._library.cache_clear()
    found = loading.why_unavailable.__wrapped__()
    loading._library.cache_clear()
    assert found == (
        f"the CPU kernels were not built when deformnet was installed: {reason}; "
        "install GCC (Clang on macOS and Windows) and reinstall deformnet, or install a wheel"
    )


def test_a_device_without_kernels_falls_back_with_its_reason(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(triton, "why_unavailable", lambda: "no card is plugged in")
    lacking = "no card is plugged in"
    for device, reason in [("cuda", lacking), ("xpu", lacking), ("mps", "no kernels for mps")]:
        with pytest.warns(RuntimeWarning, match=reason):
            assert backends.resolve("auto", device) == "reference"


def test_what_triton_lacks_is_said(monkeypatch):
    ask = triton.why_unavailable.__wrapped__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in ask()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert "8.0 or higher, but got card 1 with 7.5" in ask()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in ask()


def test_intel_gpus_take_triton(monkeypatch):
    ask = triton.why_unavailable.__wrapped__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert ask() is None
    monkeypatch.setattr(triton, "why_unavailable", ask)
    assert backends.resolve("auto", "xpu") == "triton"
    for operator in OPERATORS:
        for name in (operator.name, f"{operator.name}_backward"):
            for key in ("XPU", "CUDA", "CPU"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deformnet::{name}", key)


BLOCKED = """
import ctypes, warnings

load = ctypes.CDLL

class Blocked(load):
    def __init__(self, name, *args, **kwargs):
        if "libdeformnet" in str(name):
            raise OSError("blocked for a test")
        super().__init__(name, *args, **kwargs)

ctypes.CDLL = Blocked

import torch
from deformnet.ops import backends, deform_conv2d

input, weight = torch.randn(1, 4, 6, 7), torch.randn(3, 4, 3, 3)
offset = torch.randn(1, 18, 6, 7, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        output = deform_conv2d(input, offset, weight, padding=1)
        output.sum().backward()
caught = [warning for warning in caught if "deformnet" in str(warning.message)]
assert len(caught) == 1, caught
assert "blocked for a test" in str(caught[0].message), caught[0]
assert caught[0].filename == __file__, caught[0].filename
assert output.equal(deform_conv2d(input, offset, weight, padding=1, backend="reference"))
assert offset.grad.abs().sum() > 0
try:
    deform_conv2d(input, offset, weight, padding=1, backend="cpu")
except RuntimeError as error:
    assert "blocked for a test" in str(error), error
else:
    raise AssertionError("backend='cpu' ran")
try:
    torch.ops.deformnet.deform_conv2d(input, offset, weight, None, None, 1, 1, 1, "zeros")
except RuntimeError as error:
    assert "blocked for a test" in str(error), error
else:
    raise AssertionError("the operator ran")
print("done")
"""


def test_a_process_without_the_library_works(tmp_path):
    script = tmp_path / "blocked.py"
    script.write_text(BLOCKED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr
