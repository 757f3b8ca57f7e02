"""Deformable RoI pooling against torchvision's plain RoI pooling, on the CPU.

    python -m benchmarks.roi_pool [--threads 1 2] [--rounds 9] [--out DIR] [--name NAME]

One map of 38x63 pixels (an image of 600x1000), 300 boxes of all sizes, 7x7 bins with 4x4 samples;
float32, bfloat16 and float16. deformnet's times include offsets and their gradients, both in
float32; torchvision's pooling has no offsets and does not support bfloat16. Times in half precision
are relative to deformnet's in float32, those in float16 also to torchvision's. deformnet is checked
against its float64 definition before it is timed.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from benchmarks.calls import TORCHVISION, require_close
from benchmarks.tables import Table, conditions, describe, save
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool
from deformnet.ops.roi_pool.checks import Sampling
from deformnet.paper.timing import Timing, compare

RULES: tuple[Sampling, ...] = get_args(Sampling)
HEIGHT, WIDTH, BINS, SCALE, SAMPLES = 38, 63, 7, 1 / 16, 4
BOXES = 300
FLOAT32 = "float32"
DTYPES = {FLOAT32: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THEIRS = (FLOAT32, "float16")
"""Those that torchvision supports on the CPU, too."""

Rows = dict[str, dict[str, Timing]]
"""Timings of each pooling, by implementation and dtype."""


@dataclass(frozen=True)
class Pooling:
    """C output channels, G offset groups; `sensitive`: 7x7 maps for each channel."""

    name: str
    channels: int
    groups: int
    sensitive: bool

    def __str__(self) -> str:
        maps = f"{self.channels}x49" if self.sensitive else f"{self.channels}"
        return f"{self.name}: {maps} channels, {self.groups} offset group" + "s" * (self.groups > 1)


POOLINGS = (
    Pooling("RoI", 256, 1, sensitive=False),  # Faster R-CNN
    Pooling("PS", 21, 21, sensitive=True),  # R-FCN's scores on VOC
    Pooling("PS", 21, 1, sensitive=True),
    Pooling("PS", 81, 81, sensitive=True),  # on COCO
    Pooling("PS", 8, 1, sensitive=True),  # the authors' boxes
)


def random_boxes() -> Tensor:
    """[R, 5] in an image of 600x1000: sides from 16 to 400 pixels, log-uniform."""
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([16.0 * WIDTH, 16.0 * HEIGHT])
    center = torch.rand(BOXES, 2, generator=generator) * image
    side = (math.log(16) + torch.rand(BOXES, 2, generator=generator) * math.log(25)).exp()
    low = (center - side / 2).clamp(min=0)
    high = torch.minimum(center + side / 2, image - 1)
    return torch.cat([torch.zeros(BOXES, 1), low, high], dim=1)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    boxes: Tensor
    offset: Tensor
    grad_output: Tensor


def make_tensors(pooling: Pooling, dtype: torch.dtype) -> Tensors:
    """Offsets are normal with a standard deviation of 1: a tenth of the box."""
    generator = torch.Generator().manual_seed(0)
    maps = pooling.channels * (BINS**2 if pooling.sensitive else 1)
    offsets = (BOXES, 2 * pooling.groups, BINS, BINS)
    grad_output = (BOXES, pooling.channels, BINS, BINS)
    return Tensors(
        input=torch.randn(1, maps, HEIGHT, WIDTH, generator=generator).to(dtype).requires_grad_(),
        boxes=random_boxes(),
        offset=torch.randn(offsets, generator=generator).requires_grad_(),
        grad_output=torch.randn(grad_output, generator=generator).to(dtype),
    )


def calls(pooling: Pooling, t: Tensors) -> dict[str, Callable[[], Tensor]]:
    def ours(rule: Sampling) -> Callable[[], Tensor]:
        pool = deform_ps_roi_pool if pooling.sensitive else deform_roi_pool
        return lambda: pool(
            *(t.input, t.boxes, t.offset, BINS, SCALE),
            sampling=rule,
            samples_per_bin=SAMPLES,
            backend="cpu",
        )

    boxes = t.boxes.to(t.input.dtype)

    def theirs() -> Tensor:
        if pooling.sensitive:
            return torchvision.ops.ps_roi_align(t.input, boxes, BINS, SCALE, SAMPLES)
        return torchvision.ops.roi_align(t.input, boxes, BINS, SCALE, SAMPLES, aligned=True)

    return {TORCHVISION: theirs, **{rule: ours(rule) for rule in RULES}}


def check(pooling: Pooling, t: Tensors, forward: dict[str, Callable[[], Tensor]]) -> None:
    """Exits if a result is wrong; checks only some of the boxes."""
    some = 12
    pool = deform_ps_roi_pool if pooling.sensitive else deform_roi_pool
    for rule in RULES:
        exact = pool(
            *(t.input.double(), t.boxes[:some], t.offset[:some].double(), BINS, SCALE),
            sampling=rule,
            samples_per_bin=SAMPLES,
            backend="reference",
        )
        require_close(f"{rule}, {pooling}", forward[rule]()[:some], exact)


def backward(name: str, call: Callable[[], Tensor], t: Tensors) -> Callable[[], object]:
    """The backward pass alone."""
    wanted = [t.input] if name == TORCHVISION else [t.input, t.offset]
    output = call()
    return lambda: torch.autograd.grad(output, wanted, t.grad_output, retain_graph=True)


def measure(pooling: Pooling, *, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times forward and backward, by implementation and dtype."""
    forward: dict[str, Callable[[], Tensor]] = {}
    back: dict[str, Callable[[], object]] = {}
    for ending, dtype in DTYPES.items():
        tensors = make_tensors(pooling, dtype)
        found = calls(pooling, tensors)
        if ending not in THEIRS:
            del found[TORCHVISION]
        with torch.no_grad():
            check(pooling, tensors, found)
        for name, call in found.items():
            forward[f"{name}, {ending}"] = call
            back[f"{name}, {ending}"] = backward(name, call, tensors)
    with torch.no_grad():
        forward_times = compare(forward, rounds=rounds)
    return forward_times, compare(back, rounds=rounds)


