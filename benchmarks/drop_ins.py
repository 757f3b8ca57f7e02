"""Training steps of published networks, before and after `accelerate_torchvision()`.

    python -m benchmarks.drop_ins [--rounds 9] [--json FILE]

The networks call torchvision's operator; see `benchmarks/published_networks.py`. First, outputs and
the gradients of all inputs and parameters are compared in float64, on tiny networks. Then training
steps (forward, backward and SGD, float32, two images, one thread) are timed, alternating between
with and without acceleration. Prints a Markdown table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.published_networks import NETWORKS, published
from deformnet.compat import accelerate_torchvision
from deformnet.engine.runs import machine, versions
from deformnet.paper.timing import compare

_LR = 1e-9  # so small that training does not affect the times


def difference(name: str) -> float:
    """The largest difference that the acceleration makes in float64.

    Compares outputs and the gradients of all inputs and parameters of a tiny network, relative to
    the largest absolute value of each tensor, or absolutely if that is below 1: the gradient of a
    bias before a batch norm is zero.
    """
    expected = _values(name)
    with accelerate_torchvision():
        found = _values(name)
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def _values(name: str) -> list[Tensor]:
    tested = published(name, small=True)
    outputs, leaves = tested.outputs(), [*tested.inputs, *tested.network.parameters()]
    weights = [torch.linspace(-1, 1, it.numel(), dtype=it.dtype).view_as(it) for it in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [it.detach() for it in (*outputs, *gradients)]


def training_step(name: str) -> Callable[[], None]:
    """A training step of a network at full size, with torchvision's operator."""
    tested = published(name, small=False)
    optimizer = torch.optim.SGD(tested.network.parameters(), _LR)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([it.square().mean() for it in tested.outputs()]).sum().backward()
        optimizer.step()

    return step


def accelerated(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with accelerate_torchvision():
            step()

    return run


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and the ratio torchvision : deformnet, over the rounds."""
    step = training_step(name)
    times = compare({"torchvision": step, "deformnet": accelerated(step)}, rounds=rounds)
    ratio = times["torchvision"].relative_to(times["deformnet"])
    summaries = {key: time.summary() for key, time in times.items()}
    return {"float64 difference": difference(name), **summaries, "ratio": ratio.summary()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, 1 thread, medians of {options.rounds} rounds (20% to 80%)\n")
    print("| network | torchvision, ms | deformnet, ms | ratio | float64 |\n|---|---|---|---|---|")
    results = {}
    for name in NETWORKS:
        results[name] = found = measure(name, options.rounds)
        cells = [_cell(found[key], 1000, 0) for key in ("torchvision", "deformnet")]
        cells += [_cell(found["ratio"], 1, 2), f"{found['float64 difference']:.0e}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        content = {"machine": machine(), "versions": versions(), "networks": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _cell(summary: dict[str, float], unit: float, digits: int) -> str:
    median, low, high = (f"{summary[key] * unit:.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


if __name__ == "__main__":
    main()
