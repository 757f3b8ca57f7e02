"""Dry runs: two training iterations and one evaluation of a row, with their memory and time."""

import ctypes
import dataclasses
import gc
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from deformnet._errors import UserError
from deformnet._files import read_json, replacing, write_json
from deformnet._text import Table
from deformnet.data.synthetic import Shapes, scene
from deformnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deformnet.engine import Hardware, LoopOptions, evaluate, propose, train
from deformnet.engine.logs import read_log
from deformnet.engine.runs import machine, versions
from deformnet.models.backbones import backbone
from deformnet.paper.cases import count_parameters, set_statistics
from deformnet.paper.rows import Row, proposal_recipe
from deformnet.paper.settings import DryRun, Splits
from deformnet.paper.synthetic import write_synthetic_data
from deformnet.recipes import Recipe
from deformnet.tasks import TaskOptions

_ITERATIONS = 2
_STATISTICS_SIDE = 224  # of the image that batch norm takes its statistics from, in pixels
_PROC_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_HARDWARE = Hardware(workers=0)


class RunMeasurements(TypedDict):
    """Measurements of a training run.

    Attributes:
        seconds_per_step: of the second iteration; the first includes one-time costs.
        peak_memory_bytes: peak memory of the process, or of the GPU.
        batch: images per iteration.
        short_side: in pixels.
    """

    parameters: int
    seconds_per_step: float
    peak_memory_bytes: int
    batch: int
    short_side: int
    machine: str
    versions: dict[str, str | None]


class DryRunResult(RunMeasurements):
    """Measurements of a row."""

    row: str
    run: str


def dry_run_rows(
    rows: Sequence[Row],
    dry: DryRun,
    *,
    data: Path | None = None,
    out: Path | None = None,
    splits: Splits = Splits(),  # noqa: B008 (frozen)
) -> list[DryRunResult]:
    """Build each row's network at full size, run two training iterations, and evaluate once.

    Weights are random, with the batch norm statistics of one image: frozen batch norm that has
    never seen data would overflow. Rows with the same training run once.

    Args:
        rows: rows to run; those without a recipe are skipped.
        data: folder of images; None writes synthetic images in the layout of the row's data set.
        out: JSON file of the results; only rows that it does not hold yet are run. None to write
            none.
    Raises:
        UserError: if `out` was written with other settings, or the data do not fit.
    """
    conditions = {
        "batch": dry.batch,
        "scale": dry.scale,
        "data": "synthetic" if data is None else str(data),
        "splits": dataclasses.asdict(splits),
    }
    runs = _earlier_runs(out, conditions)
    rows = [row for row in rows if row.recipe is not None]
    for row in tqdm(rows, desc="dry run", disable=None):
        if row.run not in runs:
            with tempfile.TemporaryDirectory(prefix="deformnet-") as folder:
                runs[row.run] = _run(row, dry, data, Path(folder), splits)
            if out is not None:
                write_json(out, {"conditions": conditions, "runs": runs})
    return [{"row": row.name, "run": row.run, **runs[row.run]} for row in rows]


def dry_run_table(results: Sequence[DryRunResult]) -> str:
    """Return the results as a table for a terminal."""
    return str(
        Table(
            "Two training iterations and one evaluation. Parameters include the region proposal\n"
            "network of a detector; memory includes about 0.5 GB of the process itself.",
            ("row", "parameters, M", "batch", "short side, px", "s/iteration", "peak GB"),
            [
                (
                    it["row"],
                    f"{it['parameters'] / 1e6:.3f}",
                    str(it["batch"]),
                    str(it["short_side"]),
                    f"{it['seconds_per_step']:.2f}",
                    f"{it['peak_memory_bytes'] / 1e9:.2f}",
                )
                for it in results
            ],
        )
    )


