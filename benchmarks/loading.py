"""Images per second of data loading and of training.

    python -m benchmarks.loading [--rows ROW ...] [--workers 0 1 2]

Loading includes reading, decoding, resizing, cropping, flipping and normalizing, in the worker
processes of the run. A step is forward, backward and update of the row's full-size network on one
image in memory.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deformnet._files import write_json
from deformnet.engine.runs import machine, versions
from deformnet.engine.sampling import Iterations
from deformnet.nn import parameter_groups
from deformnet.paper.rows import IMAGENET, Row, find_rows
from deformnet.paper.synthetic import write_synthetic_data
from deformnet.paper.timing import Timing
from deformnet.recipes import Recipe
from deformnet.tasks import task_of
from deformnet.tasks.base import Batch

# Rows, with the size of their images on disk.
SIZES = {
    "table1/deeplab-voc-3": (375, 500),
    "table1/rfcn-3": (375, 500),
    "table7/resnet101": (375, 500),
    "table1/deeplab-cityscapes-3": (1024, 2048),
}


def recipe_of(row: Row) -> Recipe:
    """The recipe of a row with batch size 1, which does not affect loading speed."""
    assert row.recipe is not None
    return dataclasses.replace(row.recipe, batch=1, init=None, norm="trained")


def batches(row: Row, data: Path, workers: int) -> Iterator[list[Batch]]:
    """The batches that a training process with this many workers receives, in order."""
    recipe = recipe_of(row)
    images = task_of(recipe).training_set(data, row.data.train)
    loader = Iterations(images, recipe).loader(0, recipe.iterations, workers=workers, pin=False)
    return iter(loader)


def loading_rate(row: Row, data: Path, workers: int, images: int, rounds: int) -> Timing:
    """Images per second, once the workers are busy."""
    found = []
    stream = batches(row, data, workers)
    for _ in range(4 * max(workers, 1)):
        next(stream)
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(images):
            next(stream)
        found.append(images / (time.perf_counter() - start))
    return Timing(tuple(found))


def step_rate(row: Row, data: Path, rounds: int) -> Timing:
    """Images per second of training steps on an image in memory."""
    ((part,),) = (next(batches(row, data, 0)),)
    model = recipe_of(row).build_model(row.data.classes).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-6), momentum=0.9)
    found = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.stack(list(part.losses(model).values())).sum().backward()
        optimizer.step()
        if number:  # the first includes one-time work
            found.append(1 / (time.perf_counter() - start))
    return Timing(tuple(found))


def spread(timing: Timing) -> str:
    return f"{timing.median:6.2f} ({timing.fastest:.2f}-{max(timing.rounds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=24, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    print(f"{machine()}; images per second, median of {options.rounds} rounds (minimum-maximum)")
    heading = "  ".join(f"{f'{n} workers':^20}" for n in options.workers)
    print(f"{'row':28}  {'on disk':>9}  {heading}  {'training steps':^20}")
    results = {"machine": machine(), "versions": versions(), "rows": {}}
    for row in find_rows(options.rows):
        height, width = SIZES[row.name]
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder)
            write_synthetic_data(row.data, data, height, width)
            if row.data is IMAGENET:  # all classes but one have tiny images
                photo = (data / "train/n00000000/0.jpg").read_bytes()
                for path in data.glob("train/*/0.jpg"):
                    path.write_bytes(photo)
            rates = {
                f"{workers} loaders": loading_rate(
                    row, data, workers, options.images, options.rounds
                )
                for workers in options.workers
            }
            rates["steps"] = step_rate(row, data, options.rounds)
        cells = "  ".join(f"{spread(rate):20}" for rate in rates.values())
        print(f"{row.name:28}  {f'{width}x{height}':>9}  {cells}", flush=True)
        results["rows"][row.name] = {name: list(rate.rounds) for name, rate in rates.items()}
    if options.out is not None:
        write_json(options.out, results)


if __name__ == "__main__":
    main()
