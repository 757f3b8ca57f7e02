"""Cost of deformable convolution against map size, batch size, channels and threads.

    python -m benchmarks.sweeps [--rounds 11] [--out DIR]

float32, 3x3 kernels, equal numbers of input and output channels, normal offsets with a standard
deviation of one pixel. The floor is the time of the multiply-adds alone, at the rate that this
machine reaches in registers (peak.cpp, compiled here with c++); the backward pass has twice as
many multiply-adds.

    OMP_WAIT_POLICY=passive python -m benchmarks.sweeps --simulate 8

Measures how evenly the five layers are divided among more threads than there are cores: the CPU
time of all threads divided by that of the busiest one, an upper bound on the speedup. (Threads also
wait for one another after each loop of a pass.) The variable makes waiting threads sleep.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from benchmarks.calls import (
    OURS,
    PLAIN,
    backward,
    differentiable,
    gradients,
    wanted_gradients,
)
from benchmarks.shapes import SHAPES, Shape, make_tensors
from benchmarks.tables import COLORS, conditions, describe, save_figure, summary
from deformnet._files import write_json
from deformnet.paper.timing import Timing, compare

FORWARD, BOTH = "forward", "forward and backward"
WORK = {FORWARD: 1, BOTH: 3}
"""Matrix products of a pass, relative to the forward pass."""


@dataclass(frozen=True)
class Point:
    """A layer and a number of threads: one point of a sweep."""

    at: float
    label: str
    shape: Shape
    threads: int


@dataclass(frozen=True)
class Sweep:
    """One sweep; times are per `unit` of a point."""

    name: str
    axis: str
    unit: str
    units: Callable[[Shape], float]
    points: Sequence[Point]


Times = dict[str, dict[str, Timing]]
"""For each pass, by implementation."""


def sweeps(threads: int) -> list[Sweep]:
    def thousand_positions(shape: Shape) -> float:
        return shape.positions / 1000

    sizes = [(14, 14), (28, 28), (56, 56), (64, 128), (128, 256), (256, 512)]
    return [
        Sweep(
            "map size",
            "positions of a map, 128 channels, one image",
            "thousand positions",
            thousand_positions,
            [Point(h * w, f"{h}x{w}", Shape(1, 128, h, w), threads) for h, w in sizes],
        ),
        Sweep(
            "batch",
            "images of 128x28x28",
            "thousand positions",
            thousand_positions,
            [Point(n, str(n), Shape(n, 128, 28, 28), threads) for n in (1, 2, 4, 8, 16, 32, 64)],
        ),
        Sweep(
            "channels",
            "channels of 4 maps of 28x28",
            "call",
            lambda _: 1,
            [Point(c, str(c), Shape(4, c, 28, 28), threads) for c in (16, 32, 64, 128, 256, 512)],
        ),
        Sweep(
            "threads",
            "threads, 1x128x64x128",
            "call",
            lambda _: 1,
            [Point(t, str(t), Shape(1, 128, 64, 128), t) for t in range(1, threads + 1)],
        ),
    ]


def peak_rates(threads: int) -> list[float]:
    """Peak FLOP/s (two per multiply-add) on 1, 2, ... threads."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("peak.cpp")
        options = ["-O3", "-march=native", "-ffast-math", "-fopenmp"]
        subprocess.run(["c++", *options, str(source), "-o", str(program)], check=True)
        found = []
        for count in range(1, threads + 1):
            ran = subprocess.run([program, str(count)], stdout=subprocess.PIPE, check=True)
            found.append(float(ran.stdout))
    return found


def measure(point: Point, rounds: int) -> Times:
    torch.set_num_threads(point.threads)
    t = make_tensors(point.shape)
    calls = differentiable(point.shape, t)
    chosen = (PLAIN, OURS)
    both = {n: gradients(calls[n], wanted_gradients(n, t), t.grad_output) for n in chosen}
    with torch.no_grad():
        forward = compare({name: calls[name] for name in chosen}, rounds=rounds)
    return {FORWARD: forward, BOTH: compare(both, rounds=rounds)}


def divided(call: Callable[[], object], calls: int) -> float:
    """CPU time of all threads during calls, divided by that of the busiest thread."""
    call()  # starts the threads
    before = _processor_times()
    for _ in range(calls):
        call()
    spent = [time - before.get(thread, 0) for thread, time in _processor_times().items()]
    return sum(spent) / max(spent)


def _processor_times() -> dict[str, int]:
    """CPU time of each thread of this process, in nanoseconds."""
    threads = Path("/proc/self/task").iterdir()
    return {it.name: int((it / "schedstat").read_text().split()[0]) for it in threads}


