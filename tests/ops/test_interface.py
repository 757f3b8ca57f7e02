"""The kernel library by itself: which OpenMP runtime it uses, and how it runs on other processors.

`interface.cpp` calls the library without Python and PyTorch, so that an emulator can run it.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deformnet.ops import backends, cpu, deform_conv2d
from deformnet.ops.cpu import loading

if backends.why_unavailable("cpu"):
    pytest.skip(str(backends.why_unavailable("cpu")), allow_module_level=True)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's tools")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile interface.cpp")
    program = tmp_path_factory.mktemp("interface") / "interface"
    source = Path(__file__).with_name("interface.cpp")
    # The library looks for an OpenMP runtime in the process.
    libraries = ["-Wl,--no-as-needed", "-lgomp", "-ldl"]
    subprocess.run([compiler, source, "-o", program, *libraries], check=True)
    return program


def sets_that_run(*command: str | Path) -> list[str]:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.split()


@linux
def test_the_library_runs_without_python(program):
    assert cpu.instruction_set() in sets_that_run(program, loading._library_file())


@linux
@pytest.mark.parametrize(
    ("processor", "sets"), [("Nehalem", ["baseline"]), ("Haswell", ["avx2", "baseline"])]
)
def test_a_processor_without_an_instruction_set_does_without_it(program, processor, sets):
    if "DEFORMNET_TEST_LIBRARY" in os.environ:
        pytest.skip("the sanitizers' libraries do not run under QEMU")
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64 (Debian: apt install qemu-user-static)")
    library = loading._library_file()
    assert sets_that_run(emulator, "-cpu", processor, program, library) == sets


@linux
def test_kernels_run_in_the_threads_of_pytorch():
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        torch.ones(2**20).exp()
        started = threads()
        x = torch.ones(1, 16, 64, 64)
        deform_conv2d(x, torch.zeros(1, 18, 62, 62), torch.ones(16, 16, 3, 3), backend="cpu")
        assert threads() == started >= 5
    finally:
        torch.set_num_threads(before)


@linux
def test_a_process_without_openmp_is_told_what_to_do(monkeypatch):
    # A process without PyTorch has no OpenMP runtime.
    script = f"import ctypes; ctypes.CDLL({str(loading._library_file())!r})"
    ran = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    error = ran.stderr.strip().splitlines()[-1].removeprefix("OSError: ")
    assert "undefined symbol: " in error

    def refuse(file: str) -> None:
        raise OSError(error)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    loading._library.cache_clear()
    reason = loading.why_unavailable.__wrapped__()
    loading._library.cache_clear()
    assert reason is not None
    assert "\n" not in reason
    assert "expected PyTorch to have loaded an OpenMP runtime" in reason
    assert "pip install torch" in reason
