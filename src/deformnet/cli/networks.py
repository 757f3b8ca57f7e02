"""Commands that train a network, score it and use it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from deformnet.cli.errors import BAD_INPUT
from deformnet.recipes import TestTimeAugmentation, Recipe
from deformnet.paper.settings import Machines


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `train` asks for besides the recipe."""

    data: Path
    """Folder of images with label maps (DeepLab) or boxes (detectors), in VOC, Cityscapes or COCO
    layout; or sorted into DATA/SPLIT/CLASS (classifier)."""
    out: Path
    """Run folder: recipe, checkpoint, logs and scores."""
    recipe: Path | None = None
    """JSON file of a recipe, such as another run's recipe.json, whose values take the place of the
    defaults below."""
    split: str = "train"
    """Images to train on."""
    val_split: str | None = "val"
    """Images to score at the end; None for none."""
    stop_on_runaway: bool = False
    """End the run when offsets run away, where otherwise there is a warning: when samples are
    moved by more than the map is long, or most of them have left it."""


def base_recipe(recipe: type[Recipe], arguments: Sequence[str]) -> Recipe:
    """The recipe that `train NETWORK --recipe FILE` names, or the default one of the network."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path)
    known, _ = parser.parse_known_args(arguments)
    if known.recipe is None or recipe.network not in arguments:
        return recipe()
    return recipe.load(known.recipe)


def training_command(base: Recipe) -> Callable[..., None]:
    """The command that trains a network; its options have their defaults from `base`."""

    def command(
        run: Annotated[Run, tyro.conf.arg(name="")],
        machines: Annotated[Machines, tyro.conf.arg(name="")] = Machines(),  # noqa: B008 (frozen)
        options: Annotated[type(base), tyro.conf.arg(name="")] = base,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        _train(run, machines, options, ())

    return command


def training_on_proposals_command(base: Recipe) -> Callable[..., None]:
    """The same for a network that can be trained on stored proposals."""

    def command(
        run: Annotated[Run, tyro.conf.arg(name="")],
        machines: Annotated[Machines, tyro.conf.arg(name="")] = Machines(),  # noqa: B008 (frozen)
        options: Annotated[type(base), tyro.conf.arg(name="")] = base,  # pyright: ignore[reportInvalidTypeForm]
        stored_proposals: Annotated[
            tuple[Path, ...],
            tyro.conf.arg(
                help="Files of `deformnet propose`, of the images to train on and to score, in the "
                "place of the network's own proposals."
            ),
        ] = (),
    ) -> None:
        _train(run, machines, options, stored_proposals)

    return command


def _train(run: Run, machines: Machines, recipe: Recipe, proposals: tuple[Path, ...]) -> None:
    from deformnet.engine import train

    metrics = train(
        recipe,
        run.data,
        run.out,
        split=run.split,
        val_split=run.val_split,
        proposals=proposals,
        devices=machines.devices,
        nodes=machines.nodes,
        accumulate=machines.accumulate,
        accelerator=machines.accelerator,
        workers=machines.workers,
        checkpoint_every=machines.checkpoint_every,
        log_every=machines.log_every,
        stop_on_runaway=run.stop_on_runaway,
    )
    _print_scores(metrics)


def evaluate(
    run: Positional[Path],
    *,
    data: Path,
    split: str = "val",
    score_at: Literal["original", "network"] = "original",
    testing: Annotated[TestTimeAugmentation, tyro.conf.arg(name="")] = TestTimeAugmentation(),
    stored_proposals: tuple[Path, ...] = (),
    devices: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    workers: int | None = None,
) -> None:
    """Score a trained run; writes metrics-SPLIT.json into its folder.

    How often and at which sizes an image is looked at, and how boxes are merged (--scales to
    --soft-nms), is for detectors.

    Args:
        run: Run folder.
        data: Folder of images and label maps, boxes or classes, as for training.
        split: Images to score.
        score_at: Of DeepLab: compare at the size of the label maps, or at the size at which the
            network sees the images, as the authors did on VOC.
        stored_proposals: Files of `deformnet propose`, for a detector trained on such.
        devices: Processes (CPU) or GPUs; None is what torchrun started, or 1.
        accelerator: Where to compute.
        workers: Processes that load images, for each computing process; None chooses.
    """
    from deformnet.engine import evaluate

    if run.is_file():
        raise ValueError(f"{run}: wanted a run folder, into which the scores go; got a file")
    metrics = evaluate(
        run,
        data,
        split,
        score_at=score_at,
        testing=testing,
        proposals=stored_proposals,
        devices=devices,
        accelerator=accelerator,
        workers=workers,
    )
    _print_scores(metrics)


def predict(
    run: Positional[Path],
    images: Positional[tuple[Path, ...]],
    *,
    out: Path,
    threshold: float = 0.5,
    testing: Annotated[TestTimeAugmentation, tyro.conf.arg(name="")] = TestTimeAugmentation(),
    device: str | None = None,
) -> None:
    """Segment images, find boxes in them, or classify them.

    DeepLab: OUT/labels has PNGs of class indices, OUT/overlays pictures with a legend. Detectors:
    OUT/pictures has the images with their boxes, OUT/detections.jsonl one line for each image.
    Classifiers: OUT/predictions.jsonl has the five best classes of each image.

    Args:
        run: Run folder.
        images: Image files, or folders of them.
        out: Folder of the results.
        threshold: Of detectors: the lowest score of a box that is drawn; the file has all boxes.
        device: Where to compute, such as cpu or cuda:1; None takes a GPU if there is one.
    """
    from tqdm import tqdm

    from deformnet.inference import (
        ClassificationPredictor,
        SegmentationPredictor,
        find_images,
        open_predictor,
        predict_classes,
        predict_detections,
        predict_files,
    )

    if not images:
        raise ValueError("images: name at least one file or folder")
    files = find_images(images)
    predictor = open_predictor(run, testing=testing, device=device)
    if isinstance(predictor, SegmentationPredictor):
        seen = predict_files(predictor, files, out)
    elif isinstance(predictor, ClassificationPredictor):
        seen = predict_classes(predictor, files, out)
    else:
        seen = predict_detections(predictor, files, out, threshold=threshold)
    failures = []
    with tqdm(seen, total=len(files), disable=None) as results:
        for path, problem in results:
            if problem is not None:
                failures.append(path)
                results.write(f"deformnet: {problem}", file=sys.stderr)
    print(f"{len(files) - len(failures)} of {len(files)} images done, results in {out}")
    if failures:
        raise SystemExit(BAD_INPUT)


def propose(
    run: Positional[Path],
    *,
    data: Path,
    out: Path,
    split: str = "train",
    devices: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    workers: int | None = None,
) -> None:
    """Write the proposals of a trained detector, for others to train on.

    Args:
        run: Run folder, of `train rpn` or another detector.
        data: Folder of images in VOC or COCO layout.
        out: File to write.
        split: Images.
        devices: Processes (CPU) or GPUs; None is what torchrun started, or 1.
        accelerator: Where to compute.
        workers: Processes that load images, for each computing process; None chooses.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from deformnet.engine import propose

    count = propose(
        run, data, split, out, devices=devices, accelerator=accelerator, workers=workers
    )
    rank_zero_only(print)(f"proposals for {count} images in {out}")


