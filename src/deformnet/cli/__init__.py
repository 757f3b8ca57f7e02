"""The command line: `deformnet COMMAND ...`."""

import io
import sys
from collections.abc import Sequence

from deformnet._errors import MissingExtraError, require_extra
from deformnet.cli.errors import BAD_INPUT, INTERRUPTED, end_with, leave, warning_lines

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. User errors end the program with one line and exit code 2.

    Args:
        arguments: command-line arguments; None uses those of the program.
    """
    try:
        require_extra("the command line", "train", "tyro")
    except MissingExtraError as error:
        leave(str(error), BAD_INPUT)
    from deformnet.cli.app import run

    if isinstance(sys.stdout, io.TextIOWrapper):  # file names are not always valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warning_lines():
            run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED)
    except Exception as error:
        end_with(error)
