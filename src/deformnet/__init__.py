"""Deformable convolutional networks (Dai et al. 2017) for PyTorch.

Names and subpackages are imported on first use, so `import deformnet` alone costs nothing.
Importing `deformnet.ops` registers the operators with PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deformnet._errors import UserError
    from deformnet.engine import load, train
    from deformnet.nn import (
        DeformConv2d,
        DeformPSRoIPool2d,
        DeformRoIPool2d,
        deform_,
        parameter_groups,
    )
    from deformnet.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool, using

__all__ = [
    "DeformConv2d",
    "DeformPSRoIPool2d",
    "DeformRoIPool2d",
    "UserError",
    "__version__",
    "deform_",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "load",
    "parameter_groups",
    "train",
    "using",
]
__version__ = "0.1.0"

_MODULES = {
    "ops": ("deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool", "using"),
    "nn": ("DeformConv2d", "DeformPSRoIPool2d", "DeformRoIPool2d", "deform_", "parameter_groups"),
    "compat": (),
    "models": (),
    "data": (),
    "metrics": (),
    "recipes": (),
    "tasks": (),
    "engine": ("load", "train"),
    "analysis": (),
    "visualization": (),
    "inspection": (),
    "paper": (),
    "demo": (),
    "_errors": ("UserError",),
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
