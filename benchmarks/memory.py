"""Peak memory of deformable convolution, as reported by Linux.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.memory

Prints the megabytes of a call beyond its input and output tensors, as JSON. The variable makes the
C library return freed memory at once; otherwise, memory kept for the next call would be missed.
`benchmarks.deform_conv` runs this in a separate process.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.memory 1 --steps

Prints the peak memory of a training step, in megabytes, for networks of Table 4, plain and
deformable, without and with activation checkpointing. As in the paper: ResNet-101, frozen batch
norm, conv1 and conv2 frozen, one image. Random weights, float32, SGD.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.calls import backward, differentiable, wanted_gradients
from benchmarks.shapes import Shape, make_tensors
from deformnet.engine.runs import machine
from deformnet.models import Network
from deformnet.nn import parameter_groups
from deformnet.paper.cases import build, case, count_parameters
from deformnet.paper.settings import Table4Network, TimingOptions

BATCHES = (1, 8, 64)
NETWORKS: tuple[Table4Network, ...] = ("deeplab-voc", "class-aware-rpn", "faster-rcnn", "rfcn")
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


def print_steps(threads: int) -> None:
    """Measures training steps, and prints a table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"peak megabytes of a training step on one image; {machine()}\n")
    print("| | weights, gradients, momentum | step | with checkpointing |\n|---|---|---|---|")
    for network in NETWORKS:
        networks = build(case(network, TimingOptions(threads=threads)), torch.device("cpu"))
        images = networks.prepared.input
        size = f"{images.shape[2]}x{images.shape[3]}"
        for kind, used in (("plain", networks.plain), ("deformable", networks.deformable)):
            model = cast(Network, used.model)
            trained, step = _training_step(model, images)
            state = 4 * (count_parameters(model) + 2 * trained)  # all in memory between steps
            stored = state + _extra(step, rounds=1)
            model.backbone.checkpoint_activations()
            recomputed = state + _extra(step, rounds=1)
            cells = [f"{it / MEGABYTE:.0f}" for it in (state, stored, recomputed)]
            print(f"| {network}, {size}, {kind} | {' | '.join(cells)} |", flush=True)


def _training_step(model: Network, images: Tensor) -> tuple[int, Callable[[], tuple[()]]]:
    """Number of trained parameters, and a training step with the paper's frozen layers."""
    model.backbone.freeze(2)
    for module in model.modules():  # in evaluation mode
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    losses = model.random_losses(images)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-6), momentum=0.9)

    def step() -> tuple[()]:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()
        return ()

    return sum(p.numel() for p in model.parameters() if p.requires_grad), step


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


def _extra(call: Callable[[], object], rounds: int = 3) -> int:
    """Peak bytes of a call, beyond the memory in use before it and its result."""
    call()  # one-time allocations do not count
    found = []

    def measure() -> None:
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        returned = call()
        found.append(_status("VmHWM") - before - _size(returned))

    for _ in range(rounds):
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("threads", type=int, nargs="?", default=torch.get_num_threads())
    parser.add_argument("--steps", action="store_true", help="measure whole training steps")
    options = parser.parse_args()
    if options.steps:
        print_steps(options.threads)
        return
    torch.set_num_threads(options.threads)
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
