"""Fixtures shared by the tests."""

import os
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
