"""Errors of input as one line, and the exit codes of the command line."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent

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


def end_with(error: Exception) -> None:
    """Ends the program with one line, if the error is one of input or of the machine.

    Raises:
        Exception: the error itself, if it is a mistake of the program.
    """
    if type(error).__name__ == "TrainingStopped":  # by name: importing it takes seconds
        leave(str(error), INTERRUPTED)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PROCESS):
        leave("another process of this run failed", FAILED)
    if (reason := _lacking(error)) is not None:
        leave(reason, BAD_INPUT)
    if not _is_about_input(error):
        raise error
    leave(_one_line(error), BAD_INPUT)


def leave(message: str, code: int) -> None:
    """Ends the program with a line on the standard error."""
    print(f"deformnet: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def warning_lines() -> Iterator[None]:
    """Prints this package's warnings as one line, without the place in its code."""
    usual = warnings.formatwarning

    def line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if Path(filename).is_relative_to(_PACKAGE):
            return f"deformnet: warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


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
        # TensorBoard names files in bytes.
        name = error.filename
        return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror}"
    text = str(error).strip()
    if text.startswith(_FROM_LOADER):
        return text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
