import subprocess
import sys
import tomllib
from pathlib import Path

import deformnet


def test_public_names():
    assert set(deformnet.__all__) == {
        "DeformConv2d",
        "DeformPSRoIPool2d",
        "DeformRoIPool2d",
        "__version__",
        "deform_",
        "parameter_groups",
    }


def test_version_is_the_projects():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert deformnet.__version__ == tomllib.loads(text)["project"]["version"]


def test_import_needs_torch_alone():
    heavy = ("torchvision", "lightning", "torchmetrics", "matplotlib", "PIL", "tyro")
    code = f"import deformnet, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
