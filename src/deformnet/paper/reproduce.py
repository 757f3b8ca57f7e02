"""Training and evaluation of a row of the paper."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from deformnet._errors import UserError
from deformnet._files import naming, write_json
from deformnet.engine import Hardware, LoopOptions, evaluate, is_first_process, propose, train
from deformnet.engine.runs import checkpoint_path, iterations_done
from deformnet.paper.rows import Row, find_rows, proposal_recipe
from deformnet.paper.settings import Splits
from deformnet.recipes import Recipe
from deformnet.tasks import TaskOptions, task_of


class RowResult(TypedDict):
    """Content of `results/ROW.json`.

    Attributes:
        paper, measured: numbers in percent, by metric.
        metrics: content of the `metrics.json` of the run.
    """

    row: str
    run: str
    data: str
    train_split: str
    test_split: str
    paper: dict[str, float]
    measured: dict[str, float | None]
    metrics: dict[str, object]
    choices: list[str]


def result_path(row: Row, out: Path) -> Path:
    """Return the path of the result of a row."""
    return out / "results" / f"{row.name}.json"


def reproduce(
    row: Row,
    data: Path,
    out: Path,
    *,
    init: str | None = None,
    splits: Splits = Splits(),  # noqa: B008 (frozen)
    hardware: Hardware = Hardware(),  # noqa: B008
    loop: LoopOptions = LoopOptions(),  # noqa: B008
) -> RowResult:
    """Train a row as published, or resume its training, and evaluate it.

    Args:
        data: folder of the row's data set; see docs/data.md.
        out: folder of all rows: `runs` (shared by rows with the same training), `proposals` and
            `results`.
        init: initial weights of the backbone, instead of those that the row names.
        splits: splits to use instead of those of the row; the result records them.
    Returns:
        The content of `results/ROW.json`.
    Raises:
        UserError: if the row has no recipe, or the data do not fit it.
        FileNotFoundError: if data are missing, or the run that the row starts from.
    """
    require_runnable([row], data, splits)
    train_split, test_split = splits.of(row.data.train, row.data.test)
    recipe = _initialized(row, out, init)
    fit = partial(train, split=train_split, val_split=None, hardware=hardware, loop=loop)
    proposals: list[Path] = []
    if row.fixed_proposals:
        rpn = out / "runs" / f"{row.data.key}-rpn"
        fit(dataclasses.replace(proposal_recipe(recipe), init=recipe.init), data, rpn)
        for split in (train_split, test_split):
            proposals.append(_proposals(row, rpn, data, out, split, hardware))
    run = out / "runs" / row.run
    fit(recipe, data, run, proposals=proposals[:1])
    options = TaskOptions(
        score_at=row.score_at, augmentation=row.augmentation, proposals=tuple(proposals[1:])
    )
    # Rows that share a run differ in their detections.
    folder = result_path(row, out).with_suffix("")
    scored = evaluate(run, data, test_split, options=options, out=folder, hardware=hardware)
    result: RowResult = {
        "row": row.name,
        "run": str(run),
        "data": str(data),
        "train_split": train_split,
        "test_split": test_split,
        "paper": dict(row.paper),
        "measured": {} if scored.scores is None else scored.scores.summary,
        "metrics": scored.to_json(),
        "choices": [*row.choices],
    }
    if is_first_process():
        write_json(result_path(row, out), result)
    return result


def require_runnable(rows: Sequence[Row], data: Path, splits: Splits) -> None:
    """Check that rows have recipes and the data fit them, before days of work.

    Raises:
        FileNotFoundError: if the folder or a split is missing.
        UserError: if a row has no recipe, or the number of classes differs.
    """
    checked = set()
    for row in rows:
        if row.recipe is None:
            raise UserError(f"{row.name}: not implemented: {row.missing}")
        task = task_of(row.recipe)
        train_split, test_split = splits.of(row.data.train, row.data.test)
        for open_set, split in (
            (task.training_set, train_split),
            (task.evaluation_set, test_split),
        ):
            if (row.data, split) in checked:
                continue
            checked.add((row.data, split))
            classes = open_set(data, split).classes
            if len(classes) != row.data.classes:
                few = ", ".join(classes[:3])
                raise UserError(
                    f"{data}: expected {row.data.title} with {row.data.classes} classes for "
                    f"{row.name}, but got {len(classes)} classes in {split} ({few}, ...)"
                )


def _initialized(row: Row, out: Path, init: str | None) -> Recipe:
    """Return the recipe with the initial weights of its backbone."""
    assert row.recipe is not None
    if init is not None:
        return dataclasses.replace(row.recipe, init=init)
    if row.starts_from is None:
        return row.recipe
    (base,) = find_rows([row.starts_from])
    assert base.recipe is not None
    run = out / "runs" / base.run
    if not checkpoint_path(run).is_file():
        raise FileNotFoundError(
            f"{row.name}: starts from {base.name}, which has no public weights and no run in "
            f"{out}: train it first (`deformnet paper reproduce {base.name}`), or pass --init"
        )
    done = iterations_done(run)
    if done < base.recipe.iterations:
        raise UserError(
            f"{row.name}: starts from {base.name}, whose run in {out} has done {done} of "
            f"{base.recipe.iterations} iterations: finish it first, or pass --init"
        )
    return dataclasses.replace(row.recipe, init=str(run.resolve()))


def _proposals(row: Row, rpn: Path, data: Path, out: Path, split: str, hardware: Hardware) -> Path:
    """Return the proposal file of a split, from the run of an RPN that all rows share."""
    # An RPN that is trained anew gives other boxes.
    trained = checkpoint_path(rpn)
    with naming(trained), trained.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    path = out / f"proposals/{row.data.key}-{split.replace('/', '_')}-{digest}.safetensors"
    if not path.is_file():
        propose(rpn, data, split, path, hardware=hardware)
    return path
