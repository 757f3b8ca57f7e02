"""All commands. Each is a function; tyro derives its options from the signature.

Commands import their dependencies when they run, so that `--help` is fast.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tyro
from tyro.extras import SubcommandApp

import deformnet
from deformnet.cli.data import check, convert, score, synthesize_command, where
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


_DESCRIPTION = "Deformable convolutional networks for PyTorch. --version prints the version."


class Group(NamedTuple):
    """Commands under one name."""

    help: str
    commands: Commands


def run(arguments: Sequence[str]) -> None:
    """Runs the command that the arguments name.

    Raises:
        SystemExit: after `--help` and `--version`, and for an unknown command.
    """
    if list(arguments) == ["--version"]:
        print(f"deformnet {deformnet.__version__}")
        return
    _require_words(arguments)
    command, words = _find(_commands(arguments), arguments)
    prog, rest = " ".join(("deformnet", *words)), arguments[len(words) :]
    config = (tyro.conf.OmitArgPrefixes,)
    if isinstance(command, Group):
        _app(command.commands).cli(prog=prog, description=command.help, args=rest, config=config)
    else:
        tyro.cli(rewrap(command), prog=prog, args=rest, config=config)


def _require_words(arguments: Sequence[str]) -> None:
    """Ends the program if an argument is empty, which as a path would mean the current folder."""
    for before, word in zip(("deformnet", *arguments), arguments, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            leave(f"expected a value after {word or before}, but got none", BAD_INPUT)


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
            "Check or convert data sets, show where to get them, or generate a synthetic one.",
            {
                "check": check,
                "convert": convert,
                "where": where,
                "synthesize": synthesize_command(arguments),
            },
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
            # Shown in a list only: a command that is named runs without the others.
            app.command(name=name, help=(command.__doc__ or "").partition("\n\n")[0])(_unused)
    return app


def _unused() -> None: ...


def _find(commands: Commands, arguments: Sequence[str]) -> tuple[Command | Group, Sequence[str]]:
    """The command or group that the arguments name, and the words that name it.

    A misspelled command ends the program with the nearest one, where tyro would list all.
    """
    found: Command | Group = Group(_DESCRIPTION, commands)
    for number, word in enumerate(arguments):
        if not isinstance(found, Group) or word.startswith("-"):
            return found, arguments[:number]
        names = found.commands
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            leave(f"unknown command {word!r}; {hint}Commands: {', '.join(names)}", BAD_INPUT)
        found = names[word]
    return found, arguments
