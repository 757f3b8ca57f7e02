"""The command line. Each command is a function; tyro makes its options from the signature.

What a command needs is imported when it runs, so that `--help` answers quickly.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from deformnet.bench.settings import ROWS, Bench, Row
from deformnet.demo.settings import Demo
from deformnet.recipes import (
    ONE_LOOK,
    BackboneName,
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    DeformLayers,
    DetectionTesting,
    FasterRCNNRecipe,
    Recipe,
    RFCNRecipe,
    RPNRecipe,
)
from deformnet.reproduce.settings import DryRun, Machines, Splits

if TYPE_CHECKING:
    from deformnet.backbones.foreign import Converted

# Exit codes.
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended

# In what gloo reports when the other end has died.
_LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
# In what torch reports about the memory of a GPU and that of the machine.
_NO_MEMORY = ("out of memory", "can't allocate memory")
_NO_CONNECTION = "connectFullMesh failed"  # of gloo
_LOADER_KILLED = "is killed by signal: Killed"
_PORT_IN_USE = "EADDRINUSE"
_FROM_LOADER = "Caught "  # how torch begins the message of an error in a loader process


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; errors of input end as one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _app(arguments).cli(
            prog="deformnet",
            description="Deformable convolutional networks: train, score, predict.",
            args=arguments,
        )
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except Exception as error:
        if type(error).__name__ == "TrainingStopped":  # by name: importing it takes seconds
            _leave(str(error), INTERRUPTED)
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PROCESS):
            _leave("another process of this run failed", FAILED)
        if (reason := _lacking(error)) is not None:
            _leave(reason, BAD_INPUT)
        if not _is_about_input(error):
            raise
        _leave(_one_line(error), BAD_INPUT)


def _app(arguments: Sequence[str]) -> SubcommandApp:
    """All commands, with options as these arguments need them."""
    training = SubcommandApp()
    for recipe, what in (
        (DeepLabRecipe, "Train DeepLab for semantic segmentation"),
        (RFCNRecipe, "Train R-FCN"),
        (FasterRCNNRecipe, "Train Faster R-CNN"),
        (ClassAwareRPNRecipe, "Train a class-aware RPN, a detector of one stage"),
        (RPNRecipe, "Train a region proposal network alone, for `deformnet propose`"),
        (ClassifierRecipe, "Train an image classifier, whose backbone others can start from"),
    ):
        base = _base_recipe(recipe, arguments)
        make = _training_on_proposals if recipe in (RFCNRecipe, FasterRCNNRecipe) else _training
        description = f"{what}; the same command continues a stopped run."
        training.command(name=recipe.network, help=description)(make(base))
    app = SubcommandApp()
    app.command(training, name="train", help="Train a network.")
    app.command(evaluate)
    app.command(predict)
    app.command(propose)
    app.command(score)
    app.command(export)
    app.command(reproduce)
    foreign = SubcommandApp()
    foreign.command(mmdetection)
    foreign.command(detectron2)
    help = "Make starting weights (--init) of what another code base trained."
    app.command(foreign, name="import-weights", help=help)
    data = SubcommandApp()
    data.command(check)
    data.command(where)
    app.command(
        data, name="data", help="Data sets: whether one is whole, and where they come from."
    )
    app.command(parameters)
    bench = SubcommandApp()
    bench.command(table4)
    bench.command(training_step)
    app.command(bench, name="bench", help="Time deformable networks beside their plain twins.")
    # Its options are the fields of a class whose import takes a second.
    shapes = _shapes() if "shapes" in arguments else _nothing
    app.command(name="shapes", help="Make a data set of shapes, in the VOC layout or by class.")(
        shapes
    )
    app.command(demo)
    app.command(doctor)
    return app


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
    devices: int | None = None
    """Processes (CPU) or GPUs on each machine; None is what torchrun or SLURM started, or 1."""
    nodes: int | None = None
    """Machines; None is what torchrun or SLURM spans, or 1. All must see the same folders."""
    accumulate: int = 1
    """Work through each batch in that many parts, one after the other, to need less memory. The
    result is the same, but for trained batch norm, whose statistics are then those of a part."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""
    workers: int | None = None
    """Processes that load images, for each training process; None chooses."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    log_every: int = 10
    """Iterations between rows of the logs."""


def _training(base: Recipe) -> Callable[..., None]:
    """The command that trains a network; its options have their defaults from `base`."""

    def command(
        run: Annotated[Run, tyro.conf.arg(name="")],
        options: Annotated[type(base), tyro.conf.arg(name="")] = base,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        _train(run, options, ())

    return command


def _training_on_proposals(base: Recipe) -> Callable[..., None]:
    """The same for a network that can be trained on stored proposals."""

    def command(
        run: Annotated[Run, tyro.conf.arg(name="")],
        options: Annotated[type(base), tyro.conf.arg(name="")] = base,  # pyright: ignore[reportInvalidTypeForm]
        stored_proposals: Annotated[
            tuple[Path, ...],
            tyro.conf.arg(
                help="Files of `deformnet propose`, of the images to train on and to score, in the "
                "place of the network's own proposals."
            ),
        ] = (),
    ) -> None:
        _train(run, options, stored_proposals)

    return command


def _train(run: Run, recipe: Recipe, proposals: tuple[Path, ...]) -> None:
    from deformnet.training import train

    metrics = train(
        recipe,
        run.data,
        run.out,
        split=run.split,
        val_split=run.val_split,
        proposals=proposals,
        devices=run.devices,
        nodes=run.nodes,
        accumulate=run.accumulate,
        accelerator=run.accelerator,
        workers=run.workers,
        checkpoint_every=run.checkpoint_every,
        log_every=run.log_every,
    )
    _print_scores(metrics)


def evaluate(
    run: Positional[Path],
    *,
    data: Path,
    split: str = "val",
    score_at: Literal["truth", "network"] = "truth",
    testing: Annotated[DetectionTesting, tyro.conf.arg(name="")] = ONE_LOOK,
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
    from deformnet.training import evaluate

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
    testing: Annotated[DetectionTesting, tyro.conf.arg(name="")] = ONE_LOOK,
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
    run: Positional[Path], *, data: Path, out: Path, split: str = "train", device: str | None = None
) -> None:
    """Write the proposals of a trained detector, for others to train on.

    Args:
        run: Run folder, of `train rpn` or another detector.
        data: Folder of images in VOC or COCO layout.
        out: File to write.
        split: Images.
        device: Where to compute, such as cpu or cuda:1; None takes a GPU if there is one.
    """
    from deformnet.inference import DetectionPredictor, SegmentationPredictor, open_predictor
    from deformnet.training import propose

    predictor = open_predictor(run, device=device)
    if not isinstance(predictor, DetectionPredictor):
        network = "deeplab" if isinstance(predictor, SegmentationPredictor) else "classifier"
        raise ValueError(f"{run}: wanted a run of a detector, got one of {network}")
    count = propose(predictor, data, split, out)
    print(f"proposals for {count} images in {out}")


def score(
    *, boxes: Path, data: Path, split: str | None = None, ious: tuple[float, ...] = (0.5, 0.7)
) -> None:
    """Score detections from a file, whoever made them.

    VOC's average precision, by 11 points and by area, for data in VOC layout or text files; the 12
    numbers of COCO for data in COCO layout.

    Args:
        boxes: Detections: a .jsonl of `deformnet predict` or `evaluate`, a .json of COCO results,
            or a folder of VOC's result files or of text files (class score x y w h).
        data: Truth: a folder in VOC or COCO layout, a .json of COCO annotations, or a folder of
            text files (class x y w h).
        split: Images to score, of a folder in VOC or COCO layout.
        ious: Overlaps from which VOC counts a detection as right; COCO's are fixed.
    """
    from deformnet.detections import score, score_table

    print(score_table(score(boxes, data, split=split, ious=ious)))


def export(run: Positional[Path], out: Positional[Path]) -> None:
    """Write a trained network as OUT.safetensors, and OUT.json that says what it is.

    The file can be used in the place of the run folder, to predict and as --init.

    Args:
        run: Run folder.
        out: File to write, NAME.safetensors; recipe, scores and versions go into NAME.json.
    """
    from deformnet.export import export_run

    card = export_run(run, out)
    print(f"weights in {out}, their card in {card}")


def mmdetection(
    file: Positional[Path],
    out: Positional[Path],
    *,
    bgr: bool = False,
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
) -> None:
    """Take the ResNet out of a checkpoint of mmdetection or mmsegmentation.

    For models with style="caffe": --bgr --pixel-mean 103.53 116.28 123.675 --pixel-std 1 1 1.

    Args:
        file: Checkpoint, .pth or .safetensors.
        out: File to write, NAME.safetensors.
        bgr: The network saw BGR, not RGB.
        pixel_mean: What was subtracted from pixels of 0 to 255, in the order of the channels.
        pixel_std: What they were divided by.
    """
    from deformnet.backbones.foreign import from_mmdetection, read_checkpoint

    checkpoint = read_checkpoint(file)
    _keep(from_mmdetection(checkpoint, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), out)


def detectron2(
    file: Positional[Path],
    out: Positional[Path],
    *,
    bgr: bool = True,
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675),
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Take the ResNet out of a checkpoint of detectron2 or maskrcnn-benchmark.

    Args:
        file: Checkpoint, .pth or .safetensors.
        out: File to write, NAME.safetensors.
        bgr: The network saw BGR, not RGB (INPUT.FORMAT).
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.
    """
    from deformnet.backbones.foreign import from_detectron2, read_checkpoint

    checkpoint = read_checkpoint(file)
    _keep(from_detectron2(checkpoint, bgr=bgr, pixel_mean=pixel_mean, pixel_std=pixel_std), out)


