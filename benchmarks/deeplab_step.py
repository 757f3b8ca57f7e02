"""One training step of DeepLab, plain against deformable, on the CPU.

    python -m benchmarks.deeplab_step [--threads 2] [--rounds 7] [--depth 50] [--size 360 480]

A step is forward, loss, backward and SGD on one image of random pixels; 0 and 3 deformable layers.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.timing import compare, median_ratio, setting
from deformnet import parameter_groups
from deformnet.recipes import DeepLabRecipe


def training_step(recipe: DeepLabRecipe, size: tuple[int, int]) -> Callable[[], None]:
    torch.manual_seed(0)
    model = recipe.build_model(21).train()
    # Zero offsets would read every sample from the fewest cache lines.
    for name, parameter in model.named_parameters():
        if "conv_offset.weight" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=1e-4, momentum=0.9)
    images = torch.randn(recipe.batch, 3, *size).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    target = torch.randint(21, (recipe.batch, *size))

    def step() -> None:
        optimizer.zero_grad()
        sum(model.losses(model(images), target).values()).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101), default=50)
    parser.add_argument("--size", type=int, nargs=2, default=(360, 480), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(setting())
    steps = {
        str(layers): training_step(
            DeepLabRecipe(depth=options.depth, deform_layers=layers, batch=options.batch),
            tuple(options.size),
        )
        for layers in (0, 3)
    }
    times = compare(steps, rounds=options.rounds)
    for layers, timing in times.items():
        print(
            f"ResNet-{options.depth}, {layers} deformable layers: {timing.median:.3f} s a step "
            f"({timing.quantile(0.2):.3f}-{timing.quantile(0.8):.3f}), "
            f"{median_ratio(times, layers, '0'):.2f} times the plain network"
        )


if __name__ == "__main__":
    main()
