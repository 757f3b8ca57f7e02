"""Runs that are killed, stopped and paused at random moments, again and again until they end."""

import dataclasses
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import Popen

import torch

from deformnet.engine import Hardware, LoopOptions, TrainingStopped, train
from deformnet.engine.runs import load_checkpoint
from deformnet.recipes import ClassifierRecipe

LIMIT = 120
"""Seconds after which a run is considered to hang."""
GONE = 15
"""Seconds after a run within which all of its processes must have exited."""

RECIPE = ClassifierRecipe(
    backbone="timm/test_resnet",
    deform_layers=1,
    resize=(32, 40),
    crop=32,
    test_short_side=36,
    batch=4,
    iterations=8,
    warmup=2,
    lr=0.01,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a run is started.

    Attributes:
        ranks: number of processes.
        workers: loader workers of each.
        validates: whether it validates after every 4 iterations.
        timeout: seconds to wait for another process. A rank that is killed before it has met the
            other leaves it waiting that long.
    """

    ranks: int
    workers: int
    validates: bool = False
    timeout: int = 15

    @property
    def split(self) -> str | None:
        return "val" if self.validates else None

    @property
    def loop(self) -> LoopOptions:
        every = 4 if self.validates else None
        return LoopOptions(progress=False, log_every=1, checkpoint_every=2, validate_every=every)


KINDS = (
    *(Kind(1, 0), Kind(1, 1), Kind(1, 2), Kind(2, 0), Kind(2, 1)),
    *(Kind(1, 0, True), Kind(1, 2, True), Kind(2, 1, True)),
)


class Forked:
    """The processes of a run, forked from this one, which has imported everything."""

    def __init__(
        self, kind: Kind, data: Path, out: Path, log: Path, ranks: Sequence[int] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = []
        for rank in range(kind.ranks) if ranks is None else ranks:
            arguments = (kind, data, out, log, rank, port)
            process = context.Process(target=_work, args=arguments)
            process.start()
            self.processes.append(process)
        self.roots = [process.pid or 0 for process in self.processes]

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]


class Started:
    """The same from the command line; the first process starts the others."""

    def __init__(self, kind: Kind, data: Path, out: Path, log: Path) -> None:
        recipe = out.with_name("recipe.json")
        recipe.write_text(RECIPE.to_json())
        command = [sys.executable, "-m", "deformnet", "train", "classifier"]
        options = {
            "recipe": recipe,
            "data": data,
            "out": out,
            "accelerator": "cpu",
            "workers": kind.workers,
            "devices": kind.ranks,
            "timeout": 60,  # the second process takes a while to start
            "val-split": kind.split,
            "log-every": kind.loop.log_every,
            "checkpoint-every": kind.loop.checkpoint_every,
            "validate-every": kind.loop.validate_every,
        }
        command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        with log.open("ab") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.roots = [self.process.pid]

    def codes(self) -> list[int | None]:
        return [self.process.poll()]


Start = Callable[[Kind, Path, Path, Path], Forked | Started]


def _work(kind: Kind, data: Path, out: Path, log: Path, rank: int, port: int) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    file = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file  # not the streams of pytest
    logging.getLogger().handlers.clear()
    if kind.ranks > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(kind.ranks),
        }
    hardware = Hardware(
        accelerator="cpu", workers=kind.workers, devices=kind.ranks, timeout=kind.timeout
    )
    code = 1
    try:
        train(RECIPE, data, out, val_split=kind.split, hardware=hardware, loop=kind.loop)
        code = 0
    except (TrainingStopped, KeyboardInterrupt):
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.exit(code)


def descendants(roots: Sequence[int]) -> set[int]:
    """The processes and all processes that they have started, if they still exist."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(folder.name))
    found: set[int] = set()
    left = [root for root in roots if Path(f"/proc/{root}").exists()]
    while left:
        found.add(one := left.pop())
        left += parents.get(one, [])
    return found


@dataclasses.dataclass
class Trial:
    """A run that is disturbed up to three times, and then left alone.

    Attributes:
        done: what was done to it.
    """

    seed: int
    kind: Kind
    start: Start
    data: Path
    folder: Path
    duration: float
    """Seconds of an undisturbed run."""
    done: list[str] = dataclasses.field(default_factory=list)

    def run(self) -> Path:
        """Returns the folder of the finished run."""
        chance = random.Random(self.seed)
        out = self.folder / "run"
        for disturb in (True, *(chance.random() < 0.3 for _ in range(2)), False):
            run = self.start(self.kind, self.data, out, self.folder / "log.txt")
            seen = set(run.roots)
            if disturb:
                time.sleep(chance.uniform(0, self.duration))
                seen |= descendants(run.roots)
                self._disturb(run, chance)
            seen |= self._wait(run)
            codes = run.codes()
            self.done.append(f"codes {codes}")
            allowed = {0, 1, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
            assert set(codes) <= (allowed if disturb else {0}), self.story()
            self._require_gone(seen)
        return out

    def story(self) -> str:
        log = self.folder / "log.txt"
        text = log.read_text() if log.exists() else ""
        return f"seed {self.seed}, {self.kind}: {'; '.join(self.done)}\n{text[-6000:]}"

    def _disturb(self, run: Forked | Started, chance: random.Random) -> None:
        others = sorted(descendants(run.roots) - set(run.roots))
        target = chance.choice([*run.roots, *others])
        what = "root" if target in run.roots else "child"
        action = chance.choice(["kill", "kill", "term", "int", "pause", "twice"])
        self.done.append(f"{action} {what}")
        with suppress(ProcessLookupError):
            match action:
                case "kill":
                    os.kill(target, signal.SIGKILL)
                case "pause":
                    os.kill(target, signal.SIGSTOP)
                    time.sleep(chance.uniform(0, 0.5))
                    os.kill(target, signal.SIGCONT)
                case "term" | "int":
                    sign = signal.SIGTERM if action == "term" else signal.SIGINT
                    for one in run.roots if what == "root" else [target]:  # as launchers do
                        os.kill(one, sign)
                case _:
                    for one in run.roots:
                        os.kill(one, signal.SIGTERM)
                    time.sleep(chance.uniform(0, 1.5))
                    for one in run.roots:
                        os.kill(one, signal.SIGTERM)

    def _wait(self, run: Forked | Started) -> set[int]:
        deadline, seen = time.monotonic() + LIMIT, set()
        while None in run.codes():
            seen |= descendants(run.roots)
            if time.monotonic() > deadline:
                for one in seen:
                    with suppress(ProcessLookupError):
                        os.kill(one, signal.SIGKILL)
                raise AssertionError(f"hangs: {self.story()}")
            time.sleep(0.02)
        return seen

    def _require_gone(self, seen: set[int]) -> None:
        deadline = time.monotonic() + GONE
        while left := {one for one in seen if descendants([one])}:
            assert time.monotonic() < deadline, f"left over: {left}: {self.story()}"
            time.sleep(0.02)


def contents(out: Path) -> set[str]:
    """The names of the files of a run, without TensorBoard's logs, whose names contain times."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(it.relative_to(out)) for it in files if "tensorboard" not in it.parts}


def require_equal(out: Path, expected: Path, story: str) -> None:
    """Requires the same files, and the same content in those that contain no times."""
    found, files = contents(out), contents(expected)
    difference = f"missing {sorted(files - found)}, extra {sorted(found - files)}"
    assert found == files, f"{difference}: {story}"
    for name in files & {"recipe.json", "validation.csv", "confusion-matrix.png"}:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), f"{name}: {story}"
    for path in sorted((expected / "checkpoints").iterdir()):
        name = path.name
        ended, wanted = load_checkpoint(out / "checkpoints" / name), load_checkpoint(path)
        if name == "previous.ckpt" and ended["iteration"] != wanted["iteration"]:
            continue  # a run that is asked to stop saves where it is
        assert ended["iteration"] == wanted["iteration"], f"{name}: {story}"
        assert ended["validated"] == wanted["validated"], f"{name}: {story}"
        for key, tensor in wanted["model"].items():
            assert torch.equal(ended["model"][key], tensor), f"{name}, {key}: {story}"