def reproduce(
    rows: Positional[tuple[str, ...]] = (),
    *,
    list: bool = False,
    dry_run: bool = False,
    data: Path | None = None,
    out: Path | None = None,
    init: str | None = None,
    splits: Annotated[Splits, tyro.conf.arg(name="")] = Splits(),  # noqa: B008 (it is frozen)
    machines: Annotated[Machines, tyro.conf.arg(name="")] = Machines(),  # noqa: B008
    dry: Annotated[DryRun, tyro.conf.arg(name="")] = DryRun(),  # noqa: B008
) -> None:
    """Train and score rows of the paper's Tables 1, 3, 5 and 7, with the published settings.

    The same command continues a stopped run. --list prints the rows with the paper's numbers, or
    of the named ones all settings; --dry-run builds the networks at full size, takes two training
    steps and scores once, on made images or on those of --data.

    Args:
        rows: Names of rows, or patterns such as 'table3/rfcn-*'.
        list: Print and do no more.
        dry_run: Find out that it runs, in how much memory and time.
        data: Folder of the data set; see docs/data.md.
        out: Folder of runs, proposals and results; of a dry run for dry-run.json.
        init: What the backbone starts from, in the place of what the row names.
    """
    from deformnet.reproduce.listing import compare, describe_row, list_rows
    from deformnet.reproduce.rows import ROWS, find_rows

    found = find_rows(rows) if rows else [*ROWS]
    if list:
        print("\n\n".join(map(describe_row, found)) if rows else list_rows(found, out))
        return
    if not rows:
        raise ValueError("rows: name at least one; --list prints all")
    if dry_run:
        from deformnet.reproduce.dry_run import dry_run_rows, dry_run_table

        file = None if out is None else out / "dry-run.json"
        print(dry_run_table(dry_run_rows(found, dry, data=data, out=file, splits=splits)))
        return
    from deformnet.reproduce.run import reproduce

    if data is None or out is None:
        raise ValueError("data, out: wanted the folder of the data set and one for the results")
    for row in found:
        result = reproduce(row, data, out, init=init, splits=splits, machines=machines)
        print(compare(row, result))


