"""Fuzzers of all inputs: files and command lines.

A target is a set of valid files and a reader. In each case, the bytes or values of one file are
damaged, and it is read. The reader has to return a result or raise a `UserError` or an `OSError`,
in bounded time and memory. To reproduce a case, pass its fuzzer, seed and number:

    python tests/fuzz/fuzz.py OUT --fuzzers images --seed 0 --first 1234 --count 1

Each finding adds one line of JSON to OUT; the last line has the number of cases.
"""

import argparse
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

SECONDS = 20
"""Seconds after which a case is considered to hang."""
MEMORY = 4 << 30
"""Bytes of memory that a case may use."""

Mutate = Callable[[random.Random, bytes], bytes]


class Target(NamedTuple):
    """Valid files, how they are damaged, and their reader."""

    files: Mapping[Path, bytes]
    mutate: Mutate
    read: Callable[[Path], object]


class Fuzzer(NamedTuple):
    """Targets, one of which each case selects, and the number of cases in `make test`."""

    targets: Callable[[Path], list[Target]]
    count: int


@dataclass
class Finding:
    """A case that failed, with a traceback or the reason."""

    fuzzer: str
    seed: int
    case: int
    text: str


def fuzz(
    name: str, targets: list[Target], seed: int, cases: range, until: float = float("inf")
) -> tuple[list[Finding], int]:
    """Runs cases in forked children; returns the findings and the number of cases."""
    findings: list[Finding] = []
    first = cases.start
    while first < cases.stop and time.monotonic() < until:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(name, targets, seed, range(first, cases.stop), until, writer)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
            lines = pipe.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        last = first - 1
        for line in lines:
            number, text = json.loads(line)
            last = number
            if text is not None:
                findings.append(Finding(name, seed, number, text))
        first = last + 1
        if code != 0:
            reason = "hangs" if code == -signal.SIGALRM else f"ends the process with code {code}"
            findings.append(Finding(name, seed, last, reason))
        elif first < cases.stop:
            break  # out of time
    return findings, first - cases.start


def _child(
    name: str, targets: list[Target], seed: int, cases: range, until: float, pipe: int
) -> None:
    """Writes the number of each case before it begins, and again if it fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    try:
        for case in cases:
            if time.monotonic() > until:
                break
            os.write(pipe, f"{json.dumps([case, None])}\n".encode())
            signal.alarm(SECONDS)
            text = run_case(targets, f"{name}-{seed}-{case}")
            signal.alarm(0)
            if text is not None:
                os.write(pipe, f"{json.dumps([case, text])}\n".encode())
        os._exit(0)
    except BaseException:
        os._exit(9)


def run_case(targets: list[Target], seed: str) -> str | None:
    """Runs one case; returns a description of the failure, or None."""
    from deformnet._errors import UserError

    rng = random.Random(seed)
    target = rng.choice(targets)
    path = rng.choice(list(target.files))
    content = target.mutate(rng, target.files[path])
    path.write_bytes(content)
    try:
        target.read(path)
    except (UserError, OSError) as error:
        if "\n" in str(error):
            return f"several lines: {error}"
    except Exception:
        return traceback.format_exc()[-3000:]
    finally:
        path.write_bytes(target.files[path])
    return None


def main() -> None:
    from readers import FUZZERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fuzzers", nargs="+", default=list(FUZZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each fuzzer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each fuzzer")
    options = parser.parse_args()
    with options.out.open("w") as out:
        for name in options.fuzzers:
            count = FUZZERS[name].count if options.count is None else options.count
            cases = range(options.first, options.first + count)
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)  # relative paths of command lines stay in it
                targets = FUZZERS[name].targets(Path(folder))
                started = time.monotonic()
                until = started + options.seconds
                findings, done = fuzz(name, targets, options.seed, cases, until)
                os.chdir("/")
            for finding in findings:
                out.write(json.dumps(asdict(finding)) + "\n")
            seconds = time.monotonic() - started
            summary = {"fuzzer": name, "cases": done, "seconds": round(seconds, 1)}
            out.write(json.dumps(summary) + "\n")
            out.flush()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
