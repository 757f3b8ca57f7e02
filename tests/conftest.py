"""Fixtures shared by the tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, named by the environment variable DEFORMNET_DATA."""
    folder = os.environ.get("DEFORMNET_DATA")
    if not folder:
        pytest.skip("DEFORMNET_DATA is not set: no real images to test on")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"DEFORMNET_DATA={folder} is not a folder")
    return path


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with one line and exit code 2; returns the line."""
    from deformnet.cli import main

    def check(*command: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in command])
        lines = capfd.readouterr().err.strip().splitlines()
        lines = [line for line in lines if not line.startswith("training:")]
        assert ended.value.code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("deformnet: ")
        return lines[0].removeprefix("deformnet: ")

    return check