def _earlier_runs(out: Path | None, conditions: dict[str, object]) -> dict[str, RunMeasurements]:
    if out is None or not out.is_file():
        return {}
    content = read_json(out)
    parts = (content.get("conditions"), content.get("runs")) if isinstance(content, dict) else ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"{out}: expected a new file or the results of a dry run, but got another file, which "
            "was not changed; choose another name"
        )
    for name, value in conditions.items():
        if content["conditions"].get(name) != value:
            raise UserError(
                f"{out}: expected a dry run with {name} {value}, but got one with {name} "
                f"{content['conditions'].get(name)}; choose another file"
            )
    return content["runs"]


def _run(row: Row, dry: DryRun, data: Path | None, folder: Path, splits: Splits) -> RunMeasurements:
    assert row.recipe is not None
    train_split, test_split = splits.of(row.data.train, row.data.test)
    recipe = _shortened(row.recipe, dry)
    if data is None:
        data = folder / "data"
        write_synthetic_data(row.data, data, *recipe.image_size)
    recipe = _initialized(recipe, folder / "weights.pth")
    loop = LoopOptions(log_every=1, progress=False)
    fit = partial(train, split=train_split, val_split=None, hardware=_HARDWARE, loop=loop)
    _reset_peak()
    proposals: list[Path] = []
    if row.fixed_proposals:
        rpn = dataclasses.replace(_shortened(proposal_recipe(row.recipe), dry), init=recipe.init)
        fit(rpn, data, folder / "rpn")
        for number, split in enumerate((train_split, test_split)):
            path = folder / f"{number}.safetensors"
            propose(folder / "rpn", data, split, path, hardware=_HARDWARE, progress=False)
            proposals.append(path)
        _reset_peak()
    run = folder / "run"
    fit(recipe, data, run, proposals=proposals[:1])
    scales = tuple(round(side * dry.scale) for side in row.augmentation.scales)
    augmentation = dataclasses.replace(row.augmentation, scales=scales)
    options = TaskOptions(
        score_at=row.score_at, augmentation=augmentation, proposals=tuple(proposals[1:])
    )
    evaluate(run, data, test_split, options=options, hardware=_HARDWARE, progress=False)
    return {
        "parameters": _parameters(row),
        "seconds_per_step": float(read_log(run / "metrics.csv")[-1]["seconds"]),
        "peak_memory_bytes": _peak(),
        "batch": recipe.batch,
        "short_side": min(recipe.image_size),
        "machine": machine(),
        "versions": versions(),
    }


def _shortened(recipe: Recipe, dry: DryRun) -> Recipe:
    """Return the recipe with the iterations, batch and image sizes of a dry run."""
    recipe = recipe.scaled(dry.scale)
    return dataclasses.replace(recipe, iterations=_ITERATIONS, batch=dry.batch or recipe.batch)


def _parameters(row: Row) -> int:
    """Count the parameters of the row's network, with those of a batch norm that is frozen."""
    assert row.recipe is not None
    recipe = dataclasses.replace(row.recipe, norm="trained", init=None)
    with torch.device("meta"):
        model = recipe.build_model(row.data.classes)
    return count_parameters(model)


def _initialized(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe with random weights, written to `path` if its batch norm is frozen."""
    if recipe.norm == "trained":
        return dataclasses.replace(recipe, init=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = backbone(recipe.backbone, stride_in_1x1=recipe.stride_in_1x1, reduce_channels=None)
    shapes = Shapes(height=_STATISTICS_SIDE, width=_STATISTICS_SIDE)
    image = torch.from_numpy(scene(shapes, "train", 0).image).permute(2, 0, 1) / 255
    with torch.no_grad():
        set_statistics(model, F.normalize(image, [*IMAGENET_MEAN], [*IMAGENET_STD])[None])
    with replacing(path, durable=False) as file:
        torch.save(model.state_dict(), file)
    return dataclasses.replace(recipe, init=str(path))


def _reset_peak() -> None:
    """Reset the peak memory, where the system allows it.

    Memory of earlier rows is returned to the system first, or it would count again.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def _peak() -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _PROC_STATUS.exists():
        lines = dict(line.split(":", 1) for line in _PROC_STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
