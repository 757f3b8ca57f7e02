"""The command-line page: the help text of every command."""

import contextlib
import io
import re

from deformnet.cli import main


def page() -> str:
    """All commands with their help texts, in Markdown."""
    return "\n".join(_sections(()))


def _sections(command: tuple[str, ...]) -> list[str]:
    text = _help(command)
    title = " ".join(("deformnet", *command))
    lines = [f"{'#' * (len(command) + 2)} {title}", "", "```text", text, "```", ""]
    inner = re.search(r"\{([a-z0-9,-]+)\}", text) if "subcommands" in text else None
    for name in inner[1].split(",") if inner else ():
        lines += _sections((*command, name))
    return lines


def _help(command: tuple[str, ...]) -> str:
    """What `deformnet COMMAND --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
