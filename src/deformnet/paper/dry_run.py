"""Two training steps and one evaluation of a row: it runs, in this memory and at this pace."""

import ctypes
import dataclasses
import gc
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from tqdm import tqdm

from deformnet._files import write_json
from deformnet.data import open_detection, open_segmentation
from deformnet.data.files import read_image, read_size
from deformnet.data.image_folder import ImageFolderClassification
from deformnet.data.transforms import segmentation_evaluation_transforms
from deformnet.engine import evaluate, propose, train
from deformnet.engine.callbacks import read_log
from deformnet.engine.runs import machine, versions
from deformnet.models.backbones import backbone
from deformnet.paper.rows import Row, proposal_recipe
from deformnet.paper.settings import DryRun, Splits
from deformnet.paper.synthetic import write_synthetic_data
from deformnet.recipes import (
    ClassifierRecipe,
    DeepLabRecipe,
    DenseRecipe,
    Recipe,
    TestTimeAugmentation,
)

_STEPS = 2
_STATISTICS_SIDE = 224  # shorter side, in pixels, of the image that batch norm sees
_PROC_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def dry_run_rows(
    rows: Sequence[Row],
    dry: DryRun,
    *,
    data: Path | None = None,
    out: Path | None = None,
    splits: Splits = Splits(),  # noqa: B008 (it is frozen)
) -> list[dict[str, Any]]:
    """Builds each row's network at full size, takes two training steps and scores once.

    Weights are random, with the batch norm statistics of one image: through frozen batch norm that
    has never seen data, numbers would overflow. Rows that are trained alike run once.

    Args:
        rows: which; those without a recipe are passed over.
        dry: smaller steps or images.
        data: folder of images to take; None makes some in the layout of the row's data set.
        out: JSON file of the results, to which rows are added that it does not hold yet; None for
            none.
        splits: of `data`.
    Returns:
        For each row "row", "run", "parameters", "seconds_per_step", "peak_memory_bytes" (of the
        process, or of the GPU), "batch", "short_side", "machine" and "versions".
    Raises:
        ValueError: if `out` is of other settings, or the data do not fit.
    """
    conditions = {
        "batch": dry.batch,
        "scale": dry.scale,
        "data": "made" if data is None else str(data),
        "splits": dataclasses.asdict(splits),
    }
    found = _earlier(out, conditions)
    rows = [row for row in rows if row.recipe is not None]
    for row in tqdm(rows, desc="dry run", disable=None):
        if row.run not in found:
            with tempfile.TemporaryDirectory(prefix="deformnet-") as folder:
                found[row.run] = _run(row, dry, data, Path(folder), splits)
            if out is not None:
                write_json(out, {"conditions": conditions, "runs": found})
    return [{"row": row.name, "run": row.run, **found[row.run]} for row in rows]


def dry_run_table(results: Sequence[dict[str, Any]]) -> str:
    """The results for a terminal."""
    lines = [
        "Each was built, trained for two steps and scored. Parameters are with a detector's region",
        "proposal network; short side in pixels; memory with the process's own half GB.",
        f"{'row':38}  {'parameters, M':>13}  {'images':>6}  {'short side':>10}  {'s/step':>6}  "
        f"{'peak GB':>7}",
    ]
    lines += [
        f"{found['row']:38}  {found['parameters'] / 1e6:13.3f}  {found['batch']:6}  "
        f"{found['short_side']:10}  {found['seconds_per_step']:6.2f}  "
        f"{found['peak_memory_bytes'] / 1e9:7.2f}"
        for found in results
    ]
    return "\n".join(lines)


