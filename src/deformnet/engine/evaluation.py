"""Evaluation of trained networks, and their proposals, from folder to folder."""

import dataclasses
from pathlib import Path
from typing import cast

from torch import nn

from deformnet._errors import UserError
from deformnet._files import require_writable
from deformnet.engine.processes import FabricProcesses, Layout, Precision, launched
from deformnet.engine.results import Result
from deformnet.engine.runs import (
    existing_checkpoint,
    load_checkpoint,
    load_run,
    require_folder,
    restored,
    versions,
)
from deformnet.engine.settings import Hardware
from deformnet.models.backbones import Backbone
from deformnet.models.network import Network
from deformnet.recipes import Recipe
from deformnet.tasks import task_of
from deformnet.tasks.base import DataIdentity, EvaluationSet, ProposalSet, Scores, TaskOptions
from deformnet.tasks.features import FeatureCache
from deformnet.tasks.own import Data
from deformnet.tasks.proposals import require_proposals


def evaluate(
    run: str | Path,
    data: Data,
    split: str = "val",
    *,
    options: TaskOptions = TaskOptions(),  # noqa: B008 (frozen)
    out: str | Path | None = None,
    feature_cache: str | Path | None = None,
    hardware: Hardware = Hardware(),  # noqa: B008
    progress: bool = True,
) -> Result:
    """Evaluates a trained network on a split, and writes `metrics-SPLIT.json` into its run folder.

    Args:
        run: run folder.
        data: folder of a data set, or a torch data set, as for `train`, with the classes that the
            run was trained on.
        split: split to evaluate on; for a torch data set, its name in the results.
        options: size at which labels are compared, test-time augmentation, stored proposals.
        out: folder of the results; None is the run folder.
        feature_cache: folder to keep the features of a frozen backbone in; see `LoopOptions`.
        hardware: processes and devices.
        progress: show a progress bar.
    Returns:
        The contents of that file. Detections are written to `detections-SPLIT.jsonl`.
    Raises:
        FileNotFoundError: if the run or the data set is missing.
        UserError: if the checkpoint or an image is damaged, the classes differ, or an option does
            not apply to the network.
        OSError: if a file cannot be written.
    """
    run, out = Path(run), Path(run if out is None else out)
    require_folder(run, " to write the scores to")
    checkpoint = load_checkpoint(path := existing_checkpoint(run))
    recipe, model, trained_on = restored(checkpoint, path)
    images = task_of(recipe, options).evaluation_set(data, split, trained_on)
    backbone = cast(Network, model).backbone
    if feature_cache is not None:
        require_frozen(backbone, recipe)
    layout = Layout.of(hardware)
    facts = {**shared_facts(recipe, trained_on, images), "feature_cache": feature_cache}
    with launched(layout, _precision(recipe, layout), facts) as processes:
        cache = None
        if feature_cache is not None:
            cache = FeatureCache(feature_cache, backbone, processes.fabric.device)
        result = dataclasses.replace(
            Result.of(recipe, model, run, checkpoint["iteration"]),
            split=split,
            images=len(images),
            scores=score(processes, model, images, progress=progress, cache=cache),
            augmentation=options.augmentation,
        )
        if processes.rank == 0:
            result = result.save(out, f"-{split.replace('/', '-')}")  # VOC's years have a slash
    return result


def propose(
    run: str | Path,
    data: str | Path,
    split: str,
    out: str | Path,
    *,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> int:
    """Writes the proposals of a trained detector for all images of a split, to train others on.

    Args:
        run: run folder of an RPN or another detector.
        data: folder of a detection data set; its boxes and classes are not used.
        split: split to make proposals for.
        out: file to write; see `deformnet.tasks.proposals`.
        hardware: processes and devices.
        progress: show a progress bar.
    Returns:
        The number of images.
    Raises:
        FileNotFoundError: if run or data are missing.
        UserError: if the run does not produce proposals, an image cannot be read, or `out` is a
            file of another kind.
        OSError: if the file cannot be written.
    """
    require_proposals(out := Path(out))
    recipe, model, trained_on = load_run(run)
    images = task_of(recipe).proposal_set(Path(data), split, trained_on)
    require_writable(out.parent)
    layout = Layout.of(hardware)
    facts = shared_facts(recipe, trained_on, images)
    with launched(layout, _precision(recipe, layout), facts) as processes:
        with processes.fabric.autocast():
            images.write(model, out, dataclasses.replace(processes, progress=progress))
        processes.fabric.barrier()  # the file exists before any process continues
    return len(images)


def score(
    processes: FabricProcesses,
    model: nn.Module,
    images: EvaluationSet,
    *,
    progress: bool,
    cache: FeatureCache | None = None,
) -> Scores:
    """Evaluates a network in the processes of a run; all of them get the scores.

    Args:
        model: the network, which then keeps to `cache`, the features of its backbone.
    Raises:
        StopRequested: if the processes are asked to stop.
    """
    processes.places.at("evaluation")
    if cache is not None:
        cast(Network, model).backbone.recall = cache.recall
    with processes.fabric.autocast():
        return images.evaluate(model, dataclasses.replace(processes, progress=progress))


def require_frozen(backbone: Backbone, recipe: Recipe) -> None:
    """Raises UserError if the features of a backbone may change, or have stride 32."""
    if backbone.stride > 16:
        raise UserError(
            "expected features of stride 8 or 16 for feature_cache, but got stride "
            f"{backbone.stride}, as in classifiers or with output_stride 32"
        )
    if not backbone.frozen:
        raise UserError(
            "expected a frozen backbone for feature_cache (freeze 5, and deform_layers 0 or a "
            f"neck), but got freeze={recipe.freeze} and deform_layers={recipe.deform_layers}"
        )


def shared_facts(
    recipe: Recipe, trained_on: DataIdentity, images: EvaluationSet | ProposalSet | None
) -> dict[str, object]:
    """What every process of a run must agree on, by name."""
    return {
        **recipe.to_dict(),
        "data": f"{trained_on.images} images ({trained_on.digest[:8]})",
        "images to evaluate": None if images is None else len(images),
        **versions(),
    }


def _precision(recipe: Recipe, layout: Layout) -> Precision:
    # CPUs have no float16 arithmetic; Fabric would take bfloat16.
    return "32-true" if recipe.precision == "16-mixed" and not layout.gpu else recipe.precision