def check(
    root: Positional[Path],
    *,
    own: bool = False,
    workers: int | None = None,
    record: Path | None = None,
    report: Path | None = None,
) -> None:
    """Look at every image, label and box of a data set, and name what is wrong or missing.

    Files that were found good are remembered: a check that was stopped goes on, and a second one is
    quick.

    Args:
        root: Folder of one or more data sets.
        own: They are own sets in the layout of others, whose official numbers do not apply.
        workers: Processes that look; None chooses.
        record: File of what was found good; None takes one in the user's cache.
        report: File of all that is wrong; None takes one beside the record.
    """
    from deformnet.datacheck import check_data

    found = check_data(root, own=own, workers=workers, record=record, report=report)
    print(found)
    if not found.ok:
        raise SystemExit(BAD_INPUT)


def where() -> None:
    """Print where the paper's data sets come from, how they must lie, and what is in them."""
    from deformnet.datacheck import where_text

    print(where_text())


def parameters(*, classes: int = 20, backbone: BackboneName = "resnet101") -> None:
    """Print how many parameters deformable layers add to each network (Table 4 of the paper).

    Args:
        classes: Classes of objects.
        backbone: As in training.
    """
    from deformnet.parameters import parameter_table

    print(parameter_table(classes, backbone))


def table4(
    bench: Annotated[Bench, tyro.conf.arg(name="")] = Bench(),  # noqa: B008 (it is frozen)
    *,
    rows: tuple[Row, ...] = ROWS,
    out: Path | None = None,
) -> None:
    """Parameters, FLOPs and times of the networks of Table 4, and the ratios beside the paper's.

    FLOPs: two for a multiply-add. Forward is the network alone; whole is what a predictor does with
    an image, resizing and suppression included. At full size it takes minutes.

    Args:
        rows: Networks.
        out: JSON file of the results.
    """
    from deformnet.bench.table4 import run_table4

    run_table4(bench, rows, out)


