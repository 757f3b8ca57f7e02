"""Runs commands with one system call failing at a time, at every call or a sample of them.

As a program, `harness.py OUT` restarts itself with `shim.cpp` preloaded. Packages are imported
once, and every run is a forked child. Each run adds one line of JSON to OUT, a `Record`; faults
that are already in OUT are skipped.
"""

import argparse
import atexit
import ctypes
import errno
import functools
import gc
import hashlib
import importlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Container, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

KINDS = ("create", "write", "sync", "rename", "mkdir", "open", "read", "allocate")
MODES = ("count", "once", "full", "short", "kill")
LARGE = 1 << 17
"""Minimum size in bytes of an allocation that counts."""
LIMIT = 120
"""Seconds after which a run is considered to hang."""


class Fault(NamedTuple):
    """A failure of the n-th call of a kind.

    `once` fails this call; `full` fails it and all later writes, like a full disk; `short`
    transfers half of the bytes; `kill` ends the process. For a collective, `error` is the rank.
    """

    kind: str
    mode: str
    error: int = 0
    call: int = 0

    @property
    def name(self) -> str:
        if self.kind == "collective":
            return f"collective {self.mode} on rank {self.error}"
        return f"{self.kind} {self.mode} {errno.errorcode.get(self.error, '')}".strip()


FAULTS = (
    Fault("create", "once", errno.EACCES),
    Fault("create", "full", errno.ENOSPC),
    Fault("create", "kill"),
    Fault("write", "once", errno.EIO),
    Fault("write", "full", errno.ENOSPC),
    Fault("write", "short"),
    Fault("write", "kill"),
    Fault("sync", "once", errno.EIO),
    Fault("sync", "kill"),
    Fault("rename", "once", errno.EACCES),
    Fault("rename", "kill"),
    Fault("mkdir", "once", errno.EACCES),
    Fault("mkdir", "full", errno.ENOSPC),
    Fault("open", "once", errno.EACCES),
    Fault("open", "once", errno.EIO),
    Fault("read", "once", errno.EIO),
    Fault("read", "short"),
    Fault("allocate", "once", errno.ENOMEM),
)


class Command(NamedTuple):
    """A command, and the files that it starts from.

    Attributes:
        words: the command line; {data} is a data set and {work} a folder for results.
        given: initial content of the folder for results; a folder of the fixture.
    """

    words: str
    given: str = "nothing"


_NETWORK = (
    "--backbone timm/test_resnet --deform-layers 1 --init none --short-side 32 --max-side None"
)
_SCHEDULE = "--recipe scratch --batch 2 --iterations 2 --warmup 0 --lr 0.01"
_LOOP = "--checkpoint-every 1 --log-every 1 --validate-every 1"
_CPU = "--accelerator cpu --workers 0"
_TRAIN = f"--data {{data}} --out {{work}}/run {_NETWORK} {_SCHEDULE} {_LOOP} {_CPU}"
_ANCHORS = "--anchor-sizes 16 32 --proposals 20 --score-threshold 0"

COMMANDS = {
    "train": Command(f"train deeplab {_TRAIN} --ema 0.5"),
    "resume": Command(f"train deeplab {_TRAIN} --ema 0.5", "interrupted"),
    "evaluate": Command(f"evaluate {{work}}/run --data {{data}} {_CPU}", "detector"),
    "export": Command("export {work}/run {work}/exported/net.safetensors", "detector"),
    "predict": Command(
        "predict {work}/run {data}/VOCdevkit/VOC2012/JPEGImages --out {work}/out --device cpu",
        "detector",
    ),
    "convert": Command("data convert {data} {work}/voc --layout voc"),
}
for _name in ("train", "resume", "evaluate"):
    COMMANDS[f"{_name} in two processes"] = COMMANDS[_name]
COLLECTIVE = [name for name in COMMANDS if name.endswith("in two processes")]
_DETECTOR = f"train rfcn {_TRAIN} {_ANCHORS} --val-split None"


@dataclass
class Record:
    """Outcome of a run with a fault.

    Attributes:
        place: file of the call that failed; None if the run did not reach it.
        outcome: `reported` in one line, `harmless` (all results exist), `warned` (a result is
            missing, and a line reports it), `killed`, `not reached`, or `fault` (a bug).
        text: the line, or a description of the bug.
    """

    command: str
    fault: str
    call: int
    calls: int
    place: str | None
    outcome: str
    text: str


