"""The command line. Each command is a function; tyro makes its options from the signature.

What a command needs is imported when it runs, so that `--help` answers quickly.
"""

import sys
from collections.abc import Sequence

from tyro.extras import SubcommandApp

from deformnet.cli.data import check, score, shapes_command, where
from deformnet.cli.errors import INTERRUPTED, end_with, leave, warning_lines
from deformnet.cli.networks import (
    base_recipe,
    evaluate,
    predict,
    propose,
    training_command,
    training_on_proposals_command,
)
from deformnet.cli.paper import analyse, demo, parameters, reproduce, table4, training_step
from deformnet.cli.view import view
from deformnet.cli.weights import detectron2, export, mmdetection
from deformnet.recipes import (
    ClassAwareRPNRecipe,
    ClassifierRecipe,
    DeepLabRecipe,
    FasterRCNNRecipe,
    RFCNRecipe,
    RPNRecipe,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; errors of input end as one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with warning_lines():
            _app(arguments).cli(
                prog="deformnet",
                description="Deformable convolutional networks: train, score, predict.",
                args=arguments,
            )
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED)
    except Exception as error:
        end_with(error)


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
        base = base_recipe(recipe, arguments)
        on_proposals = recipe in (RFCNRecipe, FasterRCNNRecipe)
        command = training_on_proposals_command(base) if on_proposals else training_command(base)
        description = f"{what}; the same command continues a stopped run."
        training.command(name=recipe.network, help=description)(command)
    app = SubcommandApp()
    app.command(training, name="train", help="Train a network.")
    app.command(evaluate)
    app.command(predict)
    app.command(propose)
    app.command(score)
    app.command(analyse)
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
    shapes = shapes_command() if "shapes" in arguments else _nothing
    app.command(name="shapes", help="Make a data set of shapes, in the VOC layout or by class.")(
        shapes
    )
    app.command(demo)
    app.command(view)
    app.command(doctor)
    return app


def doctor() -> None:
    """Print versions, the machine, and which backends can run here (and why the others cannot)."""
    from deformnet.ops import backends, library
    from deformnet.engine.runs import machine, versions

    for package, version in versions().items():
        print(f"{package:12} {version or 'unknown'}")
    print(f"{'machine':12} {machine()}")
    for backend in backends.names():
        reason = backends.why_unavailable(backend)
        state = "can run" if reason is None else f"cannot run: {reason}"
        if backend == "cpu" and reason is None:
            state += f" ({library.cpu.instruction_set()} instructions)"
        print(f"{backend:12} {state}")


def _nothing() -> None:
    """Stands for a command that is not asked for."""