def _print_scores(metrics: dict[str, Any]) -> None:
    """Prints what `train` or `evaluate` returned as a table, in one of the processes."""
    from lightning.pytorch.utilities import rank_zero_only

    lines = []
    if "submission" in metrics:
        lines.append(f"for COCO's server, which has the objects: {metrics['submission']}")
    elif "split" in metrics:
        rows = _score_rows(metrics)
        width = max(len(name) for name, _ in rows)
        where = f"{metrics['split']} ({metrics['images']} images)"
        lines.append(f"{_score_title(metrics)} on {where}, percent")
        if "testing" in metrics:
            usual = asdict(TestTimeAugmentation())
            chosen = (f"{k} {v}" for k, v in metrics["testing"].items() if v != usual[k])
            lines.append(f"tested with {', '.join(chosen)}")
        for name, values in rows:
            cells = ("    -" if value is None else f"{100 * value:5.1f}" for value in values)
            lines.append(f"  {name:{width}}  {'  '.join(cells)}")
    seconds = metrics["seconds_per_iteration"]
    pace = "" if seconds is None else f", {seconds:.3g} s each"
    size = f"{metrics['parameters'] / 1e6:.2f} M parameters"
    lines.append(f"trained for {metrics['iterations']} iterations{pace}; {size}")
    rank_zero_only(print)("\n".join(lines))


def _score_title(metrics: dict[str, Any]) -> str:
    if "iou" in metrics:
        return "IoU"
    if "top1_error" in metrics:
        return "Error"
    if "recall" in metrics:
        return "Recall of proposals"
    if "coco" in metrics:
        return "COCO AP and AR"
    ((method, voc),) = metrics["voc"].items()
    return f"AP ({method}) at IoU {' and '.join(voc['mean_ap'])}"


def _score_rows(metrics: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
    """The scores as lines of a name and one or more numbers."""
    if "iou" in metrics:
        rows = [*metrics["iou"].items(), ("mean", metrics["mean_iou"])]
        return [(name, [iou]) for name, iou in rows]
    if "top1_error" in metrics:
        rows = [(name, [error]) for name, error in metrics["class_errors"].items()]
        return [*rows, ("top-1", [metrics["top1_error"]]), ("top-5", [metrics["top5_error"]])]
    if "recall" in metrics:
        return [(f"IoU {iou}", [share]) for iou, share in metrics["recall"].items()]
    if "coco" in metrics:
        return [(name, [value]) for name, value in metrics["coco"].items()]
    (voc,) = metrics["voc"].values()
    rows = [(name, [ap[name] for ap in voc["ap"].values()]) for name in voc["objects"]]
    return [*rows, ("mean", list(voc["mean_ap"].values()))]