def training_step(
    bench: Annotated[Bench, tyro.conf.arg(name="")] = Bench(),  # noqa: B008 (it is frozen)
    *,
    network: Row = "deeplab-voc",
    out: Path | None = None,
) -> None:
    """A training step of a deformable network, and each deformable layer alone, beside the plain.

    Args:
        network: As in table4.
        out: JSON file of the results.
    """
    from deformnet.bench.training_step import run_training_step

    run_training_step(bench, network, out)


def doctor() -> None:
    """Print versions, the machine, and which backends can run here (and why the others cannot)."""
    from deformnet.ops import backends, library
    from deformnet.runs import machine, versions

    for package, version in versions().items():
        print(f"{package:12} {version or 'unknown'}")
    print(f"{'machine':12} {machine()}")
    for backend in backends.names():
        reason = backends.why_unavailable(backend)
        state = "can run" if reason is None else f"cannot run: {reason}"
        if backend == "cpu" and reason is None:
            state += f" ({library.cpu.instruction_set()} instructions)"
        print(f"{backend:12} {state}")


def _shapes() -> Callable[..., None]:
    """The command `shapes`."""
    from deformnet.data.shapes import Shapes, write_shapes

    def shapes(
        root: Positional[Path],
        options: Annotated[Shapes, tyro.conf.arg(name="")] = Shapes(),  # noqa: B008 (frozen)
    ) -> None:
        """Make a data set of shapes: with exact masks and boxes, in the VOC layout, or by class.

        Args:
            root: Folder to make.
        """
        write_shapes(root, options)
        print(f"{options.train} training and {options.val} validation images in {root}")

    return shapes


def _nothing() -> None:
    """Stands for a command that is not asked for."""


def demo(
    options: Annotated[Demo, tyro.conf.arg(name="")] = Demo(),  # noqa: B008 (it is frozen)
    *,
    out: Path = Path("demo"),
) -> None:
    """Compare a plain and a deformable network on made images, in a table and in pictures.

    Args:
        out: Folder of images, runs and results; the same command continues what is in it.
    """
    from deformnet.demo.run import run_demo

    run_demo(options, out, print)