def tables(passes: str, threads: str, rows: Rows) -> list[Table]:
    """Tables relative to torchvision, and one of half precision relative to float32."""
    found = []
    for dtype in THEIRS:
        same = {
            row: {name: times[f"{name}, {dtype}"] for name in (TORCHVISION, *RULES)}
            for row, times in rows.items()
        }
        found.append(Table(f"{passes}, {dtype}, {threads}", TORCHVISION, same))
    half = {
        f"{row}, {rule}": {dtype: times[f"{rule}, {dtype}"] for dtype in DTYPES}
        for row, times in rows.items()
        for rule in RULES
    }
    return [*found, Table(f"{passes}, half precision, {threads}", FLOAT32, half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    counts = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=counts)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for results (JSON) and figures")
    parser.add_argument("--name", default="roi_pool", help="base name of the result files")
    options = parser.parse_args()

    torch.set_num_threads(max(options.threads))
    found = conditions()
    print(describe(found))
    measured: list[Table] = []
    for count in options.threads:
        torch.set_num_threads(count)
        forward: Rows = {}
        back: Rows = {}
        for pooling in tqdm(POOLINGS, desc=f"threads: {count}", disable=None):
            times = measure(pooling, rounds=options.rounds)
            forward[str(pooling)], back[str(pooling)] = times
        threads = f"{count} thread" + "s" * (count > 1)
        measured += tables("forward", threads, forward) + tables("backward", threads, back)
    for table in measured:
        print(table.markdown())
    if options.out:
        save(options.out, options.name, found, measured)


if __name__ == "__main__":
    main()