def simulate(threads: int, calls: int) -> None:
    if os.environ.get("OMP_WAIT_POLICY") != "passive":
        raise SystemExit("set OMP_WAIT_POLICY=passive first: see `pydoc benchmarks.sweeps`")
    torch.set_num_threads(threads)
    print(f"CPU time of {threads} threads, divided by that of the busiest one\n")
    print("| | forward | backward |\n|---|---|---|")
    for shape in SHAPES:
        t = make_tensors(shape)
        ours = differentiable(shape, t)[OURS]
        forward = divided(torch.no_grad()(ours), calls)
        back = divided(backward(ours, wanted_gradients(OURS, t), t.grad_output), calls)
        print(f"| {shape} | {forward:.1f} | {back:.1f} |", flush=True)


def draw(sweep: Sweep, measured: Sequence[Times], rates: Sequence[float]) -> Figure:
    """A panel for each pass."""
    figure = Figure((10, 4), layout="constrained")
    figure.suptitle(f"deformable convolution: {sweep.name}")
    panels: list[Axes] = list(figure.subplots(1, 2))
    at = [point.at for point in sweep.points]
    for axes, what in zip(panels, WORK, strict=True):
        units = [sweep.units(point.shape) / 1000 for point in sweep.points]  # milliseconds
        for name, color in ((PLAIN, COLORS[1]), (OURS, COLORS[0])):
            timings = [times[what][name] for times in measured]

            def values(of: Callable[[Timing], float]) -> list[float]:
                return [of(t) / unit for t, unit in zip(timings, units, strict=True)]  # noqa: B023

            axes.plot(at, values(lambda t: t.median), "o-", color=color, label=name)
            low, high = values(lambda t: t.quantile(0.2)), values(lambda t: t.quantile(0.8))
            axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0)
        floor = [
            WORK[what] * point.shape.forward_flops / rates[point.threads - 1] / unit
            for point, unit in zip(sweep.points, units, strict=True)
        ]
        axes.plot(at, floor, "--", color="black", label="floor")
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [p.label for p in sweep.points], fontsize=8, rotation=30)
        axes.minorticks_off()
        if sweep.unit == "call":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(sweep.axis)
        axes.set_ylabel(f"ms a {sweep.unit}")
        axes.set_title(what)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def report(sweep: Sweep, measured: Sequence[Times], rates: Sequence[float]) -> dict[str, object]:
    """Prints the results, and returns them for the JSON file."""
    print(f"\n{sweep.name}: ms per {sweep.unit}; ratio to conv2d; fraction of the floor\n")
    print(f"| {sweep.axis} | " + " | ".join(f"{what}: ms | ratio | floor" for what in WORK) + " |")
    print("|---" * (1 + 3 * len(WORK)) + "|")
    rows = {}
    for point, times in zip(sweep.points, measured, strict=True):
        cells, row = [], {}
        for what, work in WORK.items():
            ours, ratio = times[what][OURS], times[what][OURS].relative_to(times[what][PLAIN])
            floor = work * point.shape.forward_flops / rates[point.threads - 1]
            milliseconds = 1000 * ours.median / sweep.units(point.shape)
            cells.append(f"{milliseconds:.3g} | {ratio.median:.2f} | {floor / ours.median:.0%}")
            row[what] = {"ms": summary(ours, 1e3), "ratio": summary(ratio), "floor ms": 1e3 * floor}
        print(f"| {point.label} | " + " | ".join(cells) + " |")
        rows[point.label] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for results (JSON) and figures")
    parser.add_argument("--simulate", type=int, help="measure the balance of this many threads")
    options = parser.parse_args()
    if options.simulate:
        simulate(options.simulate, calls=10 * options.rounds)
        return
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    found = conditions()
    print(describe(found))
    rates = peak_rates(threads)
    print("multiply-adds in registers: " + ", ".join(f"{r / 1e9:.0f}" for r in rates) + " GFLOP/s")
    content = found | {"peak GFLOP/s by threads": [rate / 1e9 for rate in rates]}
    for sweep in sweeps(threads):
        measured = [
            measure(point, options.rounds)
            for point in tqdm(sweep.points, desc=sweep.name, disable=None)
        ]
        content[sweep.name] = report(sweep, measured, rates)
        if options.out:
            picture = options.out / f"sweep-{sweep.name.replace(' ', '-')}.png"
            save_figure(picture, lambda: draw(sweep, measured, rates))  # noqa: B023 (called at once)
    if options.out:
        write_json(options.out / "sweeps.json", content)


if __name__ == "__main__":
    main()
