"""The command line. Each command is a function; tyro makes its options from the signature.

What a command needs is imported when it runs, so that `--help` answers quickly.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from deformnet.demo.settings import Demo
from deformnet.recipes import DeepLabRecipe

# Exit codes.
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended

_LOST_PROCESS = "Connection closed by peer"  # in what gloo reports when the other end has died
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
        if isinstance(error, RuntimeError) and _LOST_PROCESS in str(error):
            _leave("another process of this run failed", FAILED)
        if not _is_about_input(error):
            raise
        _leave(_one_line(error), BAD_INPUT)


def _app(arguments: Sequence[str]) -> SubcommandApp:
    """All commands, with options as these arguments need them."""
    training = SubcommandApp()
    training.command(name="deeplab")(_deeplab(_base_recipe(arguments)))
    app = SubcommandApp()
    app.command(training, name="train", help="Train a network.")
    app.command(evaluate)
    app.command(predict)
    # Its options are the fields of a class whose import takes a second.
    shapes = _shapes() if "shapes" in arguments else _nothing
    app.command(name="shapes", help="Make a data set of shapes, in the VOC layout.")(shapes)
    app.command(demo)
    app.command(doctor)
    return app


def _deeplab(base: DeepLabRecipe) -> Callable[..., None]:
    """The command `train deeplab`; the options of the recipe have their defaults from `base`."""

    def deeplab(
        *,
        data: Path,
        out: Path,
        options: Annotated[DeepLabRecipe, tyro.conf.arg(name="")] = base,
        recipe: Path | None = None,
        split: str = "train",
        val_split: str | None = "val",
        devices: int | None = None,
        nodes: int | None = None,
        accelerator: Literal["auto", "cpu", "gpu"] = "auto",
        workers: int | None = None,
        checkpoint_every: int = 200,
        log_every: int = 10,
    ) -> None:
        """Train DeepLab for semantic segmentation; the same command continues a stopped run.

        Args:
            data: Folder of images and label maps, in VOC or Cityscapes layout.
            out: Run folder: recipe, checkpoint, logs and scores.
            recipe: JSON file of a recipe, such as another run's recipe.json, whose values take the
                place of the defaults below.
            split: Images to train on.
            val_split: Images to score at the end; None for none.
            devices: Processes (CPU) or GPUs on each machine; None is what torchrun started, or 1.
            nodes: Machines; None is what torchrun spans, or 1.
            accelerator: Where to train.
            workers: Processes that load images, for each training process; None chooses.
            checkpoint_every: Iterations between checkpoints.
            log_every: Iterations between rows of the logs.
        """
        from deformnet.training import train

        metrics = train(
            options,
            data,
            out,
            split=split,
            val_split=val_split,
            devices=devices,
            nodes=nodes,
            accelerator=accelerator,
            workers=workers,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
        )
        _print_scores(metrics)

    return deeplab


def evaluate(
    run: Positional[Path],
    *,
    data: Path,
    split: str = "val",
    score_at: Literal["truth", "network"] = "truth",
    devices: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    workers: int | None = None,
) -> None:
    """Score a trained run; writes metrics-SPLIT.json into its folder.

    Args:
        run: Run folder.
        data: Folder of images and label maps, in VOC or Cityscapes layout.
        split: Images to score.
        score_at: Compare at the size of the label maps, or at the size at which the network sees
            the images, as the authors did on VOC.
        devices: Processes (CPU) or GPUs; None is what torchrun started, or 1.
        accelerator: Where to compute.
        workers: Processes that load images, for each computing process; None chooses.
    """
    from deformnet.training import evaluate

    metrics = evaluate(
        run,
        data,
        split,
        score_at=score_at,
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
    device: str | None = None,
) -> None:
    """Segment images: OUT/labels has PNGs of class indices, OUT/overlays pictures with a legend.

    Args:
        run: Run folder.
        images: Image files, or folders of them.
        out: Folder of the results.
        device: Where to compute, such as cpu or cuda:1; None takes a GPU if there is one.
    """
    from tqdm import tqdm

    from deformnet.inference import SegmentationPredictor, find_images, predict_files

    if not images:
        raise ValueError("images: name at least one file or folder")
    files = find_images(images)
    predictor = SegmentationPredictor.from_run(run, device)
    failures = []
    with tqdm(predict_files(predictor, files, out), total=len(files), disable=None) as results:
        for path, problem in results:
            if problem is not None:
                failures.append(path)
                results.write(f"deformnet: {problem}", file=sys.stderr)
    print(f"{len(files) - len(failures)} of {len(files)} images segmented into {out}")
    if failures:
        raise SystemExit(BAD_INPUT)


def doctor() -> None:
    """Print versions, the machine, and which backends can run here (and why the others cannot)."""
    from deformnet.ops import backends, library
    from deformnet.runs import machine, versions

    for package, version in versions().items():
        print(f"{package:12} {version}")
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
        """Make a data set of shapes with exact masks and boxes, in the VOC layout.

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


def _print_scores(metrics: dict[str, Any]) -> None:
    """Prints what `train` or `evaluate` returned as a table, in one of the processes."""
    from lightning.pytorch.utilities import rank_zero_only

    lines = []
    if "iou" in metrics:
        lines.append(f"IoU on {metrics['split']} ({metrics['images']} images), percent")
        rows = [*metrics["iou"].items(), ("mean", metrics["mean_iou"])]
        width = max(len(name) for name, _ in rows)
        for name, iou in rows:
            lines.append(f"  {name:{width}}  {'    -' if iou is None else f'{100 * iou:5.1f}'}")
    seconds = metrics["seconds_per_iteration"]
    pace = "" if seconds is None else f", {seconds:.3g} s each"
    size = f"{metrics['parameters'] / 1e6:.2f} M parameters"
    lines.append(f"{metrics['iterations']} iterations{pace}; {size}")
    rank_zero_only(print)("\n".join(lines))


def _base_recipe(arguments: Sequence[str]) -> DeepLabRecipe:
    """The recipe that `--recipe FILE` names, or the default one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path)
    known, _ = parser.parse_known_args(arguments)
    return DeepLabRecipe() if known.recipe is None else DeepLabRecipe.load(known.recipe)


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


def _one_line(error: Exception) -> str:
    """The message of an error, without the traceback that a loader process adds to it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    if text.startswith(_FROM_LOADER):
        return text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _leave(message: str, code: int) -> None:
    print(f"deformnet: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
