"""Printing of results in the first process of a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deformnet.engine import Result


def print_result(result: "Result") -> None:
    """Prints the scores and facts of a training or evaluation."""
    print_once(str(result))


def print_once(text: str) -> None:
    """Prints in the first process of a run only."""
    from lightning.fabric.utilities import rank_zero_only

    rank_zero_only(print)(text)