def _keep(converted: "Converted", out: Path) -> None:
    """Writes the backbone of a foreign checkpoint, and says what it is and how to go on."""
    from deformnet.export import write_weights

    write_weights(converted.state, out)
    print(f"{converted.backbone}: {len(converted.state)} tensors in {out}")
    for reason, keys in converted.left_out.items():
        print(f"left out, {reason}: {len(keys)} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
    layers = converted.deform_layers
    found = "none"
    if layers:
        found = (
            f"{len(converted.deformable)} among the last {layers} 3x3 convolutions, "
            f"offset_groups={converted.offset_groups}, modulated={converted.modulated}"
        )
    print(f"deformable layers: {found}")
    if converted.backbone in ("ResNet-50", "ResNet-101"):
        print(
            "strides: the file does not say where they are; weights of style='caffe' and of "
            "STRIDE_IN_1X1 need --stride-in-1x1"
        )
    depth = converted.backbone.removeprefix("ResNet-")
    if layers in get_args(DeformLayers):
        options = [f"--backbone resnet{depth}", f"--deform-layers {layers}"]
        if layers:
            options.append(f"--offset-groups {converted.offset_groups}")
            options += ["--modulated"] * converted.modulated
        print(f"next: deformnet train rfcn {' '.join(options)} --init {out} --data DIR --out RUN")
    else:
        print(
            f"next, in Python: resnet({depth}, deform_layers={layers}, "
            f"offset_groups={converted.offset_groups}, modulated={converted.modulated}, "
            f'weights="{out}"); recipes have {get_args(DeformLayers)} deformable layers'
        )


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
            usual = asdict(ONE_LOOK)
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


def _base_recipe(recipe: type[Recipe], arguments: Sequence[str]) -> Recipe:
    """The recipe that `train NETWORK --recipe FILE` names, or the default one of the network."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path)
    known, _ = parser.parse_known_args(arguments)
    if known.recipe is None or recipe.network not in arguments:
        return recipe()
    return recipe.load(known.recipe)


def _is_about_input(error: Exception) -> bool:
    """Whether an error is for the user, and not a mistake of the program.

    Those are: what the operating system reports; training that diverges; values that Lightning
    refuses; and what this package raises itself, here or in a loader process.
    """
    if (
        isinstance(error, (OSError, FloatingPointError))
        or type(error).__name__ == "MisconfigurationException"
    ):
        return True
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        return False
    if str(error).startswith(_FROM_LOADER):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == "deformnet"


def _lacking(error: Exception) -> str | None:
    """What the machine lacks and how to need less of it, if that is what an error is about."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)
    ):
        return (
            "out of memory; in training --accumulate 2 works through each batch in two parts, and "
            "smaller images (--short-side, --max-side, --crop) or --precision bf16-mixed need less"
        )
    if isinstance(error, RuntimeError) and _LOADER_KILLED in text:
        return (
            "out of memory, it seems: a process that loads images was killed; fewer --workers need "
            "less"
        )
    if isinstance(error, RuntimeError) and _NO_CONNECTION in text:
        return (
            "the processes of this run cannot reach one another; between machines "
            "GLOO_SOCKET_IFNAME names the network card, and torchrun --max-restarts needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    if isinstance(error, RuntimeError) and _PORT_IN_USE in text:
        port = os.environ.get("MASTER_PORT", "of this run")
        return (
            f"port {port} is in use; choose another one with --master-port of torchrun or with "
            "MASTER_PORT in the environment"
        )
    return None


def _one_line(error: Exception) -> str:
    """The message of an error, without the traceback that a loader process adds to it."""
    if isinstance(error, OSError) and error.filename is not None:
        # TensorBoard names files in bytes.
        name = error.filename
        return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror}"
    text = str(error).strip()
    if text.startswith(_FROM_LOADER):
        return text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _leave(message: str, code: int) -> None:
    print(f"deformnet: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
