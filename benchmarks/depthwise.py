"""Depthwise deformable convolution against depthwise convolution in the same type, on the CPU.

    python -m benchmarks.depthwise [--threads 1] [--rounds 21] [--out DIR]

One filter per channel, one offset group, NCHW tensors, normal offsets with a standard deviation of
one pixel; maps of stride 16 of images of 512, 384 and 320 pixels. Outputs are first checked against
float64; wrong ones are not timed.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.calls import OURS, PLAIN, Forward, gradients
from benchmarks.tables import Table, conditions, describe, save
from deformnet.ops import deform_conv2d
from deformnet.paper.timing import Timing, compare

LAYERS = [
    (batch, channels, side, kernel)
    for channels, side in ((96, 32), (320, 24), (1152, 20))
    for kernel in (3, 5)
    for batch in (1, 8)
]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def measure(
    batch: int, channels: int, side: int, kernel: int, dtype: torch.dtype, *, rounds: int
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times forward, and forward + backward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    half = kernel // 2
    x, grad_output = (normal(batch, channels, side, side).to(dtype) for _ in range(2))
    weight = (normal(channels, 1, kernel, kernel) / kernel).to(dtype)
    offset = normal(batch, 2 * kernel**2, side, side)
    calls: dict[str, Forward] = {
        PLAIN: lambda: F.conv2d(x, weight, None, 1, half, 1, channels),
        OURS: lambda: deform_conv2d(x, offset, weight, None, 1, half),
    }
    one = x[:1].double(), offset[:1].double(), weight.double()
    exact = deform_conv2d(*one, None, 1, half, backend="reference")
    error = ((calls[OURS]()[:1] - exact).abs().max() / exact.abs().max()).item()
    if not error < TOLERANCES[dtype]:
        raise SystemExit(f"{dtype}: off by {error:.2g} of the largest value, not timed")
    forward_times = compare(calls, rounds=rounds)
    for tensor in (x, weight, offset):
        tensor.requires_grad_()
    wanted = {PLAIN: [x, weight], OURS: [x, weight, offset]}
    both = {name: gradients(call, wanted[name], grad_output) for name, call in calls.items()}
    return forward_times, compare(both, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="folder for results (JSON) and figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = conditions()
    print(describe(found))
    tables = []
    for dtype in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        forward, both = (
            Table(f"depthwise, {what}, {name}", PLAIN, {})
            for what in ("forward", "forward and backward")
        )
        for layer in tqdm(LAYERS, desc=name, disable=None):
            batch, channels, side, kernel = layer
            row = f"{batch}x{channels}x{side}x{side}, {kernel}x{kernel}"
            forward.rows[row], both.rows[row] = measure(*layer, dtype, rounds=options.rounds)
        tables += [forward, both]
    for table in tables:
        print(table.markdown())
    if options.out:
        save(options.out, "depthwise", found, tables, {})


if __name__ == "__main__":
    main()
