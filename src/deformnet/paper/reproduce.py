"""Training and scoring a row of the paper."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from deformnet._files import write_json
from deformnet.data import open_detection, open_segmentation
from deformnet.data.image_folder import ImageFolderClassification
from deformnet.engine import evaluate, propose, train
from deformnet.engine.runs import checkpoint_path, load_checkpoint
from deformnet.paper.listing import result_path
from deformnet.paper.rows import Row, choices, find_rows, proposal_recipe
from deformnet.paper.settings import Machines, Splits
from deformnet.recipes import ClassifierRecipe, DeepLabRecipe, Recipe


def reproduce(
    row: Row,
    data: Path,
    out: Path,
    *,
    init: str | None = None,
    splits: Splits = Splits(),  # noqa: B008 (it is frozen)
    machines: Machines = Machines(),  # noqa: B008
) -> dict[str, Any]:
    """Trains a row as published, or goes on with it, and scores it.

    Args:
        row: which.
        data: the folder of its data set; see docs/data.md.
        out: folder of all rows: `runs` (shared by rows that are trained alike), `proposals` and
            `results`.
        init: what the backbone starts from, in the place of what the row names.
        splits: other lists of images; the result says which.
        machines: where it is computed.
    Returns:
        What `results/ROW.json` holds: {"row", "paper", "measured", "metrics", "choices", ...}.
    Raises:
        ValueError: if the row has no recipe, or the data do not fit it.
        FileNotFoundError: if data are missing, or the run that the row starts from.
    """
    require_runnable([row], data, splits)
    assert row.recipe is not None
    train_split = splits.train_split or row.data.train
    test_split = splits.test_split or row.data.test
    recipe = _started(row, row.recipe, out, init)
    proposals: list[Path] = []
    if row.fixed_proposals:
        proposals = _proposals(row, recipe, data, out, (train_split, test_split), machines)
    run = out / "runs" / row.run
    _train(recipe, data, run, train_split, proposals[:1], machines)
    metrics = evaluate(
        run,
        data,
        test_split,
        score_at=row.score_at,
        testing=row.testing,
        proposals=proposals[1:],
        # Rows that share a run differ in what they find.
        out=result_path(row, out).with_suffix(""),
        devices=machines.devices,
        nodes=machines.nodes,
        accelerator=machines.accelerator,
        workers=machines.workers,
    )
    result = {
        "row": row.name,
        "run": str(run),
        "data": str(data),
        "train_split": train_split,
        "test_split": test_split,
        "paper": dict(row.paper),
        "measured": measured(metrics) if metrics else {},
        "metrics": metrics,
        "choices": choices(row),
    }
    rank_zero_only(write_json)(result_path(row, out), result)
    return result


def measured(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The scores of a run in percent, by the names that the paper's tables have for them."""
    found: dict[str, float | None] = {}
    if "mean_iou" in metrics:
        found = {"mean IoU": metrics["mean_iou"]}
    elif "top1_error" in metrics:
        found = {"top-1 error": metrics["top1_error"], "top-5 error": metrics["top5_error"]}
    elif "coco" in metrics:
        found = metrics["coco"]
    elif "voc" in metrics:
        (voc,) = metrics["voc"].values()
        found = {f"mAP@{iou}": value for iou, value in voc["mean_ap"].items()}
    return {name: None if value is None else 100 * value for name, value in found.items()}


def require_runnable(rows: Sequence[Row], data: Path, splits: Splits) -> None:
    """Refuses rows without a recipe and data of another kind before days of work.

    Raises:
        FileNotFoundError: if the folder or a split is not there.
        ValueError: if a row has no recipe, or the classes are not as many as a row's.
    """
    seen = set()
    for row in rows:
        if row.recipe is None:
            raise ValueError(f"{row.name}: is not built here: {row.missing}")
        for split in (splits.train_split or row.data.train, splits.test_split or row.data.test):
            if (row.data, split) in seen:
                continue
            seen.add((row.data, split))
            if isinstance(row.recipe, ClassifierRecipe):
                classes = ImageFolderClassification(data, split).classes
            elif isinstance(row.recipe, DeepLabRecipe):
                classes = open_segmentation(data, split).classes
            else:
                classes = open_detection(data, split).classes
            if len(classes) != row.data.classes:
                few = ", ".join(classes[:3])
                raise ValueError(
                    f"{data}: {row.name} is for {row.data.title} with {row.data.classes} classes; "
                    f"{split} here has {len(classes)} ({few}, ...)"
                )


def _started(row: Row, recipe: Recipe, out: Path, init: str | None) -> Recipe:
    """The recipe with what its backbone starts from."""
    if init is not None:
        return dataclasses.replace(recipe, init=init)
    if row.starts_from is None:
        return recipe
    (base,) = find_rows([row.starts_from])
    run = out / "runs" / base.run
    if not checkpoint_path(run).is_file():
        raise FileNotFoundError(
            f"{row.name}: starts from {base.name}, which has no public weights and no run in "
            f"{out}: train it there first (`deformnet reproduce {base.name}`), or give --init"
        )
    done = load_checkpoint(checkpoint_path(run))["global_step"]
    assert base.recipe is not None
    if done < base.recipe.iterations:
        raise ValueError(
            f"{row.name}: starts from {base.name}, whose run in {out} has done {done} of "
            f"{base.recipe.iterations} iterations: finish it first, or give --init"
        )
    return dataclasses.replace(recipe, init=str(run.resolve()))


def _proposals(
    row: Row,
    recipe: Recipe,
    data: Path,
    out: Path,
    splits: tuple[str, str],
    machines: Machines,
) -> list[Path]:
    """Files of the proposals of both splits, made by an RPN that is trained for all rows."""
    run = out / "runs" / f"{row.data.key}-rpn"
    rpn = dataclasses.replace(proposal_recipe(recipe), init=recipe.init)
    _train(rpn, data, run, splits[0], [], machines)
    # Boxes of another network, trained anew, are others.
    with checkpoint_path(run).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    files = []
    for split in splits:
        name = f"{row.data.key}-{split.replace('/', '_')}-{digest}.safetensors"
        path = out / "proposals" / name
        if not path.is_file():
            propose(
                run,
                data,
                split,
                path,
                devices=machines.devices,
                nodes=machines.nodes,
                accelerator=machines.accelerator,
                workers=machines.workers,
            )
        files.append(path)
    return files


def _train(
    recipe: Recipe,
    data: Path,
    run: Path,
    split: str,
    proposals: Sequence[Path],
    machines: Machines,
) -> None:
    train(
        recipe,
        data,
        run,
        split=split,
        val_split=None,
        proposals=proposals,
        devices=machines.devices,
        nodes=machines.nodes,
        accelerator=machines.accelerator,
        accumulate=machines.accumulate,
        workers=machines.workers,
        checkpoint_every=machines.checkpoint_every,
        log_every=machines.log_every,
    )
