"""Registered FLOP formulas: `FlopCounterMode` counts the operators without further imports."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from deformnet import deform_

COUNT = """
import sys, torch
{imports}
assert "deformnet.analysis" not in sys.modules
layer = torch.nn.Conv2d(6, 5, 3, padding=1).to("meta")
model = torch.nn.Sequential(layer)
deformnet.deform_(model, "0")
with FlopCounterMode(display=False) as counter:
    model(torch.empty(1, 6, 4, 5, device="meta"))
print(counter.get_total_flops())
"""
OURS, COUNTER = "import deformnet.ops", "from torch.utils.flop_counter import FlopCounterMode"


@pytest.mark.parametrize("imports", [(OURS, COUNTER), (COUNTER, OURS)], ids=["before", "after"])
def test_formulas_are_registered_whichever_is_imported_first(imports):
    script = COUNT.format(imports="\n".join(imports))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    # Of 20 positions and 9 taps: the offsets' convolution, the products, and four multiply-adds
    # for each channel that is read.
    assert ran.stdout.split() == [str(2 * 20 * 9 * (18 * 6 + 5 * 6 + 4 * 6))], ran.stderr


@pytest.mark.parametrize(
    ("size", "plain", "converted"), [(64, 148.05, 149.21), (224, 1813.56, 1827.79)]
)
def test_a_converted_resnet18(size, plain, converted):
    """Millions of multiply-adds of the convolutions, without those of the bilinear reads."""
    model = torchvision.models.resnet18().to("meta")
    model.fc = torch.nn.Identity()

    def count() -> float:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops() / 2e6

    assert count() == pytest.approx(plain, abs=0.01)
    deform_(model, "layer4.*.conv?")
    positions, channels = (size // 32) ** 2, 256 + 3 * 512
    assert count() - positions * 9 * channels * 4 / 1e6 == pytest.approx(converted, abs=0.01)
