"""Random calls of the operators, valid and invalid: see `fuzzing.py`.

DEFORMNET_FUZZ sets their number, DEFORMNET_FUZZ_SEED their seed. The next seeds follow until
DEFORMNET_FUZZ_SECONDS have passed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deformnet.ops import backends

if backends.why_unavailable("cpu"):
    pytest.skip(str(backends.why_unavailable("cpu")), allow_module_level=True)

COUNT = int(os.environ.get("DEFORMNET_FUZZ", "200"))
SEED = int(os.environ.get("DEFORMNET_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("DEFORMNET_FUZZ_SECONDS", "0"))


def findings(seed: int, count: int) -> list[str]:
    """The findings of the first calls of a seed, including crashes."""
    found, first = [], 0
    while first < count:
        program = Path(__file__).with_name("fuzzing.py")
        command = [sys.executable, program, str(seed), str(first), str(count)]
        ran = subprocess.run(command, capture_output=True, text=True)
        lines = ran.stdout.splitlines()
        found += [line for line in lines if line.startswith("finding")]
        calls = [int(line.split()[1]) for line in lines if line.startswith("call")]
        assert calls, ran.stderr
        if ran.returncode == 0:
            break
        found.append(f"finding {calls[-1]}: ends with {ran.returncode}: {ran.stderr[-2000:]}")
        first = calls[-1] + 1
    return found


def test_random_calls():
    end, seed = time.monotonic() + SECONDS, SEED
    while True:
        found = findings(seed, COUNT)
        assert not found, "\n".join([f"{len(found)} of {COUNT} calls of seed {seed}:", *found])
        seed += 1
        if time.monotonic() >= end:
            break