class Ended(NamedTuple):
    """Result of a run: its exit code, negative for a signal, and the output on each stream."""

    code: int
    place: str | None
    calls: dict[str, int]
    errors: list[str]


# Runs.


def run(words: Sequence[str], watched: Path, logs: Path, fault: Fault | None = None) -> Ended:
    """Runs a command line in a forked child; without a fault, calls are counted."""
    return _wait(_start(words, watched, logs, fault, lambda: None), logs)


def _start(
    words: Sequence[str],
    watched: Path,
    logs: Path,
    fault: Fault | None,
    before: Callable[[], object],
) -> int:
    report = logs / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LIMIT)
            for number, name in ((1, "out.txt"), (2, "errors.txt")):
                stream = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(stream, number)
            before()
            _arm(watched, fault or Fault("create", "count"))
            code = _main(words)
        finally:
            calls = {kind: _shim().faults_calls(number) for number, kind in enumerate(KINDS)}
            place = _shim().faults_place()
            _shim().faults_disarm()
            seen = {"calls": calls, "place": place and os.fsdecode(place)}
            report.write_text(json.dumps(seen))
            os._exit(code)
    return child


def _wait(child: int, logs: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    report = logs / "report.json"
    seen = json.loads(report.read_text()) if report.is_file() else {"calls": {}, "place": None}
    lines = (logs / "errors.txt").read_text(errors="replace").splitlines()
    return Ended(code, seen["place"], seen["calls"], [line for line in lines if line.strip()])


def _main(words: Sequence[str]) -> int:
    """Runs a command line in this process, including interpreter exit; returns its exit code."""
    from deformnet.cli import main

    code = 0
    try:
        main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(AttributeError):
        threading._shutdown()  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _shim() -> ctypes.CDLL:
    shim = ctypes.CDLL(None)  # it is preloaded
    shim.faults_calls.restype = ctypes.c_long
    shim.faults_place.restype = ctypes.c_char_p
    return shim


def _arm(watched: Path, fault: Fault) -> None:
    _shim().faults_arm(
        os.fsencode(watched),
        KINDS.index(fault.kind),
        ctypes.c_long(fault.call),
        MODES.index(fault.mode),
        fault.error,
        ctypes.c_size_t(LARGE),
    )


# Content of a folder of results.


def contents(folder: Path, only: Container[str] | None = None) -> dict[str, object]:
    """Files in a folder by name, without what differs between runs (times, versions).

    Args:
        only: names of the files; all by default.
    Raises:
        ValueError: if a file is incomplete.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        ours = path.is_file() and path.parent.name != "tensorboard" and path.name != ".lock"
        if ours and (only is None or name in only):
            try:
                found[name] = _content(path)
            except Exception as error:
                raise ValueError(f"{path.name} is not whole: {error!r}") from error
    return found


def _content(path: Path) -> object:
    data = path.read_bytes()
    match path.suffix:
        case ".ckpt":
            import torch

            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, "checksum"
            return _plain(torch.load(path, weights_only=True))
        case ".safetensors":
            from safetensors.torch import load

            return _plain(load(data))
        case ".json":
            values = json.loads(data)
            for changing in ("seconds_per_iteration", "versions", "machine", "sha256"):
                values.pop(changing, None)
            return values.pop("metrics", None) and None, values
        case ".jsonl":
            return [json.loads(line) for line in data.splitlines()]
        case ".png" | ".jpg":
            from PIL import Image

            with Image.open(io.BytesIO(data)) as image:
                image.load()
        case ".xml":
            ET.fromstring(data)
        case ".csv":
            rows = data.decode().split("\n")
            if path.name == "metrics.csv":  # a row is appended; its last columns depend on time
                return [row.rsplit(",", 2)[0] for row in rows[:-1]]
            assert rows[-1] == "", "the last row ends early"
    return data


def _plain(value: Any) -> object:
    """A value that compares equal only if all bits are equal."""
    import torch

    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


# A command.


class Trial:
    """A command, whose runs with faults are compared with a run without faults.

    Args:
        name: name of the command.
        fixture: folder with `data` and the files that commands start from.
        folder: scratch folder, which is watched.
    """

    def __init__(self, name: str, fixture: Path, folder: Path, logs: Path) -> None:
        self.name, self.logs, self.folder = name, logs, folder
        self.work, self.given = folder / "work", fixture / COMMANDS[name].given
        self.words = _words(COMMANDS[name].words, fixture / "data", self.work)
        self._known: dict[bytes, str | None] = {}
        self._begin()
        self.before = contents(self.work)
        ended = run(self.words, folder, logs)
        assert ended.code == 0, ended.errors
        self.calls, self.usual = ended.calls, set(ended.errors)
        self.after = contents(self.work)

    def _begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.given, self.work)

    def faults(self) -> list[Fault]:
        """A fault at every call."""
        return [
            fault._replace(call=call)
            for fault in FAULTS
            for call in range(1, self.calls[fault.kind] + 1)
        ]

    def attempt(self, fault: Fault) -> Record:
        """A run with a fault, and one without after it."""
        self._begin()
        ended = run(self.words, self.folder, self.logs, fault)
        outcome, text = self._judged(fault, ended)
        if outcome != "fault" and (problem := self._again(ended.code)):
            outcome, text = "fault", problem
        place = None if ended.place is None else ended.place.removeprefix(f"{self.folder}/")
        calls = self.calls[fault.kind]
        return Record(self.name, fault.name, fault.call, calls, place, outcome, text)

    def _judged(self, fault: Fault, ended: Ended) -> tuple[str, str]:
        if ended.code == -signal.SIGALRM:
            return "fault", f"hangs: {ended.errors[-3:]}"
        if ended.code < 0 and fault.mode != "kill":
            return "fault", f"ended by signal {-ended.code}: {ended.errors[-3:]}"
        killed = fault.mode == "kill" and ended.code < 0
        try:  # a process that is killed leaves its temporary files
            found = contents(self.work, {*self.before, *self.after} if killed else None)
        except ValueError as error:
            return "fault", str(error)
        if problem := self._neither(found):
            return "fault", problem
        if killed:
            return "killed", ""
        lines = [line for line in ended.errors if line.startswith("deformnet: ")]
        others = [line for line in ended.errors if not self._expected(line)]
        if others:
            return "fault", f"exit code {ended.code}, prints {others[0]!r} ... {others[-1]!r}"
        if ended.code == 0:
            if found == self.after:
                return ("harmless" if ended.place else "not reached"), " ".join(lines)
            missing = [name for name in self.after if found.get(name) != self.after[name]]
            return ("warned" if lines else "fault"), f"exit code 0 without {missing}: {lines}"
        if fault.error == 0:
            return "fault", f"exit code {ended.code} without an error: {lines}"
        cause, file = os.strerror(fault.error), str(self.work)
        if fault.kind == "allocate":
            # Pillow reports error numbers.
            pillow = bool(lines) and "coder error" in lines[0]
            cause, file = "coder error" if pillow else "memory", ""
        elif fault.kind in ("open", "read"):
            file = ended.place or ""
        if len(lines) != 1 or cause not in lines[0] or file not in lines[0]:
            return "fault", f"expected one line with {file!r} and {cause!r}, but got {lines}"
        return "reported", lines[0]

    def _expected(self, line: str) -> bool:
        return line.startswith(("deformnet: ", "training:")) or line in self.usual

    def _neither(self, found: dict[str, object]) -> str | None:
        """Describes a file that is neither unchanged nor complete."""
        for name, content in found.items():
            if name not in self.before and name not in self.after:
                return f"leaves {name}"
            if self.name in ("train", "resume", "predict"):
                continue  # from an earlier iteration, or without an image that is reported
            if content not in (self.before.get(name), self.after.get(name)):
                return f"{name} is neither unchanged nor complete"
        lost = [name for name in self.before if name not in found]
        return f"removes {lost}" if lost else None

    def _again(self, code: int) -> str | None:
        """What is wrong after running the command again without a fault."""
        if self.name == "convert" and code == 0:
            return None  # `convert` refuses a folder with files
        state = self._state()
        if state not in self._known:
            self._known[state] = self._without_fault()
        return self._known[state]

    def _state(self) -> bytes:
        """A digest of the names and contents of all files except TensorBoard logs."""
        names = sorted(str(path) for path in self.work.rglob("*") if path.suffix)
        names = [name for name in names if "tfevents" not in name]
        found = pickle.dumps((names, contents(self.work, {*self.before, *self.after})))
        return hashlib.sha256(found).digest()

    def _without_fault(self) -> str | None:
        ended = run(self.words, self.folder, self.logs)
        if ended.code != 0:
            return f"then, without a fault: {ended.errors[-3:]}"
        found = contents(self.work)
        names = sorted(found.keys() | self.after.keys())
        differing = [name for name in names if found.get(name) != self.after.get(name)]
        return f"then, without a fault: {differing} differ" if differing else None


# Collectives.

RANKS = 2
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast", "reduce"),
    *("broadcast_object_list", "gather", "gather_object", "monitored_barrier"),
)


class Collectives:
    """A command in two processes, in one of which a collective fails.

    The arguments are those of `Trial`.
    """

    def __init__(self, name: str, fixture: Path, folder: Path, logs: Path) -> None:
        self.name, self.logs, self.folder = name, logs, folder
        self.work, self.given = folder / "work", fixture / COMMANDS[name].given
        self.words = _words(COMMANDS[name].words, fixture / "data", self.work)
        self._begin()
        ended = self._run(Fault("collective", "count"), 0)
        assert not any(one.code for one in ended), ended
        self.calls = int((logs / "0/collectives.txt").read_text())
        self.after = contents(self.work)

    def _begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.given, self.work)

    def faults(self) -> list[Fault]:
        """A fault in every collective of every process; `error` is the rank."""
        return [
            Fault("collective", mode, rank, call)
            for mode in ("once", "kill")
            for rank in range(RANKS)
            for call in range(1, self.calls + 1)
        ]

    def attempt(self, fault: Fault) -> Record:
        """A run with a fault, and one without after it."""
        self._begin()
        ended = self._run(fault, fault.error)
        outcome, text = "reported", ended[0].errors[-1] if ended[0].errors else ""
        for rank, one in enumerate(ended):
            lines = [line for line in one.errors if line.startswith("deformnet: ")]
            killed = fault.mode == "kill" and rank == fault.error
            if one.code == -signal.SIGALRM:
                outcome, text = "fault", f"rank {rank} hangs: {one.errors[-3:]}"
            elif not killed and (one.code <= 0 or len(lines) != 1):
                outcome, text = "fault", f"rank {rank} ends with {one.code}: {one.errors[-3:]}"
        try:
            contents(self.work, self.after)
        except ValueError as error:
            outcome, text = "fault", str(error)
        if outcome != "fault":
            again = self._run(Fault("collective", "count"), 0)
            if any(one.code for one in again):
                outcome, text = "fault", f"then, without a fault: {again[0].errors[-3:]}"
            elif contents(self.work) != self.after:
                outcome, text = "fault", "then, without a fault: other results"
        return Record(self.name, fault.name, fault.call, self.calls, None, outcome, text)

    def _run(self, fault: Fault, rank: int) -> list[Ended]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for number in range(RANKS):
            logs = self.logs / str(number)
            logs.mkdir(exist_ok=True)
            failing = fault if number == rank else Fault("collective", "count")
            before = functools.partial(_join, number, port, failing, logs / "collectives.txt")
            children.append(_start(self.words, self.folder, logs, None, before))
        return [_wait(child, self.logs / str(number)) for number, child in enumerate(children)]


def _join(rank: int, port: int, fault: Fault, counted: Path) -> None:
    """Makes this process a torchrun worker with a collective that fails."""
    import torch.distributed as dist

    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "faults"},
    }
    counter = itertools.count(1)

    def failing(collective: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(collective)
        def call(*arguments: object, **options: object) -> object:
            number = next(counter)
            counted.write_text(str(number))
            if number == fault.call and fault.mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == fault.call and fault.mode == "once":
                raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1")
            return collective(*arguments, **options)

        return call

    for name in _COLLECTIVES:
        wrapped = failing(getattr(dist, name))
        setattr(dist, name, wrapped)
        setattr(dist.distributed_c10d, name, wrapped)


def _words(line: str, data: Path, work: Path) -> list[str]:
    return [word.format(data=data, work=work) for word in line.split()]


def write_fixture(fixture: Path, logs: Path) -> None:
    """Writes a data set, a detector, and a training run killed after its first iteration."""
    from deformnet.data.synthetic import Shapes, write_shapes

    data = fixture / "data"
    write_shapes(data, Shapes(train=2, val=2, height=40, width=48))
    (fixture / "nothing").mkdir()
    ended = run(_words(_DETECTOR, data, fixture / "detector"), fixture, logs)
    assert ended.code == 0, ended.errors
    interrupted = fixture / "interrupted"
    words = _words(COMMANDS["train"].words, data, interrupted)
    for call in range(4, 20):  # recipe.json, metrics.csv and last.ckpt are there
        run(words, fixture, logs, Fault("rename", "kill", call=call))
        if (interrupted / "run/checkpoints/last.ckpt").is_file():
            for path in interrupted.rglob("*.partial*"):
                path.unlink()
            return
        shutil.rmtree(interrupted)
    raise AssertionError("no checkpoint to resume from")


def sample(faults: Sequence[Fault], count: int, seed: str) -> list[Fault]:
    """Faults of as many kinds as possible, at calls chosen by the seed."""
    rng = random.Random(seed)
    groups: dict[str, list[Fault]] = {}
    for fault in rng.sample(faults, len(faults)):
        groups.setdefault(fault.name, []).append(fault)
    rounds = itertools.zip_longest(*groups.values())
    return [fault for one in rounds for fault in one if fault is not None][:count]


def preload(folder: Path) -> dict[str, str]:
    """Compiles the shim; returns the environment of a process that it is preloaded into."""
    library = folder / "shim.so"
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).with_name("shim.cpp")
    options = ("-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library))
    subprocess.run([compiler, *options, str(source), "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS))
    parser.add_argument("--sample", type=int, help="faults of each command; all by default")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for module in _MODULES:
        importlib.import_module(module)
    from deformnet import cli

    with suppress(SystemExit), redirect_stdout(io.StringIO()):
        cli.main(["train", "deeplab", "--help"])  # parses and caches the sources of the help texts
    gc.collect()
    gc.freeze()  # garbage collection in a child would copy all of its memory
    # Not a `TemporaryDirectory`, which each child would remove when it exits.
    scratch = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    try:
        with options.out.open("a") as out:
            known = _known(options.out)
            _try_all(scratch, options.commands, options.sample, known, out)
    finally:
        shutil.rmtree(scratch)


def _known(out: Path) -> set[tuple[str, str, int]]:
    """Command, fault and call of each record."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    return {(record["command"], record["fault"], record["call"]) for record in records}


def _try_all(
    scratch: Path,
    commands: Sequence[str],
    count: int | None,
    known: Container[tuple[str, str, int]],
    out: IO[str],
) -> None:
    fixture, logs = scratch / "files/fixture", scratch / "logs"
    fixture.mkdir(parents=True)
    logs.mkdir()
    write_fixture(fixture, logs)
    for command in commands:
        kind = Collectives if command in COLLECTIVE else Trial
        trial = kind(command, fixture, scratch / "files", logs)
        faults = trial.faults()
        for fault in sample(faults, count or len(faults), command):
            if (command, fault.name, fault.call) in known:
                continue
            out.write(json.dumps(asdict(trial.attempt(fault))) + "\n")
            out.flush()


_MODULES = (
    "deformnet.cli.app",
    "deformnet.data.convert",
    "deformnet.engine.evaluation",
    "deformnet.engine.export",
    "deformnet.engine.training",
    "deformnet.tasks",
    "matplotlib.backends.backend_agg",
    "timm",
)
"""Modules that commands import when they run; with early imports, a run takes under a second."""

if __name__ == "__main__":
    if hasattr(ctypes.CDLL(None), "faults_arm"):
        main()
    else:
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, __file__, *sys.argv[1:]]
            raise SystemExit(subprocess.run(command, env=preload(Path(place))).returncode)
