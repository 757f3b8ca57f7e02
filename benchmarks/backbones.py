"""What three deformable layers add to a training step of DeepLab on backbones of timm.

    python -m benchmarks.backbones

Dense offset convolutions, as in the paper, and separable ones (depthwise and 1x1). A step is
forward, loss, backward and SGD, from random weights, with offsets of a trained network's magnitude.
The three networks of a backbone take turns, in rotating order. Times are CPU times of one thread,
so that other programs on the machine matter little.
"""

import argparse
import statistics
import time

import torch
from torch.utils.benchmark import Timer

from deformnet.engine.runs import machine
from deformnet.models.network import Network
from deformnet.nn import parameter_groups
from deformnet.paper.cases import count_parameters, set_offsets
from deformnet.recipes import DeepLabRecipe

BACKBONES = (
    "timm/resnet50",
    "timm/regnety_016",
    "timm/convnext_tiny",
    "timm/tf_efficientnet_lite0",
    "timm/mobilenetv4_conv_medium",
    "timm/hrnet_w18_small",
)
CLASSES = 21
_LR = 1e-4  # so small that a few steps do not change the times


def build(backbone: str) -> dict[str, Network]:
    """The network without deformable layers, and with both kinds of offset convolutions."""
    recipe = DeepLabRecipe(backbone=backbone, deform_layers=0)
    deformable = {
        kind: DeepLabRecipe(backbone=backbone, deform_layers=3, offset_conv=kind)
        for kind in ("dense", "separable")
    }
    networks = {"plain": recipe, **deformable}
    return {
        kind: recipe.build_model(CLASSES).to(memory_format=torch.channels_last).train()
        for kind, recipe in networks.items()
    }


def step_timer(model: Network, images: torch.Tensor) -> Timer:
    """A timer of training steps."""
    losses = model.random_losses(images)
    set_offsets(model, losses)
    optimizer = torch.optim.SGD(parameter_groups(model, _LR), lr=_LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return Timer("step()", timer=time.process_time, globals={"step": step}, num_threads=1)


def measure(backbone: str, images: torch.Tensor, rounds: int) -> list[str]:
    """The cells of a row."""
    networks = build(backbone)
    timers = {kind: step_timer(model, images) for kind, model in networks.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in timers}
    kinds = list(timers)
    for turn in range(rounds):
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            seconds[kind].append(timers[kind].timeit(1).median)  # after two steps of warm-up
    parameters = {kind: count_parameters(model) / 1e6 for kind, model in networks.items()}
    times = {kind: statistics.median(values) for kind, values in seconds.items()}
    row = [backbone.removeprefix("timm/"), f"{parameters['plain']:.2f}"]
    row += [f"+{parameters[kind] - parameters['plain']:.3f}" for kind in kinds[1:]]
    row += [f"{1e3 * times['plain']:.0f}"]
    for kind in kinds[1:]:
        ratios = [a / b for a, b in zip(seconds[kind], seconds["plain"], strict=True)]
        row.append(f"x{statistics.median(ratios):.2f}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="number of images")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, options.size, options.size)
    images = images.to(memory_format=torch.channels_last)
    print(
        f"DeepLab, {options.batch} images of {options.size}x{options.size}, 1 thread, "
        f"medians of {options.rounds} rounds; {machine()}\n"
    )
    print("| backbone | M parameters | dense | separable | step, ms | dense | separable |")
    print("|---" * 7 + "|")
    for backbone in options.backbones:
        print(f"| {' | '.join(measure(backbone, images, options.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
