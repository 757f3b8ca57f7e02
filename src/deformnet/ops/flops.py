"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

That module imports Triton, so formulas are registered only when it is imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Register a formula, which takes the arguments of the operator and its result as `out_val`.

    Args:
        operator: an overload packet, such as `torch.ops.deformnet.deform_conv2d`.
        formula: returns the number of floating-point operations; a multiply-add is two.
    """
    _formulas[operator] = formula
    counter = sys.modules.get(_MODULE)
    if counter is not None:
        counter.register_flop_formula(operator, get_raw=True)(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module as usual, and registers the formulas after it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            for operator, formula in _formulas.items():
                module.register_flop_formula(operator, get_raw=True)(formula)

        spec.loader.exec_module = load_and_register
        return spec


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _Finder())
