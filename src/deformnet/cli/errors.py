"""User errors as one line, and the exit codes of the command line."""

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from deformnet._errors import TOO_LARGE, MissingExtraError, UserError, lacks_memory

_PACKAGE = Path(__file__).parent.parent

# Exit codes.
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C

_NO_MEMORY = "out of memory"

# RuntimeErrors of PyTorch that are caused by the machine, by parts of their messages.
_MACHINE_FAULTS = (
    (
        ("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
        FAILED,
        "another process of this run failed",
    ),
    (
        (_NO_MEMORY,),
        BAD_INPUT,
        "out of memory; --accumulate 2 processes each training batch in two parts, and smaller "
        "images (--short-side, --max-side, --crop) or --precision bf16-mixed need less",
    ),
    (
        ("is killed by signal: Killed",),
        BAD_INPUT,
        "a data loading process was killed, probably out of memory; use fewer --workers",
    ),
    (
        ("is killed by signal: Bus error", "creating shared memory segment"),
        BAD_INPUT,
        "out of shared memory; start the container with --shm-size=2g, or use --workers 0",
    ),
    (
        ("DataLoader worker (pid",),
        FAILED,
        "a data loading process exited unexpectedly ({text})",
    ),
    (
        ("Timed out waiting", "Watchdog caught collective operation timeout"),
        FAILED,
        "another process of this run did not respond in time (see the warnings above); if it is "
        "only slow, set a longer --timeout",
    ),
    (
        ("connectFullMesh failed",),
        BAD_INPUT,
        "the processes of this run cannot connect to each other; for several machines, set "
        "GLOO_SOCKET_IFNAME to the network interface; for torchrun --max-restarts, set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ),
    (
        ("EADDRINUSE",),
        BAD_INPUT,
        "port {port} is in use; choose another one with torchrun --master-port or the environment "
        "variable MASTER_PORT",
    ),
)
_FROM_LOADER = "Caught "  # start of PyTorch's message for an error in a loader process


def end_with(error: Exception) -> None:
    """Ends the program with one line if an error is the user's or the machine's.

    Raises:
        Exception: the error itself, with a request to report it, if it is a bug in this package.
    """
    # By name: importing the class takes seconds.
    if type(error).__name__ == "TrainingStopped":
        leave(str(error), INTERRUPTED)
    if isinstance(error, MemoryError) and TOO_LARGE in str(error):  # names the file
        leave(_one_line(error), BAD_INPUT)
    if isinstance(error, (RuntimeError, MemoryError)):
        text = _NO_MEMORY if lacks_memory(error) else str(error)
        for signs, code, message in _MACHINE_FAULTS:
            if any(sign in text for sign in signs):
                port = os.environ.get("MASTER_PORT", "of this run")
                leave(message.format(port=port, text=text.partition(". ")[0].strip()), code)
    if isinstance(error, (UserError, OSError, FloatingPointError, MissingExtraError)):
        leave(_one_line(error), BAD_INPUT)
    error.add_note("This is a bug in deformnet. Please report it with this traceback.")
    raise error


def leave(message: str, code: int) -> NoReturn:
    """Ends the program with a line on standard error."""
    print(f"deformnet: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def warning_lines() -> Iterator[None]:
    """Prints warnings of this package as one line, without their source location.

    OSErrors of TensorBoard's writer thread are not printed here: they are raised again in the main
    thread.
    """
    usual, usual_in_threads = warnings.formatwarning, threading.excepthook

    def in_thread(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            usual_in_threads(arguments)

    def line(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> str:
        if Path(filename).is_relative_to(_PACKAGE):
            return f"deformnet: warning: {message}\n"
        return usual(message, category, filename, *place)

    warnings.formatwarning, threading.excepthook = line, in_thread
    try:
        yield
    finally:
        warnings.formatwarning, threading.excepthook = usual, usual_in_threads


def _one_line(error: Exception) -> str:
    """The message of an error, without the traceback that a loader process adds to it."""
    if isinstance(error, OSError) and error.filename is not None:
        # TensorBoard's file names are bytes. A copy has two files, and either can be the cause.
        files = [name for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(map(os.fsdecode, files))}: {error.strerror}"
    text = str(error).strip()
    if text.startswith(_FROM_LOADER):
        return text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
