"""Damaged files and command lines give a result or a user error, in bounded time and memory.

DEFORMNET_FUZZ is the number of cases of each fuzzer, DEFORMNET_FUZZ_SEED their seed. With
DEFORMNET_FUZZ_SECONDS, each runs for so long instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("images", "json", "xml", "texts", "checkpoints", "exports", "resumed", "commands")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What the fuzzers found, and how many cases they ran."""
    out = tmp_path_factory.mktemp("fuzz") / "findings.jsonl"
    options = ["--fuzzers", *NAMES, "--seed", os.environ.get("DEFORMNET_FUZZ_SEED", "0")]
    if seconds := os.environ.get("DEFORMNET_FUZZ_SECONDS"):
        options += ["--seconds", seconds, "--count", "1000000000"]
    elif count := os.environ.get("DEFORMNET_FUZZ"):
        options += ["--count", count]
    program = Path(__file__).with_name("fuzz.py")
    subprocess.run(
        [sys.executable, str(program), str(out), *options],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_read(lines, name):
    own = [line for line in lines if line["fuzzer"] == name]
    assert own[-1]["cases"] > 0
    for finding in own[:-1]:
        pytest.fail(f"seed {finding['seed']}, case {finding['case']}: {finding['text']}")
