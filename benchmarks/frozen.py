"""Training steps on a frozen backbone, with and without cached features, on one thread.

    python -m benchmarks.frozen [--network rfcn] [--loss-stride 4] [--data DIR] [--profile]

A step reads a batch of 16 images of 320x320, and does forward, loss, backward and SGD. The network
has three residual 3x3 convolutions of 96 channels on a frozen EfficientNet-Lite0, both with random
weights, and 21 classes. Four kinds of steps take turns, in rotating order, on the same images.
Times are CPU times, so that other programs on the machine matter little.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from deformnet.data.synthetic import Shapes, write_shapes
from deformnet.engine.runs import machine
from deformnet.models.network import Network
from deformnet.nn import parameter_groups
from deformnet.paper.cases import set_offsets
from deformnet.recipes import DeepLabRecipe, Recipe, RFCNRecipe
from deformnet.tasks import task_of
from deformnet.tasks.base import Features, Processes, TrainingSet
from deformnet.tasks.features import FeatureCache

CLASSES = 21
NETWORKS = {"deeplab": DeepLabRecipe, "rfcn": RFCNRecipe}
_LR = 1e-4  # so small that a few steps do not change the times


class Step(NamedTuple):
    """A training step of a network; `features` is None if the frozen backbone computes them."""

    model: Network
    optimizer: torch.optim.Optimizer
    images: TrainingSet
    features: Features | None

    def run(self, indices: Sequence[int]) -> tuple[float, float]:
        """Does a step. Returns the seconds of reading its batch, and those of the rest."""
        begin = time.process_time()
        self.images.features = self.features
        batch = self.images.batch(indices, indices)
        read = time.process_time()
        self.optimizer.zero_grad()
        torch.stack(list(batch.losses(self.model).values())).sum().backward()
        self.optimizer.step()
        return read - begin, time.process_time() - read


def steps(recipe: Recipe, data: Path, cache: Path) -> dict[str, Step]:
    """The steps by "plain" or "deformable", and "computed" or "cached"."""
    images = task_of(recipe).training_set(data, "train")
    found: dict[str, Step] = {}
    for kind, own in {"plain": recipe.baseline(), "deformable": recipe}.items():
        torch.manual_seed(0)  # the same backbone
        model = own.build_model(CLASSES if recipe.network == "deeplab" else CLASSES - 1)
        model = model.to(memory_format=torch.channels_last)
        features = FeatureCache(cache, model.backbone, torch.device("cpu"))
        stored = features.filled(images, recipe.flip, Processes(progress=True))
        set_offsets(model, model.random_losses(torch.randn(1, 3, 64, 64)))
        model.train()
        optimizer = torch.optim.SGD(parameter_groups(model, _LR), lr=_LR, momentum=0.9)
        found[f"{kind}, computed"] = Step(model, optimizer, images, None)
        found[f"{kind}, cached"] = Step(model, optimizer, images, stored)
    return found


def measure(found: dict[str, Step], batch: int, rounds: int) -> None:
    """Prints the times."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    names = list(found)
    for turn in range(rounds + 1):
        images = len(found[names[0]].images)
        indices = [(turn * batch + place) % images for place in range(batch)]
        for name in names[turn % 4 :] + names[: turn % 4]:
            seconds = found[name].run(indices)
            if turn:  # the first includes one-time work
                times[name].append(seconds)
    print("| step | ms | reading, ms | of computed | of plain |")
    print("|---" * 5 + "|")
    for name, own in times.items():
        kind, _, source = name.partition(", ")
        ratios = [
            statistics.median(sum(a) / sum(b) for a, b in zip(own, times[other], strict=True))
            for other in (f"{kind}, computed", f"plain, {source}")
        ]
        whole, read = (1e3 * statistics.median(it) for it in (map(sum, own), (t[0] for t in own)))
        print(f"| {name} | {whole:.0f} | {read:.0f} | {ratios[0]:.3f} | {ratios[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="deeplab")
    parser.add_argument("--loss-stride", type=int, default=1, help="of DeepLab")
    parser.add_argument("--data", type=Path, help="data set to read instead of synthetic images")
    parser.add_argument("--size", type=int, default=320, help="shorter side of the images")
    parser.add_argument("--batch", type=int, default=16, help="number of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="list operators of a cached step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = NETWORKS[options.network](
        backbone="timm/tf_efficientnet_lite0",
        init=None,
        norm="frozen",
        freeze=5,
        neck="residual",
        deform_layers=3,
        short_side=options.size,
        batch=options.batch,
    )
    if isinstance(recipe, DeepLabRecipe):
        recipe = dataclasses.replace(recipe, loss_stride=options.loss_stride)
    print(
        f"{options.network}, {options.batch} images of {options.size} pixels, 1 thread, medians of "
        f"{options.rounds} rounds; {machine()}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data, side = Path(folder) / "data", options.size
            write_shapes(data, Shapes(train=2 * options.batch, val=1, height=side, width=side))
        found = steps(recipe, data, Path(folder) / "features")
        measure(found, options.batch, options.rounds)
        if options.profile:
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                found["deformable, cached"].run(range(options.batch))
            print(profiled.key_averages().table("self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
