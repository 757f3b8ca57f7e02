"""All commands. Each is a function; tyro derives its options from the signature.

Commands import their dependencies when they run, so that `--help` is fast.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence

import tyro
from tyro.extras import SubcommandApp

import deformnet
from deformnet.cli.data import check, score, synthesize_command, where
from deformnet.cli.errors import BAD_INPUT, leave
from deformnet.cli.inspect import analyze, view
from deformnet.cli.machine import doctor
from deformnet.cli.networks import evaluate, predict, propose
from deformnet.cli.options import rewrap
from deformnet.cli.paper import demo, parameters, reproduce, table4, training_step
from deformnet.cli.train import NETWORKS, train_command
from deformnet.cli.weights import detectron2, export, mmdetection

Command = Callable[..., None]
Commands = Mapping[str, "Command | Group"]


class Group:
    """Commands under one name."""

    def __init__(self, help: str, commands: Commands) -> None:
        self.help = help
        self.commands = commands


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name.

    Raises:
        SystemExit: after `--help` and `--version`, and for an unknown command.
    """
    if list(arguments) == ["--version"]:
        print(f"deformnet {deformnet.__version__}")
        return
    commands = _commands(arguments)
    _require_known(commands, arguments)
    _app(commands).cli(
        prog="deformnet",
        description="Deformable convolutional networks for PyTorch. --version prints the version.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _commands(arguments: Sequence[str]) -> Commands:
    return {
        "train": Group(
            "Train a network.",
            {recipe.network: train_command(recipe, what, arguments) for recipe, what in NETWORKS},
        ),
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "data": Group(
            "Check data sets, show where to get them, or generate a synthetic one.",
            {"check": check, "where": where, "synthesize": synthesize_command(arguments)},
        ),
        "weights": Group(
            "Convert weights from other code bases.",
            {
                "import": Group(
                    "Convert a checkpoint from another code base into initial weights (--init).",
                    {"mmdetection": mmdetection, "detectron2": detectron2},
                )
            },
        ),
        "inspect": Group("Show what a network has learned.", {"analyze": analyze, "view": view}),
        "paper": Group(
            "Reproduce the paper's tables.",
            {
                "reproduce": reproduce,
                "parameters": parameters,
                "table4": table4,
                "training-step": training_step,
            },
        ),
        "propose": propose,
        "score": score,
        "doctor": doctor,
        "demo": demo,
    }


def _app(commands: Commands) -> SubcommandApp:
    app = SubcommandApp()
    for name, command in commands.items():
        if isinstance(command, Group):
            app.command(_app(command.commands), name=name, help=command.help)
        else:
            app.command(name=name)(rewrap(command))
    return app


def _require_known(commands: Commands, arguments: Iterable[str]) -> None:
    """Suggests the nearest command for a misspelled one; tyro only lists all commands."""
    for word in arguments:
        if word.startswith("-"):
            return
        command = commands.get(word)
        if command is None:
            near = difflib.get_close_matches(word, commands, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            leave(f"unknown command {word!r}; {hint}Commands: {', '.join(commands)}", BAD_INPUT)
        if not isinstance(command, Group):
            return
        commands = command.commands