def _earlier(out: Path | None, conditions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if out is None or not out.is_file():
        return {}
    content = json.loads(out.read_text())
    for name in conditions:
        if content["conditions"][name] != conditions[name]:
            raise ValueError(
                f"{out}: is of a dry run with {name} {content['conditions'][name]}, not "
                f"{conditions[name]}; choose another file"
            )
    return content["runs"]


def _run(row: Row, dry: DryRun, data: Path | None, folder: Path, splits: Splits) -> dict[str, Any]:
    assert row.recipe is not None
    recipe = _smaller(row.recipe, dry)
    train_split = splits.train_split or row.data.train
    test_split = splits.test_split or row.data.test
    if data is None:
        data = folder / "data"
        write_synthetic_data(row.data, data, *_photo(row, dry))
    recipe = _start(recipe, _image(recipe, data, train_split), folder / "weights.pth")
    _reset_peak()
    proposals = []
    if row.fixed_proposals:
        rpn = folder / "rpn"
        proposing = _smaller(proposal_recipe(row.recipe), dry)
        train(
            dataclasses.replace(proposing, init=recipe.init),
            data,
            rpn,
            split=train_split,
            val_split=None,
            workers=0,
            log_every=1,
            progress=False,
        )
        for number, split in enumerate((train_split, test_split)):
            proposals.append(folder / f"{number}.safetensors")
            propose(rpn, data, split, proposals[-1], workers=0, progress=False)
        _reset_peak()
    run = folder / "run"
    train(
        recipe,
        data,
        run,
        split=train_split,
        val_split=None,
        proposals=proposals[:1],
        workers=0,
        log_every=1,
        progress=False,
    )
    evaluate(
        run,
        data,
        test_split,
        score_at=row.score_at,
        testing=_smaller_testing(row, dry),
        proposals=proposals[1:],
        workers=0,
        progress=False,
    )
    return {
        "parameters": _parameters(row),
        # Of the second step: the first has in it what is done once.
        "seconds_per_step": float(read_log(run / "metrics.csv")[-1]["seconds"]),
        "peak_memory_bytes": _peak(),
        "batch": recipe.batch,
        "short_side": min(_photo(row, dry)),
        "machine": machine(),
        "versions": versions(),
    }


def _smaller(recipe: Recipe, dry: DryRun) -> Recipe:
    """The recipe with two steps, of as many images and at such a size as the dry run wants."""

    def scaled(pixels: int) -> int:
        return round(pixels * dry.scale)

    recipe = dataclasses.replace(recipe, iterations=_STEPS, batch=dry.batch or recipe.batch)
    if isinstance(recipe, ClassifierRecipe):
        return dataclasses.replace(
            recipe,
            resize=(scaled(recipe.resize[0]), scaled(recipe.resize[1])),
            crop=scaled(recipe.crop),
            test_short_side=scaled(recipe.test_short_side),
        )
    assert isinstance(recipe, DenseRecipe)
    recipe = dataclasses.replace(
        recipe,
        short_side=scaled(recipe.short_side),
        max_side=None if recipe.max_side is None else scaled(recipe.max_side),
    )
    if isinstance(recipe, DeepLabRecipe) and recipe.crop is not None:
        height, width = recipe.crop
        recipe = dataclasses.replace(recipe, crop=(scaled(height), scaled(width)))
    return recipe


def _smaller_testing(row: Row, dry: DryRun) -> TestTimeAugmentation:
    scales = tuple(round(side * dry.scale) for side in row.testing.scales)
    return dataclasses.replace(row.testing, scales=scales)


def _parameters(row: Row) -> int:
    """Of the row's network, with the scales and shifts of a batch norm that is frozen."""
    assert row.recipe is not None
    recipe = dataclasses.replace(row.recipe, norm="trained", init=None)
    with torch.device("meta"):
        model = recipe.build_model(row.data.classes)
    return sum(p.numel() for p in model.parameters())


def _photo(row: Row, dry: DryRun) -> tuple[int, int]:
    """Height and width of a made image: the largest that the network sees."""
    assert row.recipe is not None
    recipe = _smaller(row.recipe, dry)
    if isinstance(recipe, ClassifierRecipe):
        return recipe.test_short_side, recipe.test_short_side
    assert isinstance(recipe, DenseRecipe)
    return recipe.short_side, recipe.max_side or recipe.short_side


def _image(recipe: Recipe, data: Path, split: str) -> Path:
    """The first image of a split."""
    if isinstance(recipe, ClassifierRecipe):
        return Path(ImageFolderClassification(data, split).samples[0][0])
    if isinstance(recipe, DeepLabRecipe):
        return open_segmentation(data, split).samples[0].image
    return open_detection(data, split).image_path(0)


def _start(recipe: Recipe, photo: Path, path: Path) -> Recipe:
    """The recipe with something to start from, if its batch norm is frozen.

    Args:
        photo: an image, whose statistics batch norm gets.
        path: file to write the weights into.
    """
    if recipe.norm == "trained":
        return dataclasses.replace(recipe, init=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = backbone(recipe.backbone, stride_in_1x1=recipe.stride_in_1x1, reduce_channels=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # takes them over as they are
    pixels = segmentation_evaluation_transforms(short_side=_STATISTICS_SIDE, max_side=None)(
        tv_tensors.Image(read_image(photo)), tv_tensors.Mask(torch.zeros(read_size(photo)))
    )[0]
    with torch.no_grad():
        model.train()(pixels[None])
    torch.save(model.state_dict(), path)
    return dataclasses.replace(recipe, init=str(path))


def _reset_peak() -> None:
    """Begins to watch for the largest memory anew, where the system allows it.

    What earlier rows had is given back to the system first, or it would count again.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def _peak() -> int:
    """Bytes: the most that the GPU held, or of this process that lay in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _PROC_STATUS.exists():
        lines = dict(line.split(":", 1) for line in _PROC_STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
