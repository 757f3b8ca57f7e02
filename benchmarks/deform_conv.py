"""Deformable convolution against plain convolution and other implementations, on the CPU.

    python -m benchmarks.deform_conv [--threads 1 2] [--rounds 11] [--out DIR] [--name NAME]

float32 unless noted, 3x3 kernels, equal numbers of input and output channels, NCHW tensors. The
operator takes given offsets, always in float32; the convolution that computes them has its own
columns. Times in bfloat16 and float16 are relative to `conv2d` in the same dtype. Outputs and
gradients (in half precision, only outputs) are first checked against float64; wrong implementations
are not timed.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import memory
from benchmarks.calls import (
    OURS,
    PLAIN,
    Forward,
    backward,
    differentiable,
    gradients,
    require_close,
    seconds,
    wanted_gradients,
)
from benchmarks.peers import with_ncnn, with_onnxruntime, with_openvino
from benchmarks.shapes import SHAPES, Offsets, Shape, Tensors, make_tensors
from benchmarks.tables import Table, conditions, describe, save
from deformnet.ops import deform_conv2d
from deformnet.paper.timing import Timing, compare

OFFSET_CONV, LAYER = "offset convolution", "whole layer"

Rows = dict[str, dict[str, Timing]]


def forward_only(shape: Shape, tensors: Tensors, threads: int) -> dict[str, Forward]:
    """Implementations without a backward pass."""
    calls = {
        "onnxruntime": with_onnxruntime(shape, tensors, threads),
        "openvino": with_openvino(shape, tensors, threads),
    }
    ncnn = with_ncnn(shape, tensors, threads)
    return calls if ncnn is None else calls | {"ncnn": ncnn}


def check(
    shape: Shape, t: Tensors, training: dict[str, Forward], others: dict[str, Forward]
) -> None:
    """Exits if an implementation disagrees with the definition in float64."""
    d = shape.dilation
    exact = [x.detach().double().requires_grad_() for x in (t.input, t.weight, t.offset)]
    x, weight, offset = exact
    output = deform_conv2d(x, offset, weight, None, 1, d, d, backend="reference")
    by_definition = torch.autograd.grad(output, exact, t.grad_output.double())
    for name, call in (training | others).items():
        if name != PLAIN:
            require_close(f"{name}, {shape}", call(), output)
    for name, call in training.items():
        if name != PLAIN:
            found = torch.autograd.grad(call(), wanted_gradients(name, t), t.grad_output)
            for what, one, wanted in zip(
                ("input", "weight", "offset"), found, by_definition, strict=True
            ):
                require_close(f"{name}, {shape}, gradient by {what}", one, wanted)


def measure(
    shape: Shape, offsets: Offsets, *, threads: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, Timing], dict[str, Timing]]:
    """Times forward, backward, and both."""
    tensors = make_tensors(shape, offsets)
    training = differentiable(shape, tensors)
    others = forward_only(shape, tensors, threads)
    check(shape, tensors, training, others)
    with torch.no_grad():
        forward_times = compare(training | others, rounds=rounds)
    back, both = (
        {
            name: make(call, wanted_gradients(name, tensors), tensors.grad_output)
            for name, call in training.items()
        }
        for make in (backward, gradients)
    )
    return forward_times, compare(back, rounds=rounds), compare(both, rounds=rounds)


def measure_offsets(shape: Shape, *, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """deformnet with every kind of offsets: forward, and forward + backward."""
    both: dict[str, Callable[[], object]] = {}
    forward: dict[str, Callable[[], object]] = {}
    for kind in Offsets:
        t = make_tensors(shape, kind)
        calls = differentiable(shape, t)
        forward[kind] = calls[OURS]
        both[kind] = gradients(calls[OURS], wanted_gradients(OURS, t), t.grad_output)
        if kind == Offsets.ZERO:
            forward[PLAIN] = calls[PLAIN]
            both[PLAIN] = gradients(calls[PLAIN], wanted_gradients(PLAIN, t), t.grad_output)
    with torch.no_grad():
        forward_times = compare(forward, rounds=rounds)
    return forward_times, compare(both, rounds=rounds)


def measure_layer(shape: Shape, *, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """The offset convolution, and the whole layer: forward; forward + backward."""
    t = make_tensors(shape)
    d = shape.dilation
    # Offsets computed with random weights would be far larger than learned ones.
    small = (0.3 * t.offset_weight.detach()).requires_grad_()

    def make_offsets() -> Tensor:
        return F.conv2d(t.input, small, None, 1, d, d)

    forward: dict[str, Forward] = {
        PLAIN: differentiable(shape, t)[PLAIN],
        OFFSET_CONV: make_offsets,
        LAYER: lambda: deform_conv2d(t.input, make_offsets(), t.weight, None, 1, d, d),
    }
    both = {
        PLAIN: gradients(forward[PLAIN], [t.input, t.weight], t.grad_output),
        OFFSET_CONV: gradients(forward[OFFSET_CONV], [t.input, small], t.grad_offset),
        LAYER: gradients(forward[LAYER], [t.input, t.weight, small], t.grad_output),
    }
    with torch.no_grad():
        forward_times = compare(forward, rounds=rounds)
    return forward_times, compare(both, rounds=rounds)


def measure_half(
    shape: Shape, dtype: torch.dtype, *, rounds: int
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times half precision and float32: forward; forward + backward.

    If a call of `conv2d` takes more than a second, as it does where PyTorch has no fast kernel for
    the dtype, at most three rounds are run.
    """
    t = make_tensors(shape)
    d = shape.dilation
    x, weight, grad_output = (
        tensor.detach().to(dtype) for tensor in (t.input, t.weight, t.grad_output)
    )
    half = replace(
        t, input=x.requires_grad_(), weight=weight.requires_grad_(), grad_output=grad_output
    )
    forward: dict[str, Forward] = {}
    both: dict[str, Callable[[], object]] = {}
    for tensors, ending in ((half, ""), (t, ", float32")):
        calls = differentiable(shape, tensors)
        for name in (PLAIN, OURS):
            wanted = wanted_gradients(name, tensors)
            forward[name + ending] = calls[name]
            both[name + ending] = gradients(calls[name], wanted, tensors.grad_output)
    with torch.no_grad():
        exact = deform_conv2d(
            *(x.double(), t.offset.double(), weight.double(), None, 1, d, d), backend="reference"
        )
        require_close(f"{dtype}, {shape}", forward[OURS](), exact)
        rounds = min(rounds, 3) if seconds(forward[PLAIN]) > 1 else rounds
        forward_times = compare(forward, rounds=rounds)
    return forward_times, compare(both, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    counts = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=counts)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for results (JSON) and figures")
    parser.add_argument("--name", default="deform_conv", help="base name of the result files")
    options = parser.parse_args()
    most = max(options.threads)
    torch.set_num_threads(most)
    found = conditions(("onnxruntime", "openvino", "ncnn"))
    print(describe(found))

    parts: dict[str, Rows] = {}

    def keep(row: str, ending: str, measured: Mapping[str, dict[str, Timing]]) -> None:
        for title, times in measured.items():
            parts.setdefault(f"{title}, {ending}", {})[row] = times

    names = ("forward", "forward and backward")
    functions = {
        "layer": measure_layer,
        "bfloat16": partial(measure_half, dtype=torch.bfloat16),
        "float16": partial(measure_half, dtype=torch.float16),
    }
    jobs = [(shape, count) for count in options.threads for shape in SHAPES]
    for shape, count in tqdm(jobs, disable=None):
        torch.set_num_threads(count)
        threads = f"{count} thread" + "s" * (count > 1)
        one, back, both = measure(shape, Offsets.NORMAL, threads=count, rounds=options.rounds)
        measured = {"forward": one, "backward": back, "forward and backward": both}
        keep(str(shape), threads, measured)
        for title, function in functions.items():
            pair = function(shape, rounds=options.rounds)
            keep(str(shape), f"{title}, {threads}", dict(zip(names, pair, strict=True)))
    torch.set_num_threads(most)
    for shape in tqdm(SHAPES, desc="kinds of offsets", disable=None):
        pair = measure_offsets(shape, rounds=options.rounds)
        keep(str(shape), "kinds of offsets", dict(zip(names, pair, strict=True)))
    megabytes = memory.in_another_process(most)

    tables = [Table(title, PLAIN, rows) for title, rows in parts.items()]
    for table in tables:
        print(table.markdown())
    print(memory.markdown(megabytes))
    if options.out:
        save(options.out, options.name, found, tables, {"extra megabytes": megabytes})


if __name__ == "__main__":
    main()
