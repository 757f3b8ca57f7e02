import subprocess
import sys

import deformnet
from deformnet import nn


def test_layers_are_at_the_top():
    assert set(nn.__all__) <= set(deformnet.__all__)


def test_layers_need_torch_alone():
    heavy = (
        "torchvision",
        "lightning",
        "torchmetrics",
        "matplotlib",
        "PIL",
        "tyro",
        "torch._dynamo",
    )
    code = f"import deformnet.nn, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
