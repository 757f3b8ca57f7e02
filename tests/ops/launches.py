"""What launches of the Triton kernels compile to, without a GPU.

For processes of their own (`check`): kernels decorated for the interpreter cannot be compiled.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def check(program: str, cache: Path) -> None:
    """Run a program that compiles kernels; it fails if its assertions do."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("Triton has no ptxas")
    assert done.returncode == 0, done.stderr


def compiled(launch: Callable[[], object], capability: int = 90) -> dict[str, Any]:
    """The kernels that a function launches, by name: compiled as for its arguments, not run.

    Its tensors may be on the meta device, and so of any size.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
        )
    )
    kernels = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        kernels[self.fn.__name__] = run(self, *arguments, warmup=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        launch()
    return kernels
