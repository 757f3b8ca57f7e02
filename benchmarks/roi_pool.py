"""Deformable RoI pooling against torchvision's plain RoI pooling, on the CPU.

    python -m benchmarks.roi_pool [--threads 2] [--rounds 9] [--out DIR]

float32, one map of 38x63 pixels (an image of 600x1000), 300 boxes of all sizes, 7x7 bins with 4x4
samples. deformnet computes with offsets and their gradients; torchvision has no offsets. deformnet
is checked against its float64 definition before it is timed.
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

from benchmarks.tables import Table, conditions, describe, save
from deformnet.ops import deform_ps_roi_pool, deform_roi_pool
from deformnet.ops.roi_pool.checks import Sampling
from deformnet.paper.timing import Timing, compare

TORCHVISION = "torchvision"
RULES: tuple[Sampling, ...] = get_args(Sampling)
HEIGHT, WIDTH, BINS, SCALE, SAMPLES = 38, 63, 7, 1 / 16, 4
BOXES = 300


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


def make_tensors(pooling: Pooling) -> Tensors:
    """Offsets are normal with a standard deviation of 1: a tenth of the box."""
    generator = torch.Generator().manual_seed(0)
    maps = pooling.channels * (BINS**2 if pooling.sensitive else 1)
    offsets = (BOXES, 2 * pooling.groups, BINS, BINS)
    return Tensors(
        input=torch.randn(1, maps, HEIGHT, WIDTH, generator=generator).requires_grad_(),
        boxes=random_boxes(),
        offset=torch.randn(offsets, generator=generator).requires_grad_(),
        grad_output=torch.randn(BOXES, pooling.channels, BINS, BINS, generator=generator),
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

    def theirs() -> Tensor:
        if pooling.sensitive:
            return torchvision.ops.ps_roi_align(t.input, t.boxes, BINS, SCALE, SAMPLES)
        return torchvision.ops.roi_align(t.input, t.boxes, BINS, SCALE, SAMPLES, aligned=True)

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
        error = (forward[rule]()[:some] - exact).abs().max().item()
        if not error < 1e-4:
            raise SystemExit(f"{rule} is off by {error} on {pooling}")


def backward(name: str, call: Callable[[], Tensor], t: Tensors) -> Callable[[], object]:
    """The backward pass alone."""
    wanted = [t.input] if name == TORCHVISION else [t.input, t.offset]
    output = call()
    return lambda: torch.autograd.grad(output, wanted, t.grad_output, retain_graph=True)


def measure(pooling: Pooling, *, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    tensors = make_tensors(pooling)
    forward = calls(pooling, tensors)
    with torch.no_grad():
        check(pooling, tensors, forward)
        forward_times = compare(forward, rounds=rounds)
    back = {name: backward(name, call, tensors) for name, call in forward.items()}
    return forward_times, compare(back, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for results (JSON) and figures")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    found = conditions()
    print(describe(found))
    forward: dict[str, dict[str, Timing]] = {}
    back: dict[str, dict[str, Timing]] = {}
    for pooling in tqdm(POOLINGS, disable=None):
        times = measure(pooling, rounds=options.rounds)
        forward[str(pooling)], back[str(pooling)] = times
    tables = [Table("forward", TORCHVISION, forward), Table("backward", TORCHVISION, back)]
    for table in tables:
        print(table.markdown())
    if options.out:
        save(options.out, "roi_pool", found, tables)


if __name__ == "__main__":
    main()
