"""Peak memory of deformable convolution, as reported by Linux.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.memory

Prints the megabytes of a call beyond its input and output tensors, as JSON. The variable makes the
C library return freed memory at once; otherwise, memory kept for the next call would be missed.
`benchmarks.deform_conv` runs this in a separate process.
"""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.calls import backward, differentiable, wanted_gradients
from benchmarks.shapes import Shape, make_tensors

BATCHES = (1, 8, 64)
MEGABYTE = 2**20
_STATUS = Path("/proc/self/status")
_SETTING = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Rows = dict[str, dict[str, float]]


def in_another_process(threads: int) -> Rows:
    """Measures in a process that has allocated nothing else."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", str(threads)],
        env=os.environ | _SETTING,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ran.stdout)


def measure() -> Rows:
    """For batches of 128x56x56 maps: forward, and backward after a forward pass."""
    found = {}
    for batch in BATCHES:
        shape = Shape(batch, 128, 56, 56)
        t = make_tensors(shape)
        row = {}
        for name, call in differentiable(shape, t).items():
            back = backward(call, wanted_gradients(name, t), t.grad_output)
            row[f"{name}, forward"] = _extra(torch.no_grad()(call)) / MEGABYTE
            row[f"{name}, backward"] = _extra(back) / MEGABYTE
        found[str(shape)] = row
    return found


def markdown(rows: Rows) -> str:
    names = list(next(iter(rows.values())))
    lines = [
        "\nmegabytes of a call beyond the tensors that it takes and returns\n",
        "| | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row, values in rows.items():
        lines.append(f"| {row} | " + " | ".join(f"{values[name]:.0f}" for name in names) + " |")
    return "\n".join(lines)


def _extra(call: Callable[[], object]) -> int:
    """Peak bytes of a call, beyond the memory in use before it and its result."""
    call()  # one-time allocations do not count
    found = []

    def measure() -> None:
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        returned = call()
        found.append(_status("VmHWM") - before - _size(returned))

    for _ in range(3):
        # Threads keep their workspace for the next call; a new thread has none.
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()
    return max(0, min(found))


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{_STATUS} has no {field}")


def _size(returned: object) -> int:
    if isinstance(returned, Tensor):
        return returned.numel() * returned.element_size()
    if isinstance(returned, (tuple, list)):
        return sum(_size(part) for part in returned)
    raise TypeError(f"expected tensors, but got {type(returned).__name__}")


def main() -> None:
    if not _SETTING.items() <= os.environ.items():
        raise SystemExit("set MALLOC_MMAP_THRESHOLD_=65536 first: see `pydoc benchmarks.memory`")
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
