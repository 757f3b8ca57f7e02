"""Depthwise deformable convolution against depthwise convolution of the same dtype, on the CPU.

    MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000 \\
        python -m benchmarks.depthwise [--seconds 0.6]

One filter per channel, one offset group, NCHW and channels-last tensors (offsets included), normal
offsets with a standard deviation of one pixel; feature maps at stride 16 of images of 512, 384 and
320 pixels. Prints the minimum CPU time of one thread; the calls take turns. The variables keep
freed memory in the process: otherwise, page faults of new outputs take longer than the arithmetic
of a batch. Outputs are first checked against float64; wrong ones are not timed.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.calls import OURS, PLAIN, Forward, gradients, require_close
from benchmarks.tables import conditions, describe
from deformnet.ops import deform_conv2d

LAYERS = [
    (batch, channels, side, kernel)
    for channels, side in ((96, 32), (320, 24), (1152, 20))
    for kernel in (3, 5)
    for batch in (1, 8)
]
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = torch.float32, torch.bfloat16


def shortest(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Minimum CPU time of each call, in milliseconds."""
    found = dict.fromkeys(calls, float("inf"))
    end = time.process_time() + seconds
    while True:
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], 1e3 * (time.process_time() - start))
        if time.process_time() >= end:
            return found


def measure(
    batch: int,
    channels: int,
    side: int,
    kernel: int,
    dtype: torch.dtype,
    layout: str,
    seconds: float,
) -> list[dict[str, float]]:
    """Times forward, and forward + backward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator)
        return values.to(memory_format=FORMATS[layout])

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
    require_close(OURS, calls[OURS]()[:1], exact)
    forward = shortest(calls, seconds)
    for tensor in (x, weight, offset):
        tensor.requires_grad_()
    wanted = {PLAIN: [x, weight], OURS: [x, weight, offset]}
    both = {name: gradients(call, wanted[name], grad_output) for name, call in calls.items()}
    return [forward, shortest(both, seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.6, help="CPU seconds per comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe(conditions()))
    print("\nms of conv2d | ms of deformnet | ratio: forward, then forward + backward\n")
    print("| layer" + 2 * " | conv2d | deformnet | ratio" + " |\n" + "|---" * 7 + "|")
    for dtype, layout, layer in itertools.product(DTYPES, FORMATS, LAYERS):
        batch, channels, side, kernel = layer
        name = f"{batch}x{channels}x{side}x{side}, {kernel}x{kernel}, {str(dtype)[6:]}, {layout}"
        cells = [
            f"{times[PLAIN]:.3g} | {times[OURS]:.3g} | {times[OURS] / times[PLAIN]:.2f}"
            for times in measure(*layer, dtype, layout, options.seconds)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
