"""Commands on a failing disk: results are unchanged or complete, and one line names the cause.

If DEFORMNET_FUZZ is set, every system call fails once, which takes hours; otherwise, a few do.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EVERY = "DEFORMNET_FUZZ" in os.environ
SAMPLE = 1
"""Faults of each command."""
COMMANDS = ("train", "evaluate", "predict", "convert")
if EVERY:
    COMMANDS += ("resume", "export")
    COMMANDS += tuple(f"{name} in two processes" for name in ("train", "resume", "evaluate"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "records.jsonl"
    options = [] if EVERY else ["--sample", str(SAMPLE)]
    program = Path(__file__).with_name("harness.py")
    command = [sys.executable, str(program), str(out), *options, "--commands", *COMMANDS]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_lost_silently(records, command):
    own = [record for record in records if record["command"] == command]
    assert len(own) >= SAMPLE
    counts = Counter((record["fault"], record["outcome"]) for record in own)
    print(command, dict(counts))
    faults = [record for record in own if record["outcome"] == "fault"]
    assert not faults, faults[0]
