"""Programs that start at once: forks of one process, a server, that has imported everything.

To start Python and import everything takes ten seconds of CPU time. The server does so once, and
knows nothing of what tests do to the process that they run in.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired

import torch

MODULES = (
    "deformnet.cli.app",
    "deformnet.data.convert",
    "deformnet.engine.evaluation",
    "deformnet.engine.export",
    "deformnet.engine.training",
    "deformnet.tasks",
    "matplotlib.backends.backend_agg",
    "pytest",
    "timm",
)
"""What commands and tests import."""


class Fork:
    """Calls a function as a program of its own, whose output goes to a file.

    Args:
        printed: the file, which the output is appended to.
        work: a function of a module; its result is ignored.
        arguments: of the function; they are pickled.
        environment: variables that differ from those of this process.
    """

    def __init__(
        self, printed: Path, work: Callable[..., object], *arguments: object, **environment: str
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        variables = dict(os.environ) | environment
        self.printed = printed
        printed.touch()
        self._process = context.Process(target=_run, args=(printed, variables, work, arguments))
        self._process.start()
        self.pid = self._process.pid or 0

    # As `subprocess.Popen` has them.

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, sign: int) -> None:
        os.kill(self.pid, sign)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for the end; returns what has been printed."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutExpired(str(self._process), timeout or 0, self.printed.read_bytes())
        return self.printed.read_text(), None


def command(*words: object, printed: Path, **environment: str) -> Fork:
    """`deformnet` with these words."""
    return Fork(printed, _command, [str(word) for word in words], **environment)


def _command(words: Sequence[str]) -> None:
    from deformnet.cli import main

    main(words)


def _run(
    printed: Path,
    variables: Mapping[str, str],
    work: Callable[..., object],
    arguments: Sequence[object],
) -> None:
    multiprocessing.set_start_method(None, force=True)  # of its own processes: the usual one
    os.setsid()
    gc.freeze()  # garbage collection would copy all memory of the server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    code: object = 0
    try:
        work(*arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    at_exit()
    os._exit(code if isinstance(code, int) else 1)


def at_exit() -> None:
    """What the interpreter does when a program ends, and a fork leaves out."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
