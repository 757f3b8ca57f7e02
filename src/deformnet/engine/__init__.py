"""Training and evaluation from folder to folder, run folders, and exported networks.

The settings can be imported without PyTorch; everything else is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from deformnet._errors import require_extra
from deformnet.engine.settings import Hardware, LoopOptions, WholeOptions

if TYPE_CHECKING:
    from deformnet.engine.evaluation import evaluate, propose
    from deformnet.engine.export import export_run
    from deformnet.engine.health import OffsetHealth
    from deformnet.engine.hub import HubModel
    from deformnet.engine.presets import finetune_on
    from deformnet.engine.processes import is_first_process
    from deformnet.engine.results import Result
    from deformnet.engine.runs import TrainedRun, load, load_run
    from deformnet.engine.training import TrainingStopped, train
    from deformnet.engine.whole import export_whole

__all__ = [
    "Hardware",
    "HubModel",
    "LoopOptions",
    "OffsetHealth",
    "Result",
    "TrainedRun",
    "TrainingStopped",
    "WholeOptions",
    "evaluate",
    "export_run",
    "export_whole",
    "finetune_on",
    "is_first_process",
    "load",
    "load_run",
    "propose",
    "train",
]

_MODULES = {
    "deformnet.engine.evaluation": ("evaluate", "propose"),
    "deformnet.engine.export": ("export_run",),
    "deformnet.engine.health": ("OffsetHealth",),
    "deformnet.engine.hub": ("HubModel",),
    "deformnet.engine.presets": ("finetune_on",),
    "deformnet.engine.processes": ("is_first_process",),
    "deformnet.engine.results": ("Result",),
    "deformnet.engine.runs": ("TrainedRun", "load", "load_run"),
    "deformnet.engine.training": ("TrainingStopped", "train"),
    "deformnet.engine.whole": ("export_whole",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            require_extra(__name__, "train", "lightning", "torchvision", "safetensors")
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
